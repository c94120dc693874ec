"""Annotations: images and their captions, from a file or a folder in any format of `annotation_formats`."""

import dataclasses
import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, log
from captioning.base.text import normalize_text
from captioning.data.annotation_formats import parse_annotations
from captioning.data.caption_table import CaptionRow, ReadOptions
from captioning.images.image_names import clean_name

SPLITS = ("train", "val", "test")
NUM_NAMED = 3  # of the captions that are left out for the same reason
AS_FOUND = ReadOptions()


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its reference captions."""

    image_path: str  # inside the image folder, with forward slashes; its cached features have the same path
    captions: tuple[str, ...]
    image_id: int  # COCO's id, or the index of the image in the annotations
    split: str = ""  # train, val or test; empty if it is not decided yet


def read_annotations(path: Path | str, options: ReadOptions = AS_FOUND) -> list[Example]:
    """Reads annotations, and logs their format and what of them is left out.

    Left out are captions that are missing, are not text, or have no word, and those that the format marks as unusable;
    and images without any other caption. Captions are brought to one form (`captioning.base.text.normalize_text`).

    Args:
        path: a file or a folder.
        options: how the user says that they are to be read.

    Returns:
        One example for each image, in the order of the file. Names are as in the file, but lead into the image folder.
        Only some formats set `split`.

    Raises:
        InputError: there is nothing at the path; it has none of the formats; it has no usable caption; or two images
            have the same id.
    """
    path = Path(path)
    format_name, parsed = parse_annotations(path, options)
    for note in parsed.notes[:NUM_NAMED]:
        log(note)
    if len(parsed.notes) > NUM_NAMED:
        log(f"{path}: {len(parsed.notes):,} such lines in all")
    rows = [_clean_row(row) for row in parsed.rows]
    used = [row for row in rows if not row.problem]
    if not used:
        reason = f"; the first: {_describe_row(rows[0])}" if rows else ""
        raise InputError(f"{path}: no usable caption in {len(rows)} rows ({format_name}){reason}")
    log_skipped(path, rows)
    examples = _group_by_image(used)
    _check_unique_ids(path, examples)
    details = f" ({parsed.details})" if parsed.details else ""
    log(f"{path}: {format_name}{details}: {len(used):,} captions of {len(examples):,} images")
    return examples


def log_skipped(path: Path, rows: Iterable[CaptionRow]) -> None:
    """Logs the rows that cannot be used: the first ones for every reason by name, and the number of the others."""
    counts: Counter[str] = Counter()
    for row in rows:
        if not row.problem:
            continue
        reason = re.sub(r"^(line|object) \d+ ", "", row.problem)  # the same mistake, whatever its line
        counts[reason] += 1
        if counts[reason] <= NUM_NAMED:
            log(f"skipped {path}: {_describe_row(row)}")
    for reason, count in counts.items():
        if count > NUM_NAMED:
            log(f"skipped {path}: {count - NUM_NAMED:,} more ({reason})")


def _describe_row(row: CaptionRow) -> str:
    """Describes a row that cannot be used."""
    return f"{row.problem}: {str(row.image_path)[:60]!r} {str(row.caption)[:60]!r}"


def _clean_row(row: CaptionRow) -> CaptionRow:
    """Brings the name and the caption of a row to one form, and notes why it cannot be used, if so."""
    if type(row.image_path) is int:  # a number without an ending
        row = row._replace(image_path=str(row.image_path))
    if row.problem:
        return row
    if row.caption is None or row.caption != row.caption:  # JSON's null, or NaN in a table that was saved as JSON
        return row._replace(problem="a caption that is null")
    if not isinstance(row.image_path, str) or not isinstance(row.caption, str):
        return row._replace(problem="an image or a caption that is not text")
    clean = row._replace(image_path=clean_name(row.image_path), caption=normalize_text(row.caption))
    problem = _find_problem(clean)
    return row._replace(problem=problem) if problem else clean


def _find_problem(row: CaptionRow) -> str:
    """Returns why a row in one form, whose name and caption are text, cannot be used; an empty text if it can."""
    if not row.image_path or "\x00" in row.image_path:
        return "an image without a name"
    if type(row.image_id) not in (int, str, type(None)):
        return f"an id that is neither a whole number nor text, {row.image_id!r}"
    if row.split not in ("", *SPLITS):
        return f"a split that is not train, restval, val or test, {row.split!r}"
    try:
        f"{row.image_path} {row.caption}".encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return "a name or a caption that is not Unicode text"
    return "" if re.search(r"[^\W_]", row.caption) else "a caption without a word"


# From rows to examples.


def _group_by_image(rows: Iterable[CaptionRow]) -> list[Example]:
    """Returns one example for each image, in the order of the rows."""
    captions: dict[str, list[str]] = {}
    metadata: dict[str, tuple[Any, str]] = {}  # image id and split
    contradicted = set()  # the images with rows of several splits
    for row in rows:
        if metadata.get(row.image_path, (None, row.split))[1] != row.split:
            contradicted.add(row.image_path)
        captions.setdefault(row.image_path, []).append(row.caption)
        metadata.setdefault(row.image_path, (row.image_id, row.split))
    if contradicted:
        first = min(contradicted)
        log(f"{len(contradicted):,} images have rows of two splits, and are in the first one, such as {first!r}")
    examples = []
    for index, (image_path, texts) in enumerate(captions.items()):
        image_id, split = metadata[image_path]
        examples.append(Example(image_path, tuple(texts), index if image_id is None else image_id, split))
    return examples


def rename_images(examples: Iterable[Example], rename: Callable[[str], str]) -> list[Example]:
    """Renames images; those that get the same name become one, with the captions of all and the split of the first."""
    merged: dict[str, Example] = {}
    for example in examples:
        image_path = rename(example.image_path)
        if first := merged.get(image_path):
            merged[image_path] = dataclasses.replace(first, captions=first.captions + example.captions)
        else:
            merged[image_path] = dataclasses.replace(example, image_path=image_path)
    return list(merged.values())


def _check_unique_ids(path: Path | str, examples: list[Example]) -> None:
    """Checks that no two images have the same id; 1 and "1" are the same."""
    image_paths: dict[str, str] = {}
    for example in examples:
        other = image_paths.setdefault(str(example.image_id), example.image_path)
        if other != example.image_path:
            raise InputError(f"{path}: {other} and {example.image_path} have the same id, {example.image_id}")
