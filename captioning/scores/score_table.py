"""A CSV table with the scores of every image, the worst first."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path

from captioning.base.cli import InputError
from captioning.base.files import atomic_write, check_output
from captioning.data.annotations import Example

SCORES = ("CIDEr", "BLEU-4", "ROUGE-L", "METEOR", "SPICE")  # in this order, those that there are


def check_table_path(path: Path, inputs: Iterable[str | Path]) -> None:
    """Checks a file that a table will be written into, see `check_output`, and makes its folder."""
    if path.suffix.lower() != ".csv":
        raise InputError(f"--per-image {path}: expected a name that ends in .csv")
    check_output("--per-image", path, is_score_table, inputs)
    path.parent.mkdir(parents=True, exist_ok=True)


def is_score_table(path: Path) -> bool:
    """Tells whether `write_score_table` wrote a file."""
    with open(path, "rb") as file:
        return file.readline().startswith(b"image,caption,CIDEr,")


def write_score_table(
    path: Path, examples: Sequence[Example], captions: Sequence[str], by_image: dict[str, list[float]]
) -> None:
    """Writes a row for every image: image, caption, scores in percent (`metrics.Scores`), references; the worst first.

    The worst is that of the lowest CIDEr. BLEU-4 is that of the caption alone, as pycocoevalcap computes it: near 0
    without four right words in a row, so that the mean over images is not the BLEU-4 of all captions.
    """
    names = [name for name in SCORES if name in by_image]
    num_references = max(len(example.captions) for example in examples)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("image", "caption", *names, *(f"reference {number + 1}" for number in range(num_references))))
    for index in sorted(range(len(examples)), key=by_image["CIDEr"].__getitem__):
        scores = (f"{by_image[name][index]:.2f}" for name in names)
        writer.writerow((examples[index].image_path, captions[index], *scores, *examples[index].captions))
    with atomic_write(path, "wb") as file:
        file.write(text.getvalue().encode(errors="surrogateescape"))  # a name on the disk need not be Unicode
