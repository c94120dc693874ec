"""Draws the toy dataset: images of coloured shapes, with captions and the bounding box of every shape.

    python -m captioning.data.shapes                                              # the images of the demo
    python -m captioning.data.shapes --output data/few --num-images 12 --seed 1   # a few other ones

The dataset needs no download, so that the whole pipeline runs in minutes. Since the boxes are known, demo.py can
measure whether the attention at a noun lies on the shape that the noun names.
"""

import random
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from captioning.base.cli import InputError, int_at_least, log, make_parser, run_main
from captioning.base.files import read_json, write_json

COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (240, 200, 20)}
NOUNS = ("circle", "square", "triangle")
OPPOSITE = {"above": "below", "left of": "right of"}
ANNOTATIONS = "dataset_shapes.json"
SIZE = 299  # pixels; InceptionV3's input size, so that nothing is resized
SUPERSAMPLING = 2  # images are drawn larger by this factor and reduced, which smooths the edges

VERSION = 2  # of the drawing; a folder of another version is refused
NUM_IMAGES = 2200
NUM_TEST = 200  # images of the test split; the val split has half as many

Box = tuple[int, int, int, int]  # left, top, right, bottom, in pixels of the final image


def draw_shape(draw: ImageDraw.ImageDraw, noun: str, colour: str, box: Box) -> None:
    """Draws a shape that fills `box` on an image that is larger by `SUPERSAMPLING`."""
    left, top, right, bottom = (SUPERSAMPLING * edge for edge in box)
    fill = COLOURS[colour]
    if noun == "circle":
        draw.ellipse((left, top, right, bottom), fill)
    elif noun == "square":
        draw.rectangle((left, top, right, bottom), fill)
    else:
        draw.polygon(((left, bottom), ((left + right) // 2, top), (right, bottom)), fill)


def _random_box(rng: random.Random, x: float, y: float) -> Box:
    """Returns a box of random size near a point, whose x and y are fractions of the image's sides."""
    half_side = rng.randint(50, 66)

    def random_centre(fraction: float) -> int:
        centre = round(fraction * SIZE) + rng.randint(-14, 14)
        return min(max(centre, half_side + 4), SIZE - half_side - 4)  # at least 4 pixels from the edges

    centre_x, centre_y = random_centre(x), random_centre(y)
    return (centre_x - half_side, centre_y - half_side, centre_x + half_side, centre_y + half_side)


def _background(brightness: int) -> Image.Image:
    """Returns a pale background of the final size, less red to the right and less blue to the bottom.

    Like the sky and the ground of a photograph, its colour shows where in the image a location is. The attention
    cannot show that: its context vector is a sum over locations.
    """
    y, x = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j]  # (299, 299) both, from 0 to 1
    shade = np.stack([x, (x + y) / 2, y], axis=-1)  # (299, 299, 3), of red, green and blue
    return Image.fromarray((brightness - 80 * shade).round().astype(np.uint8))


def draw_image(rng: random.Random) -> tuple[Image.Image, list[str], list[dict[str, Any]]]:
    """Draws an image with one or two shapes.

    Returns:
        The image, 299 x 299; every correct caption of it; and its shapes, with their colour, noun and box.
    """
    colours = rng.sample(list(COLOURS), rng.choice((1, 2)))  # two shapes always differ in colour
    names = [(colour, rng.choice(NOUNS)) for colour in colours]
    if len(names) == 1:
        points = [(rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8))]
        captions = ["a {} {}".format(*names[0])]
    else:
        relation = rng.choice(list(OPPOSITE))
        offset = rng.uniform(0.3, 0.7)  # the same for both shapes, so that only one relation holds
        points = [(offset, 0.25), (offset, 0.75)] if relation == "above" else [(0.25, offset), (0.75, offset)]
        first, second = ("{} {}".format(*name) for name in names)
        captions = [f"a {first} {relation} a {second}", f"a {second} {OPPOSITE[relation]} a {first}"]
    image = _background(rng.randint(235, 255)).resize((SIZE * SUPERSAMPLING, SIZE * SUPERSAMPLING))
    shapes = []
    for (colour, noun), (x, y) in zip(names, points, strict=True):
        box = _random_box(rng, x, y)
        draw_shape(ImageDraw.Draw(image), noun, colour, box)
        shapes.append({"colour": colour, "noun": noun, "box": box})
    return image.resize((SIZE, SIZE), Image.Resampling.BOX), captions, shapes


def draw_dataset(folder: Path | str, num_images: int = NUM_IMAGES, seed: int = 0) -> Path:
    """Draws the dataset, unless the folder holds it already.

    The annotation file is written last: where it exists, every image does.

    Returns:
        The annotation file, in Karpathy's format with the shapes of every image.

    Raises:
        InputError: the folder holds images drawn with other settings.
    """
    folder = Path(folder)
    annotations = folder / ANNOTATIONS
    settings = {"pictures": num_images, "seed": seed, "version": VERSION}
    if annotations.exists():
        content = read_json(annotations)
        drawn_with = content.get("settings") if isinstance(content, dict) else None
        if drawn_with != settings:
            raise InputError(
                f"{folder} holds shapes drawn with {drawn_with}, expected {settings}; choose another folder"
            )
        return annotations
    log(f"drawing {num_images:,} images of shapes into {folder}/")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    num_test = min(NUM_TEST, num_images // 4)
    rows = []
    for index in range(num_images):
        image, captions, shapes = draw_image(rng)
        name = f"shapes_{index:05d}.png"
        image.save(folder / "images" / name)
        rows.append(
            {
                "filepath": "images",
                "filename": name,
                "cocoid": index,
                "split": "test" if index < num_test else "val" if index < num_test * 3 // 2 else "train",
                "sentences": [{"raw": caption} for caption in captions],
                "shapes": shapes,
            }
        )
    write_json(annotations, {"dataset": "shapes", "settings": settings, "images": rows})
    return annotations


def main(argv: list[str] | None = None) -> None:
    """Draws the dataset and prints the path of its annotation file."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--output", metavar="DIR", default="data/shapes", help="folder to draw into (default: %(default)s)"
    )
    parser.add_argument(
        "--num-images", type=int_at_least(8), metavar="N", default=NUM_IMAGES, help="how many (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="seed of the drawing (default: %(default)s)")
    args = parser.parse_args(argv)
    print(draw_dataset(args.output, args.num_images, args.seed))


if __name__ == "__main__":
    run_main(main)
