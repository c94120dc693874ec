"""Runs the whole pipeline in minutes, without a download: draws a toy dataset, trains, evaluates.

All sections of the tutorial, one after the other, on images of coloured shapes.

    python demo.py                                 # run again, it only evaluates
    python demo.py --run runs/again                # trains again, on the same images and features

The demo draws the images, caches features of a randomly initialised InceptionV3 (the ImageNet weights are a
download, and random ones tell shapes and colours apart well enough), trains, captions the test images, and
measures how much of the attention of a noun lies on the shape it names.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

import data_utils
import evaluate
import inference
import train
from captioning.base.cli import log, make_parser, run_main
from captioning.base.files import read_json
from captioning.data import shapes
from captioning.images.feature_cache import open_run_cache
from captioning.scores.attention_boxes import measure_attention

RUN = Path("runs/demo")
# Small batches and dropout, since there are only 1,900 images to learn from.
TRAIN_ARGS = ["--batch-size", "16", "--learning-rate", "5e-4", "--dropout", "0.2", "--epochs", "18", "--patience", "0"]


def attention_on_object(caption: inference.Caption, shapes_in_image: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """Measures for each noun that names a shape of the image how much of its attention lies in the shape's box.

    Args:
        caption: a caption in which every colour is followed by its noun.
        shapes_in_image: the image's shapes, each with colour, noun and box (left, top, right, bottom) in pixels.

    Returns:
        For each noun, the share of its attention inside the box, and that of uniform attention.
    """
    shares = []
    for position, noun in enumerate(caption.words):
        for shape in shapes_in_image:
            if (shape["colour"], shape["noun"]) == (caption.words[position - 1], noun):
                left, top, right, bottom = (edge / shapes.SIZE for edge in shape["box"])
                measured = measure_attention(caption.attention[position], [(left, top, right, bottom)])
                shares.append((measured["inside"], measured["inside, even"]))
    return shares


def evaluate_demo(run: Path) -> dict[str, float]:
    """Captions the test images; returns their number, and in percent what the demo prints."""
    captioner = inference.Captioner.load(run)  # the weights of the best epoch
    dataset = data_utils.load_run_dataset(captioner.config)
    examples = dataset.split("test")  # images that the training has not seen
    cache = open_run_cache(captioner.config.features)
    captions = evaluate.generate_captions(captioner.model, captioner.tokenizer, cache, examples)
    # A drawing has few right captions, so that an exact match says something; photographs need evaluate.py's scores.
    exact_match = [caption.text in example.captions for caption, example in zip(captions, examples, strict=True)]
    annotations = read_json(dataset.image_dir / shapes.ANNOTATIONS)["images"]
    shapes_by_image = {f"{image['filepath']}/{image['filename']}": image["shapes"] for image in annotations}
    # Nobody has told the model where the shapes are: if attention works, it looks at a circle when it writes "circle".
    shares = []
    for caption, example in zip(captions, examples, strict=True):
        shares += attention_on_object(caption, shapes_by_image[example.image_path])
    on_object, uniform = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    return {
        "images": len(examples),
        "exact match": 100 * float(np.mean(exact_match)),
        "attention on the named object": 100 * float(on_object),
        "uniform attention": 100 * float(uniform),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the demo. Run again, it only evaluates; to train again, delete runs/demo."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", default=RUN, help="run folder (default: %(default)s)")
    parser.add_argument(
        "--data-dir", metavar="DIR", default="data", help="folder to draw the dataset into (default: %(default)s)"
    )
    text = "folder of the images' features (default: %(default)s)"
    parser.add_argument("--features-dir", metavar="DIR", default="features/demo", help=text)
    args = parser.parse_args(argv)
    start = time.monotonic()
    log("The CNN of this demo has random weights: ImageNet's are a download, and shapes do not need them.")
    # Data, features and training are one command; what is there from the last time is used again.
    data_args = ["--dataset", "shapes", "--data-dir", args.data_dir]
    feature_args = ["--cnn-weights", "random", "--features-dir", args.features_dir]
    train.main([*data_args, *feature_args, "--run", str(args.run), *TRAIN_ARGS])
    results = evaluate_demo(args.run)

    captioner = inference.Captioner.load(args.run)
    dataset = data_utils.load_run_dataset(captioner.config)
    # A caption of a test image, with a plot of what each of its words attends to, as at the end of the tutorial.
    example = next(e for e in dataset.split("test") if len(e.captions) > 1)  # two shapes
    image_path = dataset.image_dir / example.image_path
    caption, plot = inference.caption_and_plot(captioner, image_path, args.run / "attention")
    print(f"test images captioned exactly right: {results['exact match']:.1f} % of {results['images']}")
    print(
        f"attention on the named object: {results['attention on the named object']:.1f} % "
        f"(uniform attention: {results['uniform attention']:.1f} %)"
    )
    print(f"image: {image_path}\ncaption: {caption.text}")
    if plot:
        print(f"attention plot: {plot}")
    print(f"loss plot: {args.run / 'loss.png'}")
    print(f"minutes: {(time.monotonic() - start) / 60:.1f}")


if __name__ == "__main__":
    run_main(main)
