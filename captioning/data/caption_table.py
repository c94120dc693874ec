"""Reads captions from text in any encoding: tables with a header (CSV, TSV), and lines of a name and a caption.

The readers of other formats (`captioning.data.annotation_formats`) use the same rows and the same names of fields.
"""

import ast
import codecs
import csv
import dataclasses
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from captioning.base.cli import InputError, advise

# The usual names of fields and columns, in lower case; of several, the first one counts.
IMAGE_FIELDS = (
    *("image", "file_name", "filename", "filepath", "image_name", "image_path", "file", "path", "name"),
    "image_id",  # a name without its ending
)
CAPTION_FIELDS = ("caption", "text", "title", "comment", "captions", "sentences", "description", "sentence")
SPLIT_FIELDS = ("split", "set_name")
SPLIT_NAMES = {
    "train": ("train", "training", "restval"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing"),
}
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
IMAGE_SUFFIX = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif)"
MAX_CELL_LINES = 20  # of a caption in quotes; with more of them, the quote was left open
BINARY_SIGNATURES = (
    b"PAR1",
    b"PK\x03\x04",
    b"\x1f\x8b",
    b"Rar!",
    b"7z\xbc\xaf",
    b"\xd0\xcf\x11\xe0",
    b"%PDF",
    b"\x80\x04",
)
DOWNLOAD_ADVICE = (
    "expected names of files: download them, for example with img2dataset into a folder of images with .txt files, and "
    "name the folder"
)


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
    notes: list[str] = dataclasses.field(default_factory=list)  # what was repaired or ignored


# Fields.


class Fields(NamedTuple):
    """The names of the fields, or columns, that are used."""

    image: str
    caption: str
    split: str | None


def find_fields(names: Iterable[str], options: ReadOptions) -> Fields | None:
    """Returns which fields, or columns, hold images, captions and splits; None without one of the first two."""
    names = list(names)
    image = find_field(names, IMAGE_FIELDS, options.image_column)
    caption = find_field(names, CAPTION_FIELDS, options.caption_column)
    if image is None or caption is None or image == caption:
        return None
    return Fields(image, caption, find_field(names, SPLIT_FIELDS))


def find_field(names: Sequence[str], usual_names: Sequence[str], given: str | None = None) -> str | None:
    """Returns the given one of some names, or the first usual one, in any case; None if it is not there."""
    known = {name.strip().lower(): name for name in reversed(names)}
    candidates = [given.strip().lower()] if given is not None else usual_names
    return next((known[name] for name in candidates if name in known), None)


def describe_fields(options: ReadOptions) -> str:
    """Returns which names of fields are expected, and how to name others, for a message."""
    image = options.image_column or ", ".join(IMAGE_FIELDS[:5])
    caption = options.caption_column or ", ".join(CAPTION_FIELDS[:4])
    return f"images in {image} and captions in {caption}" + advise(
        "; name others with --image-column and --caption-column, and an unusual --separator"
    )


def parse_split(value: Any) -> str | None:
    """Returns train, val or test for the name of a split; an empty text for none, and None for anything else."""
    if value is None or not str(value).strip():
        return ""
    name = str(value).strip().lower()
    return next((split for split, names in SPLIT_NAMES.items() if name in names), None)


def parse_splits(parsed: Parsed, where: str) -> None:
    """Parses the splits of all rows; removes them if one is not the name of a split, but for example of a fold."""
    splits = [parse_split(row.split) for row in parsed.rows]
    if None in splits:
        found = parsed.rows[splits.index(None)].split
        parsed.notes.append(f"{where} ignored: {found!r} is not a split name")
        splits = [""] * len(splits)
    parsed.rows = [row._replace(split=split) for row, split in zip(parsed.rows, splits, strict=True)]


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
    if content.startswith(BINARY_SIGNATURES) or content[257:262] == b"ustar":
        raise InputError(
            f"{path}: expected text, found a binary file (Parquet, a spreadsheet, an archive, a PDF or a pickle); save "
            "its table as CSV, or unpack it and name what is inside"
        )
    name = encoding or _find_encoding(content)
    advice = "save it as UTF-8" + advise(", or name its --encoding, such as windows-1252 (Excel's), gbk or utf-16-le")
    try:
        text = content.decode(name)
    except UnicodeDecodeError as error:
        where = f"{error.reason} at byte {error.start}"
        raise InputError(f"{path}: expected text in {name.upper()} ({where}); {advice}") from None
    except (LookupError, ValueError):
        raise InputError(f"--encoding {encoding}: no such encoding; expected a name such as windows-1252") from None
    if text.count("\x00") > len(text) / 8:  # UTF-16 without a mark
        raise InputError(f"{path}: expected text in {name.upper()}, found zeros; {advice}")
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


def _find_encoding(content: bytes) -> str:
    """Returns the encoding that a mark at the beginning of a file names; UTF-8 without a mark."""
    if content.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "utf-32"
    return "utf-16" if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "utf-8"


def first_line(text: str) -> str:
    """Returns the first line that is not empty."""
    return text.lstrip("\n").split("\n", 1)[0]


# Tables.


class Dialect(NamedTuple):
    """How a table is written."""

    separator: str
    has_spaces: bool = False  # whether a space follows the separators


class Line(NamedTuple):
    """A row of a table."""

    number: int  # of its last line in the file, from 1
    fields: list[str]


def find_dialect(content: str, options: ReadOptions) -> Dialect | None:
    """Returns how a table with a header is written; None if its first line is no header with the two columns.

    Raises:
        InputError: the separator of the options is not one character.
    """
    header = first_line(content)
    for separator in [parse_separator(options.separator)] if options.separator else SEPARATORS:
        dialect = Dialect(separator, f"{separator} " in header)
        try:
            names = next(csv.reader([header], delimiter=separator, skipinitialspace=dialect.has_spaces), [])
        except csv.Error:
            continue
        if find_fields(names, options):
            return dialect
    return None


def parse_separator(text: str) -> str:
    """Returns the character that --separator names; raises InputError if it names none."""
    separator = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|"}.get(text, text)
    if len(separator) != 1 or separator in '\r\n"':
        raise InputError(f"--separator: expected one character, or tab, found {text!r}")
    return separator


def parse_lines(path: Path | str, content: str, dialect: Dialect, quoting: Literal[0, 3] = 0) -> Iterator[Line]:
    """Parses a table, without its empty lines.

    Raises:
        InputError: it cannot be parsed, or a quote is left open.
    """
    separator = re.escape(dialect.separator)
    # An open quote joins the lines after it: one that begins like a row of its own, or very many.
    next_row = rf"\n[^{separator}\n]*{IMAGE_SUFFIX}\"?\s*{separator}"
    joined = re.compile(rf"{next_row}|(\n.*){{{MAX_CELL_LINES}}}", re.IGNORECASE)
    reader = csv.reader(
        io.StringIO(content),
        delimiter=dialect.separator,
        skipinitialspace=dialect.has_spaces,
        quoting=quoting,
    )
    try:
        for fields in reader:
            if joined.search(dialect.separator.join(fields)):
                raise InputError(
                    f"{path}: the caption of {fields[0][:60]!r} runs over other lines, to line {reader.line_num}; "
                    "close its quote"
                )
            if "".join(fields).strip():
                yield Line(reader.line_num, fields)
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV that can be read ({error}); is a quote left open?") from None


def is_table(content: Any, options: ReadOptions) -> bool:
    """Tells whether content is a table whose header has columns for images and captions."""
    return isinstance(content, str) and find_dialect(content, options) is not None


def read_table(path: Path | str, content: str, options: ReadOptions) -> Parsed:
    """Reads a table with a header. Columns other than those of image, caption and split are left out.

    Raises:
        InputError: see `parse_lines`.
    """
    dialect = find_dialect(content, options)
    assert dialect is not None, "the format has matched"
    notes = []
    try:
        header, *lines = parse_lines(path, content, dialect)
    except InputError:
        if dialect.separator != "\t":
            raise
        header, *lines = parse_lines(path, content, dialect, csv.QUOTE_NONE)  # in TSV quotes need not be a pair
        notes.append(f"{path}: quotes are part of the captions, since one of them is left open")
    names = [name.strip().strip('"') for name in header.fields]  # quotes are kept where one of them is left open
    columns = find_fields(names, options)
    assert columns is not None, "the format has matched"
    image, caption = names.index(columns.image), names.index(columns.caption)
    split = None if columns.split is None else names.index(columns.split)
    separator = SEPARATORS.get(dialect.separator, dialect.separator)
    used = ", ".join(filter(None, columns))
    parsed = Parsed([], f"columns {used}, separated by {separator}", notes)
    for number, found in lines:
        fields = _fit_to_header(found, len(names), caption, dialect)
        if len(fields) != len(names):
            problem = f"line {number} has {len(fields)} columns, expected {len(names)}"
            parsed.rows.append(CaptionRow(fields[0], "", problem=problem))
            continue
        if len(fields) > len(found):
            row = f"{fields[image].strip()!r} {fields[caption][:60]!r}"
            notes.append(f"{path}, line {number}: a separator is missing, repaired: {row}")
        for text in _parse_cell(fields[caption]):
            parsed.rows.append(CaptionRow(fields[image], text, split="" if split is None else fields[split]))
    parse_splits(parsed, f"{path}: column {columns.split}")
    name = next((row.image_path for row in parsed.rows if not row.problem), "")
    if re.match(r"\s*https?://", name):
        raise InputError(f"{path}: its images are addresses, the first {name[:60]!r}; {DOWNLOAD_ADVICE}")
    return parsed


def _fit_to_header(fields: list[str], num_columns: int, caption: int, dialect: Dialect) -> list[str]:
    """Fits the fields of a row to the number of columns, if it is clear how.

    Separators inside a caption without quotes make more fields, which belong together. Flickr30k's results.csv has a
    row that lacks the separator between the number of the comment and the comment.
    """
    while len(fields) > num_columns and not fields[-1].strip():
        fields = fields[:-1]
    if num_extra := max(0, len(fields) - num_columns):
        end = caption + num_extra + 1
        text = (dialect.separator + " " * dialect.has_spaces).join(fields[caption:end])
        return [*fields[:caption], text, *fields[end:]]
    if len(fields) == num_columns - 1 == caption and (match := re.fullmatch(r"\s*(\d+)\s+(\D.*)", fields[-1])):
        return [*fields[:-1], match[1], match[2]]
    return fields


def _parse_cell(cell: str) -> list[str]:
    """Returns the captions of a cell: one, or those of a list that pandas or datasets wrote as text."""
    if not re.fullmatch(r"\s*\[\s*['\"].*['\"]\s*\]\s*", cell, re.DOTALL):
        return [cell]
    try:
        texts = ast.literal_eval(cell.strip())  # reads constants only, nothing is run
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return texts if all(isinstance(text, str) for text in texts) else [cell]


# Without a header.


def is_headerless(content: Any, options: ReadOptions) -> bool:
    """Tells whether content is lines of a name and a caption: `a.jpg,a dog`, or `a1<TAB>a dog` as ROCO has it."""
    if not isinstance(content, str) or options.image_column or options.caption_column or options.separator:
        return False
    name, separator, caption = _split_first(content)
    if not caption.strip() or re.match(r"\s*https?://", caption):
        return False
    # A name without an ending has a number, which tells it from the header of a column.
    is_bare_name = separator == "\t" and re.fullmatch(r"\S*\d\S*", name) is not None
    return is_bare_name or re.search(f"{IMAGE_SUFFIX}$", name, re.IGNORECASE) is not None


def _split_first(content: str) -> tuple[str, str, str]:
    """Splits the first line at its first tab, or else at its first comma, semicolon or bar."""
    line = first_line(content)
    separator = "\t" if "\t" in line else next((char for char in line if char in SEPARATORS), "\t")
    name, _, caption = line.partition(separator)
    return name.strip().strip('"'), separator, caption


def read_headerless(path: Path | str, content: str, options: ReadOptions) -> Parsed:
    """Reads lines of an image's name and a caption.

    Raises:
        InputError: see `parse_lines`.
    """
    _, separator, _ = _split_first(content)
    parsed = Parsed([], f"name and caption, separated by {SEPARATORS[separator]}, without a header")
    for line in parse_lines(path, content, Dialect(separator)):
        name, *rest = line.fields
        problem = "" if rest else f"line {line.number} has no {SEPARATORS[separator]}"
        parsed.rows.append(CaptionRow(name, separator.join(rest), problem=problem))
    return parsed
