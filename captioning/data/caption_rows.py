"""Rows of annotations as a file has them, and the columns and fields that they are found in."""

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any, NamedTuple

# The usual names of columns and fields, in lower case; of several, the first one counts. Captions may be numbered.
IMAGE_FIELDS = (
    *("image", "file_name", "filename", "filepath", "image_name", "image_path", "file", "path", "name"),
    "image_id",  # a name without its ending
)
CAPTION_FIELDS = (
    *("caption", "text", "captions", "sentences", "description", "sentence"),
    "caption_str",  # TextCaps
    "report",  # R2Gen
    *("title", "comment"),  # often of something else than what is seen
)
SPLIT_FIELDS = ("split", "set_name")
SPLIT_NAMES = {
    **dict.fromkeys(("train", "training", "restval"), "train"),
    **dict.fromkeys(("val", "valid", "validation", "dev"), "val"),
    **dict.fromkeys(("test", "testing"), "test"),
}


class ReadOptions(NamedTuple):
    """How the user wants annotations to be read; None: as found."""

    image_column: str | None = None
    caption_column: str | None = None
    separator: str | None = None
    encoding: str | None = None


class CaptionRow(NamedTuple):
    """A caption as the file has it, before any check."""

    image_path: Any
    caption: Any
    image_id: Any = None
    split: Any = ""
    problem: str = ""  # why it cannot be used, if the reader knows already


class Parsed(NamedTuple):
    """What a reader found."""

    rows: list[CaptionRow]
    details: str = ""  # how it was read, such as the names of the columns


def parse_split(name: Any) -> str:
    """Returns train, val or test for any usual name of a split, and an empty text for anything else."""
    return SPLIT_NAMES.get(str(name).strip().lower(), "")


# Columns and fields.


class Fields(NamedTuple):
    """The names of the columns or fields that are used."""

    image: str
    captions: tuple[str, ...]
    split: str | None
    unused: tuple[str, ...]

    def describe(self) -> tuple[str, str]:
        """Returns the names that are used, and a note with the others."""
        used = ", ".join(filter(None, (self.image, *self.captions, self.split)))
        return used, f"; not used: {', '.join(self.unused)}" if self.unused else ""


def find_fields(names: Iterable[str], options: ReadOptions) -> Fields | None:
    """Returns which columns or fields hold images, captions and splits; None without one of the first two.

    Captions may be in several: caption_1, caption_2 and so on, or columns of the same name.
    """
    names = list(dict.fromkeys(names))
    known: defaultdict[str, list[str]] = defaultdict(list)
    numbered: defaultdict[str, list[str]] = defaultdict(list)  # by their names without the number
    for name in names:
        key = name.strip().lower()
        known[key].append(name)
        numbered[re.sub(r"[ _.#-]?\d+$", "", key)].append(name)

    def find(among: dict[str, list[str]], usual_names: tuple[str, ...], given: str | None = None) -> list[str]:
        if given is not None:
            return known.get(given.strip().lower(), [])
        return next((among[name] for name in usual_names if name in among), [])

    image = find(known, IMAGE_FIELDS, options.image_column)[:1]
    captions = find(numbered, CAPTION_FIELDS, options.caption_column)
    split = find(known, SPLIT_FIELDS)[:1]
    if not (image and captions):
        return None
    unused = [name for name in names if name.strip() and name not in (*image, *captions, *split)]
    return Fields(image[0], tuple(captions), next(iter(split), None), tuple(unused))


def drop_empty(values: list[Any]) -> list[Any]:
    """Returns the values of several columns without those that are empty, of which one stays if there is no other."""
    return [value for value in values if str(value or "").strip()] or values[:1]
