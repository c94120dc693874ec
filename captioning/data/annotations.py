"""Annotations: images and their captions, from a file or a folder in any format of `annotation_formats`."""

import dataclasses
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from captioning.base.cli import InputError, log
from captioning.base.text import CONTROLS, normalize_text, strip_marks
from captioning.data.annotation_formats import parse_annotations
from captioning.data.caption_rows import CaptionRow, ReadOptions, parse_split
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

    Left out are captions that are not text or have no word, and those that the format marks as unusable; and images
    without any other caption. Captions are brought to one form (`captioning.base.text.normalize_text`), without the
    marks of their start and end that most of them have.

    Args:
        path: a file or a folder.
        options: how the user wants them to be read.

    Returns:
        One example for each image, in the order of the file. Names are as in the file, but lead into the image folder.
        Only some formats set `split`.

    Raises:
        InputError: there is nothing at the path; it has none of the formats; it has no usable caption; or a split that
            is none of the usual names, among others that are.
    """
    path = Path(path)
    format_name, parsed = parse_annotations(path, options)
    if num_changed := sum(bool(CONTROLS.search(str(row.caption))) for row in parsed.rows):
        log(f"{path}: control characters are taken out of {num_changed:,} captions")
    rows = _strip_marks(path, [_clean_row(row) for row in parsed.rows])
    used = [row for row in rows if not row.problem]
    if not used:
        reason = f"; the first: {_describe_problem(rows[0])}" if rows else ""
        raise InputError(f"{path}: no usable caption in {len(rows)} rows ({format_name}){reason}")
    _check_splits(path, used)
    _log_problems(path, rows)
    examples = _group_by_image(used)
    details = f" ({parsed.details})" if parsed.details else ""
    log(f"{path}: {format_name}{details}: {len(used):,} captions of {len(examples):,} images")
    return examples


def _clean_row(row: CaptionRow) -> CaptionRow:
    """Brings the name and the caption of a row to one form, or notes why the row cannot be used."""
    if row.problem:
        return row
    name = str(row.image_path) if type(row.image_path) is int else row.image_path  # a number without an ending
    if not isinstance(name, str) or not isinstance(row.caption, str):
        return row._replace(problem="an image or a caption that is not text")
    clean = row._replace(image_path=clean_name(name), caption=normalize_text(row.caption))
    try:
        f"{clean.image_path} {clean.caption}".encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return row._replace(problem="a name or a caption that is not Unicode text")
    if not clean.image_path:
        return row._replace(problem="an image without a name")
    if CONTROLS.search(clean.image_path):
        return row._replace(problem="a name with control characters")
    if type(row.image_id) not in (int, str, type(None)):
        return row._replace(problem=f"an id that is neither a whole number nor text, {row.image_id!r}")
    return clean


def _strip_marks(path: Path, rows: list[CaptionRow]) -> list[CaptionRow]:
    """Takes off the marks around captions, and notes which captions have no word."""
    captions, note = strip_marks([row.caption for row in rows if not row.problem])
    if note:
        log(f"{path}: {note}")
    texts = iter(captions)
    rows = [row if row.problem else row._replace(caption=next(texts)) for row in rows]
    no_word = "a caption without a word"
    return [row if row.problem or re.search(r"[^\W_]", row.caption) else row._replace(problem=no_word) for row in rows]


def _describe_problem(row: CaptionRow) -> str:
    return f"{row.problem}: {str(row.image_path)[:60]!r} {str(row.caption)[:60]!r}"


def _log_problems(path: Path, rows: Iterable[CaptionRow]) -> None:
    """Logs what cannot be used: for every reason the first rows, and the number of the others."""
    rows_of: defaultdict[str, list[CaptionRow]] = defaultdict(list)
    for row in rows:
        if row.problem:
            rows_of[row.problem].append(row)
    for problem, skipped in rows_of.items():
        for row in skipped[:NUM_NAMED]:
            log(f"skipped {path}: {_describe_problem(row)}")
        if len(skipped) > NUM_NAMED:
            log(f"skipped {path}: {len(skipped) - NUM_NAMED:,} more ({problem})")


def _check_splits(path: Path, rows: list[CaptionRow]) -> None:
    """Raises InputError if some splits are known and another is not; logs it if none is known."""
    unknown = Counter(str(row.split) for row in rows if row.split and not parse_split(row.split))
    if not unknown:
        return
    name, count = unknown.most_common(1)[0]
    if any(parse_split(row.split) for row in rows):
        # It may be mistyped. Without these images, or with another split of all, scores would mean something else.
        raise InputError(
            f"{path}: expected train, val or test as the split, found {name!r} in {count:,} of {len(rows):,} rows"
        )
    log(f"{path}: the split {name!r} is ignored; expected train, val or test")


def _group_by_image(rows: Iterable[CaptionRow]) -> list[Example]:
    """Returns one example for each image, in the order of the rows; its first row decides its id and its split."""
    rows_of: defaultdict[str, list[CaptionRow]] = defaultdict(list)
    for row in rows:
        rows_of[row.image_path].append(row)
    contradicted = [name for name, group in rows_of.items() if len({parse_split(row.split) for row in group}) > 1]
    if contradicted:
        first = contradicted[0]
        log(f"{len(contradicted):,} images have rows of two splits, and are in the first one, such as {first!r}")
    # Without ids in the file, results mean images by the numbers that are their names, if they are.
    numbers = [
        int(stem) for stem in (PurePosixPath(name).stem for name in rows_of) if re.fullmatch("[0-9]{1,18}", stem)
    ]
    are_ids = len(set(numbers)) == len(rows_of) and all(group[0].image_id is None for group in rows_of.values())
    examples = []
    for index, (name, group) in enumerate(rows_of.items()):
        invented = numbers[index] if are_ids else index
        image_id = invented if group[0].image_id is None else group[0].image_id
        captions = tuple(row.caption for row in group)
        examples.append(Example(name, captions, image_id, parse_split(group[0].split)))
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
