"""Measures where the attention lies: inside the boxes of what the words of generated captions name, or elsewhere.

The share of a word's attention inside the boxes is the attention correctness of Liu et al. 2017, pointing the game of
Zhang et al. 2016. Both are measured beside two attentions that do not look at the image: an even one, and a centred
one, since photographers put what they take in the middle.

Boxes come from COCO's instances JSON, or from a CSV with a header.
"""

import csv
import functools
import io
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from captioning.base.cli import InputError, log
from captioning.base.files import parse_json
from captioning.data.annotation_formats import read_text
from captioning.data.annotations import Example
from captioning.data.text_formats import SEPARATORS
from captioning.images.image_names import NameIndex, clean_name
from captioning.images.reading import read_size
from captioning.output.captions import Caption

Box = tuple[float, float, float, float]  # left, top, right, bottom, in shares of the image's width and height
WordBoxes = dict[str, list[Box]]  # the boxes of an image, by the word that they are of

COLUMNS = ("image", "word", "left", "top", "right", "bottom")  # of a CSV; others are ignored
CENTRED_SIGMA = 0.25  # of the image's sides
# What else captions call COCO's categories: nouns that 60,000 captions of COCO and Flickr8k have at least 100 times.
SYNONYMS = {
    "person": """
        man men woman women people boy girl child children kid baby toddler adult lady guy player rider biker climber
        skier skateboarder snowboarder surfer
    """,
    "airplane": "plane",
    "bicycle": "bike",
    "motorcycle": "bike",
    "phone": "cellphone",
    "racket": "racquet",
    "tv": "television",
}


# Reading boxes.


class _Row(NamedTuple):
    """A box as the file has it."""

    image: str
    word: str
    box: tuple[float, ...]  # left, top, right, bottom in pixels
    size: tuple[float, float] | None = None  # the image's width and height, if the file says so


def read_boxes(path: Path, examples: Sequence[Example], image_dir: Path) -> list[WordBoxes]:
    """Reads the boxes of images, cut at the edges of the images; logs what is not used.

    Args:
        path: COCO's instances JSON, or a table with `COLUMNS`, in pixels of the upright image. Of a name of several
            words, such as "fire hydrant", the last counts.
        examples: the images.
        image_dir: their folder; the images are opened if the file does not have their sizes.

    Raises:
        InputError: it is neither; no box is of one of the images; or an image cannot be read.
    """
    rows = _read_rows(path)
    index = NameIndex(example.image_path for example in examples)
    find = functools.cache(index.find)
    find_size = functools.cache(lambda image_path: read_size(image_dir / image_path))
    boxes: defaultdict[str, defaultdict[str, list[Box]]] = defaultdict(lambda: defaultdict(list))
    counts: Counter[str] = Counter()
    for row in rows:
        image_path = find(row.image)
        if image_path is None:
            counts["of other images are left out"] += 1
            continue
        width, height = row.size or find_size(image_path)
        left, top, right, bottom = row.box
        cut = max(left, 0), max(top, 0), min(right, width), min(bottom, height)
        if not (cut[0] < cut[2] and cut[1] < cut[3]):
            counts["without an area inside their image are left out"] += 1
            continue
        if min(left, top) < -1 or right > width + 1 or bottom > height + 1:  # more than by rounding
            counts["reach out of their image (are they of another size of it?) and are cut"] += 1
        counts[""] += 1
        boxes[image_path][row.word].append((cut[0] / width, cut[1] / height, cut[2] / width, cut[3] / height))
    found = counts.pop("", 0)
    notes = "".join(f"; {count:,} {what}" for what, count in counts.items())
    if not found:
        raise InputError(
            f"{path}: expected boxes of the {len(examples):,} images, such as {examples[0].image_path}, found none"
            f"{notes}"
        )
    log(f"{path}: {found:,} boxes of {len(boxes):,} of the {len(examples):,} images{notes}")
    return [boxes.get(example.image_path, {}) for example in examples]


def _read_rows(path: Path) -> list[_Row]:
    """Reads all boxes of a file; raises InputError if it is not one of boxes."""
    text = read_text(path)
    try:
        if text.lstrip().startswith(("{", "[")):
            return list(_read_coco(parse_json(path, text)))
        return list(_read_table(text))
    except (LookupError, TypeError, ValueError, AttributeError, csv.Error) as error:
        raise InputError(
            f"{path}: expected COCO's instances JSON, or a CSV with the columns {', '.join(COLUMNS)}; something in it "
            f"is wrong: {error!r}"
        ) from None


def _read_coco(content: Any) -> Iterator[_Row]:
    """Reads COCO's instances JSON."""
    images = {image["id"]: image for image in content["images"]}
    names = {category["id"]: category["name"] for category in content["categories"]}
    for annotation in content["annotations"]:
        image = images[annotation["image_id"]]
        left, top, width, height = map(float, annotation["bbox"])
        size = float(image["width"]), float(image["height"])
        word = _last_word(names[annotation["category_id"]])
        yield _Row(clean_name(image["file_name"]), word, (left, top, left + width, top + height), size)


def _read_table(text: str) -> Iterator[_Row]:
    """Reads a table with a header, whose separator is one of `SEPARATORS`."""
    for separator in SEPARATORS:
        table = csv.DictReader(io.StringIO(text), delimiter=separator, skipinitialspace=True)
        names = {name.strip().lower(): name for name in table.fieldnames or ()}
        if names.keys() >= set(COLUMNS):
            break
    else:
        raise ValueError(f"the first line is {text.strip().partition(chr(10))[0][:60]!r}")
    for row in table:
        image, word, *edges = cells = [(row[names[column]] or "").strip() for column in COLUMNS]
        if not any(cells):  # spreadsheets write such lines
            continue
        try:
            yield _Row(clean_name(image), _last_word(word), tuple(map(float, edges)))
        except (ValueError, IndexError):
            raise ValueError(f"line {table.line_num}: expected a word and four numbers, found {cells[1:]}") from None


def _last_word(name: str) -> str:
    return name.lower().split()[-1]


# Measuring.


@functools.cache
def words_named(word: str) -> set[str]:
    """Returns the words of boxes that a caption's word may name: itself, its singular, what it is a synonym of."""
    forms = {word, word.removesuffix("s"), word.removesuffix("es"), re.sub("ies$", "y", word)}
    return forms | {name for name, synonyms in SYNONYMS.items() if forms & set(synonyms.split())}


def measure_captions(captions: Sequence[Caption], boxes: Sequence[WordBoxes]) -> dict[str, float]:
    """Measures the attention of all words that name a box of their image.

    Args:
        captions: one for each image.
        boxes: the boxes of each image, see `read_boxes`.

    Returns:
        The number of words, and the means of `measure_attention` over them, in percent. Words of boxes that no caption
        names are logged.
    """
    measured = []
    unused = {word for of_image in boxes for word in of_image}
    for caption, of_image in zip(captions, boxes, strict=True):
        for word, weights in zip(caption.words, caption.attention, strict=True):
            unused -= words_named(word)
            if named := [box for name in words_named(word) for box in of_image.get(name, ())]:
                measured.append(measure_attention(weights, named))
    if unused:
        log(f"boxes: no caption names {len(unused):,} of the words that they are of, such as {min(unused)!r}")
    names = measured[0] if measured else ()
    means = {name: round(100 * float(np.mean([row[name] for row in measured])), 1) for name in names}
    return {"words": len(measured), **means}


def measure_attention(weights: np.ndarray, boxes: Sequence[Box]) -> dict[str, float]:
    """Measures the attention of a word, and beside it an even and a centred one.

    Args:
        weights: (L,), the attention weights of a square grid of locations, row after row.
        boxes: of what the word names.

    Returns:
        `inside`, the share of the attention inside the boxes: a location that is partly inside counts in part; and
        `pointing`, 1 if the location with the most attention has its centre inside a box, else 0: of several locations
        with the most, their mean. For an even attention it is what pointing at random gives.
    """
    side = math.isqrt(len(weights))
    covered = cover_grid(boxes, side).ravel()  # (L,)
    left, top, right, bottom = np.array(boxes).T  # (N,) each, for N boxes
    centres = (np.arange(side)[:, np.newaxis] + 0.5) / side  # (side, 1), of rows and of columns
    hit = ((top <= centres) & (centres <= bottom)) @ ((left <= centres) & (centres <= right)).T  # (side, side), bool
    bell = np.exp(-(((np.arange(side) - (side - 1) / 2) / side / CENTRED_SIGMA) ** 2) / 2)  # (side,)
    centred = np.outer(bell, bell).ravel() / bell.sum() ** 2  # (L,)
    attentions = {"": weights, ", even": np.full(side**2, 1 / side**2), ", centred": centred}
    inside = {f"inside{name}": float(attention @ covered) for name, attention in attentions.items()}
    pointing = {f"pointing{name}": float(hit.ravel()[a == a.max()].mean()) for name, a in attentions.items()}
    return inside | pointing


def cover_grid(boxes: Sequence[Box], side: int) -> np.ndarray:
    """Returns the share of each location of a square grid that boxes, which may overlap, cover: (side, side)."""
    left, top, right, bottom = np.array(boxes).T  # (N,) each
    starts = np.arange(side) / side  # of locations
    # The edges of locations and boxes cut the image into rectangles, each of which is inside a box or outside of all.
    x = np.unique([*starts, 1, *left, *right])
    y = np.unique([*starts, 1, *top, *bottom])
    columns = (left <= x[:-1, np.newaxis]) & (x[1:, np.newaxis] <= right)  # (X, N), those of each box
    rows = (top <= y[:-1, np.newaxis]) & (y[1:, np.newaxis] <= bottom)  # (Y, N)
    areas = rows @ columns.T * np.outer(np.diff(y), np.diff(x))  # (Y, X), 0 outside of all boxes
    areas = np.add.reduceat(areas, np.searchsorted(y, starts), axis=0)  # (side, X)
    return np.add.reduceat(areas, np.searchsorted(x, starts), axis=1) * side**2
