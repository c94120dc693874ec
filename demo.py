"""The whole pipeline in about five minutes, without a download: draws shapes, trains on them, and measures itself.

    python demo.py                                        # run again, it only measures
    python demo.py --run runs/again                       # trains anew, with the same pictures and features

Draws the built-in data set, caches features of a randomly initialised InceptionV3 (its ImageNet weights
are a download, and random ones tell shapes and colours apart well enough), trains, captions the
held-out pictures, and measures how much of the attention of a noun lies on the shape it names.
"""

from common import make_parser, read_json, run_command, say  # before TensorFlow

import time
from pathlib import Path
from typing import Any

import features
import numpy as np

import data_utils
import evaluate
import inference
import shapes
import train

RUN = Path("runs/demo")
# Small batches and dropout, since there are only 1,900 pictures to learn from.
TRAINING = ["--batch-size", "16", "--learning-rate", "5e-4", "--dropout", "0.2", "--epochs", "18", "--patience", "0"]


def noun_attention(caption: inference.Caption, drawn: list[dict[str, Any]]) -> list[tuple[float, float]]:
    """For each noun that names a shape of the picture, the share of its attention inside the box of that shape.

    Args:
        caption: a caption in which every colour is followed by its noun.
        drawn: the picture's shapes, each with colour, noun and box (left, top, right, bottom) in pixels.

    Returns:
        (share of the attention inside the box, share of the picture the box covers) of each noun. An even
        attention would give equal numbers. A location that is partly in the box counts in part.
    """
    side = int(np.sqrt(caption.attention.shape[1]))
    shares = []
    for position, noun in enumerate(caption.words):
        for shape in drawn:
            if (shape["colour"], shape["noun"]) == (caption.words[position - 1], noun):
                left, top, right, bottom = (edge * side / shapes.SIZE for edge in shape["box"])
                cells = np.arange(side)
                across = (np.minimum(cells + 1, right) - np.maximum(cells, left)).clip(0)  # (8,), of each column
                down = (np.minimum(cells + 1, bottom) - np.maximum(cells, top)).clip(0)  # (8,), of each row
                inside = np.outer(down, across)  # (8, 8), the covered share of each location
                weights = caption.attention[position].reshape(side, side)
                shares.append((float((weights * inside).sum()), float(inside.sum() / side**2)))
    return shares


def measure(run: Path) -> dict[str, float]:
    """Captions the test pictures and returns the shares, in percent, that the demo prints."""
    captioning = inference.Captioning.load(run)
    dataset = inference.dataset_of(captioning.config)
    examples = dataset.split("test")
    cache = features.cache_of(captioning.config["features"])
    captions = evaluate.caption_examples(captioning.captioner, captioning.words, cache, examples)
    right = [caption.text in example.captions for caption, example in zip(captions, examples, strict=True)]
    annotations = read_json(dataset.images / shapes.ANNOTATIONS)["images"]
    drawn = {f"{image['filepath']}/{image['filename']}": image["shapes"] for image in annotations}
    shares = [s for c, e in zip(captions, examples, strict=True) for s in noun_attention(c, drawn[e.image])]
    inside, area = np.mean(shares, axis=0) if shares else (0.0, 0.0)
    return {
        "pictures": len(examples),
        "exactly right": 100 * float(np.mean(right)),
        "noun attention inside": 100 * float(inside),
        "box area": 100 * float(area),
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the demo; run again, it only measures; to train anew, delete runs/demo."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", default=RUN, help="run folder (default: %(default)s)")
    parser.add_argument(
        "--data-dir", metavar="DIR", default="data", help="folder to draw the data set into (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    began = time.monotonic()
    data = ["--dataset", "shapes", "--data-dir", args.data_dir]
    say("The CNN of this demo has random weights: ImageNet's are a download, and shapes can do without them.")
    train.main([*data, "--weights", "random", "--features-dir", "features/demo", "--run", str(args.run), *TRAINING])
    found = measure(args.run)

    dataset = data_utils.load_dataset(data_utils.DataOptions(dataset="shapes", data_dir=args.data_dir))
    example = next(e for e in dataset.split("test") if len(e.captions) > 1)  # two shapes
    captioning = inference.Captioning.load(args.run)
    picture = dataset.images / example.image
    caption, plot = inference.caption_and_plot(captioning, picture, args.run / "attention")
    print(f"held-out pictures captioned exactly right: {found['exactly right']:.1f} % of {found['pictures']}")
    print(
        f"attention of a noun inside the box of its shape: {found['noun attention inside']:.1f} %; "
        f"spread evenly it would be {found['box area']:.1f} %"
    )
    print(f"picture: {picture}\ncaption: {caption.text}\nattention plot: {plot}\nloss plot: {args.run / 'loss.png'}")
    print(f"minutes: {(time.monotonic() - began) / 60:.1f}")


if __name__ == "__main__":
    run_command(main)
