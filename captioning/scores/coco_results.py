"""Reads captions that another program made, in the format of COCO's results and in others like it."""

import csv
import io
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from captioning.base.cli import InputError, advise, log
from captioning.base.text import normalize_text, strip_marks
from captioning.data.annotation_formats import read_content
from captioning.data.annotations import Example
from captioning.data.caption_rows import CAPTION_FIELDS, IMAGE_FIELDS
from captioning.data.text_formats import SEPARATORS
from captioning.images.image_names import clean_name, folders_agree


class ImageIndex:
    """Finds images by what results call them: a number is an id; a text is an id, or the image's path, name or stem.

    Leading zeros of an id do not count. Of a path, a name and a stem, the longest that fits decides.
    """

    def __init__(self, examples: Sequence[Example]):
        self.images: defaultdict[tuple[str, str], set[Example]] = defaultdict(set)
        for example in examples:
            path = PurePosixPath(example.image_path)
            self.images["id", _without_zeros(example.image_id)].add(example)
            self.images["path", str(path)].add(example)
            self.images["name", path.name].add(example)
            self.images["stem", path.stem].add(example)

    def find(self, image_id: int | str) -> Example | None:
        """Returns the image that an id or a name means, or None; raises InputError if it means several."""
        found = self.images.get(("id", _without_zeros(image_id)), set())
        if isinstance(image_id, str):
            path = clean_name(image_id)
            found = found | (self.images.get(("path", path)) or self._find_by_name(path))
        if len(found) > 1:
            first, second = sorted(f"{example.image_path} (id {example.image_id})" for example in found)[:2]
            raise InputError(
                f"image_id {image_id!r} means {len(found)} images, such as {first} and {second}; expected ids as "
                "numbers, or paths as the data have them" + advise("; ids of one --split, if those of others are equal")
            )
        return next(iter(found), None)

    def _find_by_name(self, path: str) -> set[Example]:
        """Finds images by the last part of a path, if their folders do not contradict the others."""
        for kind in ("name", "stem"):
            images = self.images.get((kind, path.rpartition("/")[2]), set())
            if found := {example for example in images if folders_agree(path, example.image_path)}:
                return found
        return set()


def result_ids(examples: Sequence[Example]) -> list[int] | list[str]:
    """Returns what results call images: their ids, or their paths if some have the same id, as those of two files."""
    ids = [example.image_id for example in examples]
    if len({str(image_id) for image_id in ids}) == len(ids):
        return ids
    log("images of different splits have the same ids: the captions are written with their paths instead")
    return [example.image_path for example in examples]


def _without_zeros(image_id: int | str) -> str:
    text = str(image_id)
    return text.lstrip("0") or text[-1:]


def read_results(path: Path, examples: Sequence[Example], all_examples: Sequence[Example] = ()) -> list[str]:
    """Reads the captions of some images from a file of results.

    Captions of other images of the data are left out; so are those of no image at all, which may be a mistake in the
    ids. Both are logged.

    Args:
        path: the file.
        examples: the images.
        all_examples: the images of all splits; by default `examples`.

    Returns:
        The caption of each image.

    Raises:
        InputError: it is not such a file; an image has no caption or two; or an id means several images.
    """
    rows = _read_rows(path)
    texts, note = strip_marks([normalize_text(caption) for _, caption in rows])
    if note:
        log(f"{path}: {note}")
    index, all_index = ImageIndex(examples), ImageIndex(all_examples)
    captions: dict[Example, str] = {}
    strangers = []
    for (image_id, _), caption in zip(rows, texts, strict=True):
        try:
            example = index.find(image_id) or all_index.find(image_id)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if example is None:
            strangers.append(image_id)
        elif example in captions:
            raise InputError(
                f"{path}: expected one caption for each image, found two of image_id {example.image_id} "
                f"({example.image_path}), the second as {image_id!r}"
            )
        else:
            captions[example] = caption

    no_image = ""
    if strangers:
        no_image = (
            f"{len(strangers):,} of its {len(rows):,} captions belong to no image of the data, the first with image_id "
            f"{strangers[0]!r}"
        )
    if missing := [example for example in examples if example not in captions]:
        reason = f"{no_image}; expected ids, paths or file names" if no_image else "are they of this --split?"
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} images, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image_path}); {reason}"
        )
    if no_image:
        log(f"{path}: {no_image}; left out")
    if num_others := len(captions) - len(examples):
        log(f"{path}: {num_others:,} captions of images of other splits are left out")
    return [captions[example] for example in examples]


def _read_rows(path: Path) -> list[tuple[int | str, str]]:
    """Reads the number or the name of each image, and its caption, in any of the forms that programs write."""
    content = read_content(path)
    if isinstance(content, str):
        content = _read_table(path, content)
    elif isinstance(content, dict) and "caption" not in content:
        content = [{"image_id": image_id, "caption": caption} for image_id, caption in content.items()]
    elif isinstance(content, dict):  # a single line
        content = [content]
    rows = [_read_row(row) for row in content]
    if not (rows and all(rows)):
        raise InputError(
            f'{path}: not COCO results; expected {{"image_id": ..., "caption": "..."}} in a list or one a line, a '
            "mapping of ids or names to captions, or a table with the columns image_id (or image) and caption; found "
            f"{str(content[rows.index(None)] if rows else content)[:60]!r}"
        )
    return [row for row in rows if row]


def _read_table(path: Path, text: str) -> list[dict[str, str]]:
    """Reads a table with a header, such as that of inference.py --csv, of which only the best captions count."""
    header = text.lstrip().partition("\n")[0]
    separator = next((char for char in SEPARATORS if char in header), ",")
    lines = csv.DictReader(io.StringIO(text.lstrip()), delimiter=separator, skipinitialspace=True, strict=True)
    try:
        rows = list(lines)
    except csv.Error as error:
        raise InputError(f"{path}: expected quotes in pairs, found others ({error})") from None
    if open_quotes := [row for row in rows if any("\n" in str(cell) for cell in row.values())]:
        first = str(list(open_quotes[0].values()))[:60]
        raise InputError(f"{path}: expected a row on each line, found one of several (is a quote left open?): {first}")
    if long := [row for row in rows if None in row]:
        raise InputError(
            f"{path}: expected {len(lines.fieldnames or ())} columns in each row, found more in {len(long):,}, the "
            f"first: {str(list(long[0].values())[:2])[:60]}; put quotes around a caption that holds the separator"
        )
    best = [row for row in rows if row.get("rank") in (None, "1")]
    if len(best) < len(rows):
        log(f"{path}: {len(rows) - len(best):,} captions that are not the first of their image are left out")
    return best


def _read_row(row: Any) -> tuple[int | str, str] | None:
    """Returns the number or the name of an image, and its caption; None if it is something else."""
    if not isinstance(row, dict):
        return None
    fields = {str(name).strip().lower(): value for name, value in row.items()}
    image_id, caption = (
        next((fields[name] for name in names if name in fields), None)
        for names in (("image_id", *IMAGE_FIELDS), CAPTION_FIELDS)
    )
    if isinstance(caption, list) and len(caption) == 1:
        caption = caption[0]
    if isinstance(image_id, bool) or not isinstance(image_id, int | str) or not isinstance(caption, str):
        return None
    try:
        f"{image_id} {caption}".encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return None
    return image_id, caption
