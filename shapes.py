"""The built-in data set: drawn pictures of coloured shapes, with captions and the box of every shape.

    python shapes.py                                      # the pictures of the demo
    python shapes.py --output data/few --pictures 12 --seed 1

It needs no download, so the whole pipeline can be seen at work in minutes, and because the boxes are
known it can be measured whether the attention of a noun lies on the shape it names (demo.py).
"""

import random
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from common import InputError, at_least, make_parser, read_json, run_command, say, write_json

COLOURS = {"red": (214, 40, 40), "green": (46, 160, 67), "blue": (38, 84, 214), "yellow": (240, 200, 20)}
NOUNS = ("circle", "square", "triangle")
OPPOSITE = {"above": "below", "left of": "right of"}
ANNOTATIONS = "dataset_shapes.json"
SIZE = 299  # pixels: InceptionV3's input, so that nothing is resized
DRAWN_AT = 2  # drawn larger by this factor and reduced, which smooths the edges

VERSION = 2  # of what is drawn; an older folder is not taken for this one
PICTURES = 2200
HELD_OUT = 200  # pictures of the test split; as many again, but fewer, choose the best epoch (val)


def draw_shape(pen: ImageDraw.ImageDraw, noun: str, colour: str, box: tuple[int, int, int, int]) -> None:
    """Draws one shape that fills `box` (left, top, right, bottom), in pixels of the final picture."""
    left, top, right, bottom = (DRAWN_AT * edge for edge in box)
    fill = COLOURS[colour]
    if noun == "circle":
        pen.ellipse((left, top, right, bottom), fill)
    elif noun == "square":
        pen.rectangle((left, top, right, bottom), fill)
    else:
        pen.polygon(((left, bottom), ((left + right) // 2, top), (right, bottom)), fill)


def _place(dice: random.Random, x: float, y: float) -> tuple[int, int, int, int]:
    """A box of random size around a point given as a share of the picture's sides."""
    half = dice.randint(50, 66)
    x, y = (min(max(round(v * SIZE) + dice.randint(-14, 14), half + 4), SIZE - half - 4) for v in (x, y))
    return (x - half, y - half, x + half, y + half)


def _background(brightness: int) -> Image.Image:
    """A pale background, less red to the right and less blue to the bottom.

    Like the sky and the ground of a photograph it tells where in the picture a location is, which the attention
    cannot: its context vector is a sum over locations.
    """
    down, across = np.mgrid[0 : 1 : SIZE * 1j, 0 : 1 : SIZE * 1j]  # (299, 299) each, from 0 to 1
    shade = np.stack([across, (across + down) / 2, down], axis=-1)  # of red, green and blue
    return Image.fromarray((brightness - 80 * shade).round().astype(np.uint8))


def make_picture(dice: random.Random) -> tuple[Image.Image, list[str], list[dict]]:
    """One picture, every correct caption of it, and its shapes (colour, noun, box)."""
    colours = dice.sample(list(COLOURS), dice.choice((1, 2)))  # two shapes differ in colour, perhaps in colour only
    kinds = [(colour, dice.choice(NOUNS)) for colour in colours]
    if len(kinds) == 1:
        places = [(dice.uniform(0.2, 0.8), dice.uniform(0.2, 0.8))]
        captions = ["a {} {}".format(*kinds[0])]
    else:
        relation = dice.choice(list(OPPOSITE))
        across = dice.uniform(0.3, 0.7)  # both shapes are about as far across, so that one relation holds
        places = [(across, 0.25), (across, 0.75)] if relation == "above" else [(0.25, across), (0.75, across)]
        first, second = ("{} {}".format(*kind) for kind in kinds)
        captions = [f"a {first} {relation} a {second}", f"a {second} {OPPOSITE[relation]} a {first}"]
    picture = _background(dice.randint(235, 255)).resize((SIZE * DRAWN_AT, SIZE * DRAWN_AT))
    found = []
    for (colour, noun), (x, y) in zip(kinds, places, strict=True):
        box = _place(dice, x, y)
        draw_shape(ImageDraw.Draw(picture), noun, colour, box)
        found.append({"colour": colour, "noun": noun, "box": box})
    return picture.resize((SIZE, SIZE), Image.Resampling.BOX), captions, found


def draw_dataset(folder: Path | str, pictures: int = PICTURES, seed: int = 0) -> Path:
    """Draws the data set unless it is there, and returns its annotation file (Karpathy's format, with boxes).

    The annotation file is written last: where it exists, every picture does.

    Raises:
        InputError: the folder holds pictures drawn with other settings.
    """
    folder = Path(folder)
    annotations = folder / ANNOTATIONS
    settings = {"pictures": pictures, "seed": seed, "version": VERSION}
    if annotations.exists():
        content = read_json(annotations)
        if (found := content.get("settings") if isinstance(content, dict) else None) != settings:
            raise InputError(f"{folder} holds shapes drawn with {found}, expected {settings}; choose another folder")
        return annotations
    say(f"drawing {pictures:,} pictures of shapes into {folder}/")
    (folder / "images").mkdir(parents=True, exist_ok=True)
    dice = random.Random(seed)
    held_out = min(HELD_OUT, pictures // 4)
    images = []
    for number in range(pictures):
        picture, captions, found = make_picture(dice)
        name = f"shapes_{number:05d}.png"
        picture.save(folder / "images" / name)
        split = "test" if number < held_out else "val" if number < held_out * 3 // 2 else "train"
        images.append(
            {
                "filepath": "images",
                "filename": name,
                "cocoid": number,
                "split": split,
                "sentences": [{"raw": caption} for caption in captions],
                "shapes": found,
            }
        )
    write_json(annotations, {"dataset": "shapes", "settings": settings, "images": images})
    return annotations


def main(argv: list[str] | None = None) -> None:
    """Draws the data set."""
    parser = make_parser(__doc__)
    parser.add_argument(
        "--output", metavar="DIR", default="data/shapes", help="folder to draw into (default: %(default)s)"
    )
    parser.add_argument(
        "--pictures", type=at_least(8), metavar="N", default=PICTURES, help="how many (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, metavar="N", default=0, help="seed of what is drawn (default: %(default)s)")
    args = parser.parse_args(argv)
    print(draw_dataset(args.output, args.pictures, args.seed))


if __name__ == "__main__":
    run_command(main)
