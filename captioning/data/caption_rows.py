"""What the readers of all annotation formats share: rows, the usual names of fields, and text in any encoding."""

import codecs
import dataclasses
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from captioning.base.cli import InputError, advise

# The usual names of fields and columns, in lower case; of several, the first one counts.
IMAGE_FIELDS = ("image", "file_name", "filename", "filepath", "image_name", "image_path", "file", "path", "name")
CAPTION_FIELDS = ("caption", "text", "title", "comment", "captions", "sentences", "description", "sentence")
SPLIT_FIELDS = ("split", "set_name")
# What splits are called elsewhere.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "restval": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}


class ReadOptions(NamedTuple):
    """How the user says that annotations are to be read; None: as found."""

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


@dataclasses.dataclass
class Parsed:
    """What a reader found."""

    rows: list[CaptionRow]
    details: str = ""  # how it was read, such as the names of the columns
    notes: list[str] = dataclasses.field(default_factory=list)  # what was repaired


def find_field(names: Iterable[str], usual_names: Sequence[str], given: str | None = None) -> str | None:
    """Returns the name of a field or column: the given one, else the first usual one; None if there is none of them."""
    known = {name.strip().lower(): name for name in reversed(list(names))}
    candidates = [given.strip().lower()] if given is not None else usual_names
    return next((known[name] for name in candidates if name in known), None)


def parse_split(value: Any) -> str | None:
    """Returns train, val or test for what a split is called; empty if there is none, None for anything else."""
    name = value.strip().lower() if isinstance(value, str) else value
    return "" if name in ("", None) else SPLIT_NAMES.get(name) if isinstance(name, str) else None


def parse_splits(values: Sequence[Any], where: str) -> tuple[list[str], list[str]]:
    """Parses the splits of all rows of a column or field.

    Returns:
        The splits, and a note; all are empty, with a note, if a value is none, such as the number of a fold.
    """
    splits = [parse_split(value) for value in values]
    if None in splits:
        return [""] * len(splits), [f"{where} is not used: {values[splits.index(None)]!r} is no split"]
    return [split or "" for split in splits], []


def describe_fields(options: ReadOptions) -> str:
    """Says which names of fields are expected, and how to name others."""
    image = options.image_column or ", ".join(IMAGE_FIELDS[:5])
    caption = options.caption_column or ", ".join(CAPTION_FIELDS[:4])
    return f"images in {image} and captions in {caption}" + advise(
        "; name others with --image-column and --caption-column, and an unusual --separator"
    )


# Text.


def read_text(path: Path | str, encoding: str | None = None) -> str:
    """Reads a text file in UTF-8 with or without a mark, in UTF-16 or UTF-32 with a mark, or in a given encoding.

    Returns:
        The text, without the mark, with lines that end in a line feed.

    Raises:
        InputError: there is no such file, it is in another encoding, there is no such encoding, or it is no text.
    """
    try:
        content = Path(path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise InputError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # a folder, a file without permission, a name with a NUL
        raise InputError(f"{path}: cannot be read ({error})") from None
    if reason := _describe_binary(content):
        raise InputError(f"{path}: {reason}")
    name = encoding or _find_encoding(content)
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        advice = _describe_other_encoding(content) if encoding is None else "choose another encoding"
        where = f"{error.reason} at byte {error.start}"
        raise InputError(f"{path}: expected text in {name.upper()} ({where}); {advice}") from None
    except (LookupError, ValueError):
        raise InputError(f"--encoding {encoding}: no such encoding; expected a name such as windows-1252") from None
    if encoding is None and text.count("\x00") > len(text) / 8:
        raise InputError(f"{path}: {_describe_other_encoding(content)}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _find_encoding(content: bytes) -> str:
    """Returns the encoding that a mark at the beginning of a file names; UTF-8 without a mark."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"


def _describe_other_encoding(content: bytes) -> str:
    """Says which encoding a file that is not UTF-8 seems to have."""
    if content[1::2].count(0) > len(content) / 8 or content[::2].count(0) > len(content) / 8:
        name = "utf-16-le" if content[1::2].count(0) > content[::2].count(0) else "utf-16-be"
        return "it looks like UTF-16 without a mark: save it as UTF-8" + advise(f", or give --encoding {name}")
    if sum(byte >= 0x80 for byte in content[:100_000]) > len(content[:100_000]) / 5:
        return "save it as UTF-8" + advise(", or name its --encoding, such as gbk, shift_jis or windows-1251")
    looks_like = "it looks like Windows-1252, as Excel writes it: save it as UTF-8"
    return looks_like + advise(", or give --encoding windows-1252")


def _describe_binary(content: bytes) -> str | None:
    """Returns what to do with a file that is no text at all, or None."""
    if content.startswith(b"PAR1"):
        return "a Parquet file; expected text: save its table as CSV (pandas: read_parquet, then to_csv)"
    if content.startswith((b"PK\x03\x04", b"\x1f\x8b", b"Rar!", b"7z\xbc\xaf")) or content[257:262] == b"ustar":
        return "an archive or a spreadsheet; expected text: unpack it and name what is inside, or save it as CSV"
    if content.startswith((b"\xd0\xcf\x11\xe0", b"%PDF", b"\x80\x04", b"\x80\x05")):
        return "an old spreadsheet, a PDF or a pickle; expected text: save its table as CSV"
    return None


def first_line(text: str) -> str:
    """Returns the beginning of the first line, for a message."""
    return re.split(r"[\n\x00]", text.lstrip(), maxsplit=1)[0][:60]
