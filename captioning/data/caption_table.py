"""Reads captions from tables: CSV and TSV with a header, and lines of a name and a caption without one."""

import ast
import csv
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

from captioning.base.cli import InputError
from captioning.data.caption_rows import (
    CAPTION_FIELDS,
    IMAGE_FIELDS,
    SPLIT_FIELDS,
    CaptionRow,
    Parsed,
    ReadOptions,
    describe_fields,
    find_field,
    first_line,
    parse_splits,
)

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
DOWNLOAD_ADVICE = (
    "expected names of files: download them, for example with img2dataset into a folder of images with .txt files, and "
    "name the folder"
)
IMAGE_SUFFIX = r"\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|heif|avif)"
IMAGE_NAME = re.compile(rf"[^\n]*{IMAGE_SUFFIX}", re.IGNORECASE)
MAX_CELL_LINES = 20


class Line(NamedTuple):
    """A row of a table."""

    number: int  # of its last line in the file, from 1
    fields: list[str]


class Dialect(NamedTuple):
    """How a table is written."""

    separator: str
    has_spaces: bool  # whether a space follows the separators


def parse_lines(
    path: Path | str, content: str, dialect: Dialect, quoting: Literal[0, 3] = csv.QUOTE_MINIMAL
) -> Iterator[Line]:
    """Parses a table, without its empty lines.

    Raises:
        InputError: it cannot be parsed, or a quote is left open.
    """
    separator = re.escape(dialect.separator)
    # An open quote joins the lines after it: one that begins like a row of its own, or very many.
    joined = re.compile(
        rf"\n[^{separator}\n]*{IMAGE_SUFFIX}\"?\s*{separator}|(\n.*){{{MAX_CELL_LINES}}}", re.IGNORECASE
    )
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


def find_dialect(content: str, options: ReadOptions) -> Dialect | None:
    """Returns how a table with a header is written; None if its first line is no header with the two columns.

    Raises:
        InputError: the separator of the options is not one character.
    """
    header = content.lstrip("\n").split("\n", 1)[0]
    for separator in [parse_separator(options.separator)] if options.separator else SEPARATORS:
        dialect = Dialect(separator, f"{separator} " in header)
        try:
            names = next(csv.reader([header], delimiter=separator, skipinitialspace=dialect.has_spaces), [])
        except csv.Error:
            continue
        if find_columns(names, options):
            return dialect
    return None


def find_columns(names: list[str], options: ReadOptions) -> tuple[int, int] | None:
    """Returns the numbers of the columns with images and with captions in a header; None if it lacks one of them."""
    image = find_field(names, IMAGE_FIELDS, options.image_column)
    caption = find_field(names, CAPTION_FIELDS, options.caption_column)
    if image is None or caption is None or image == caption:
        return None
    return names.index(image), names.index(caption)


def parse_separator(text: str) -> str:
    """Returns the character that --separator names; raises InputError if it names none."""
    separator = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|"}.get(text, text)
    if len(separator) != 1 or separator in '\r\n"':
        raise InputError(f"--separator: expected one character, or tab, found {text!r}")
    return separator


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
    columns = find_columns(names, options)
    assert columns is not None, "the format has matched"
    image, caption = columns
    split_name = find_field(names, SPLIT_FIELDS)
    split = names.index(split_name) if split_name else None
    splits = [""] * len(lines)
    if split is not None:
        values = [line.fields[split] if len(line.fields) > split else "" for line in lines]
        splits, unused = parse_splits(values, f"{path}: the column {split_name}")
        notes += unused
        split = split if any(splits) else None
    used = [names[i].strip() for i in (image, caption, split) if i is not None]
    separator = SEPARATORS.get(dialect.separator, dialect.separator)
    parsed = Parsed([], f"columns {', '.join(used)}, separated by {separator}", notes)
    for line, in_split in zip(lines, splits, strict=True):
        fields, note = _fit_to_header(line.fields, len(names), caption, dialect)
        if len(fields) != len(names):
            problem = f"line {line.number} has {len(fields)} columns, expected {len(names)}"
            parsed.rows.append(CaptionRow(line.fields[0], "", problem=problem))
            continue
        if note:
            found = f"{fields[image].strip()!r} {fields[caption][:60]!r}"
            parsed.notes.append(f"{path}, line {line.number}: {note}: {found}")
        for text in _parse_cell(fields[caption]):
            parsed.rows.append(CaptionRow(fields[image], text, split=in_split))
    _refuse_addresses(path, parsed.rows)
    return parsed


def _parse_cell(cell: str) -> list[str]:
    """Returns the captions of a cell: one, or those of a list that pandas or datasets wrote as text."""
    if not re.fullmatch(r"\s*\[\s*['\"].*['\"]\s*\]\s*", cell, re.DOTALL):
        return [cell]
    try:
        texts = ast.literal_eval(cell.strip())  # reads constants only, nothing is run
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return [cell]
    return texts if isinstance(texts, list) and all(isinstance(text, str) for text in texts) else [cell]


def _fit_to_header(fields: list[str], num_columns: int, caption: int, dialect: Dialect) -> tuple[list[str], str]:
    """Fits the fields of a row to the number of columns, if it is clear how.

    Unquoted separators inside a caption make more fields; they belong together. Flickr30k's results.csv has one row
    that lacks the separator between the number of the comment and the comment.

    Returns:
        The fields, and what was repaired, if anything.
    """
    fields = list(fields)
    while len(fields) > num_columns and not fields[-1].strip():
        fields.pop()
    num_extra = len(fields) - num_columns
    if num_extra > 0:
        separator = dialect.separator + " " * dialect.has_spaces
        fields[caption : caption + num_extra + 1] = [separator.join(fields[caption : caption + num_extra + 1])]
    elif num_extra == -1 and caption == num_columns - 1 and (match := re.fullmatch(r"\s*(\d+)\s+(\D.*)", fields[-1])):
        return [*fields[:-1], match[1], match[2]], "a separator is missing, repaired"
    return fields, ""


def _refuse_addresses(path: Path | str, rows: list[CaptionRow]) -> None:
    """Refuses a table whose images are addresses; raises InputError."""
    name = next((row.image_path for row in rows if not row.problem), "")
    if re.match(r"\s*https?://", name):
        raise InputError(f"{path}: its images are addresses, the first {name[:60]!r}; {DOWNLOAD_ADVICE}")


# Without a header.


def has_headerless_rows(content: str, options: ReadOptions) -> bool:
    """Tells whether text is lines of an image's name and a caption: `a.jpg,a dog`, or `a<TAB>a dog` as ROCO has it."""
    if options.image_column or options.caption_column or options.separator:
        return False
    name, separator, caption = _split_first(content.lstrip("\n").split("\n", 1)[0])
    if not caption.strip() or re.match(r"\s*https?://", caption):
        return False
    # A name without an ending has a number, which tells it from the header of a column.
    is_bare_name = separator == "\t" and re.fullmatch(r"\S*\d\S*", name) is not None
    return is_bare_name or IMAGE_NAME.fullmatch(name) is not None


def _split_first(line: str) -> tuple[str, str, str]:
    """Splits a line at its first tab, or else at its first comma, semicolon or bar."""
    separator = "\t" if "\t" in line else next((s for s in line if s in SEPARATORS), "")
    name, _, caption = line.partition(separator) if separator else (line, "", "")
    return name.strip().strip('"'), separator, caption


def read_headerless(path: Path | str, content: str, options: ReadOptions) -> Parsed:
    """Reads lines of an image's name and a caption.

    Raises:
        InputError: see `parse_lines`.
    """
    separator = _split_first(content.lstrip("\n").split("\n", 1)[0])[1]
    parsed = Parsed([], f"name and caption, separated by {SEPARATORS[separator]}, without a header")
    for line in parse_lines(path, content, Dialect(separator, False)):
        name, *rest = line.fields
        problem = "" if rest else f"line {line.number} has no {SEPARATORS[separator]}"
        parsed.rows.append(CaptionRow(name, separator.join(rest), problem=problem))
    return parsed


def describe_unknown(path: Path | str, content: str, options: ReadOptions) -> str:
    """Says why text has none of the formats, and what to do."""
    if re.search(r"https?://", content[:1000]):
        return f"{path}: it has addresses of images, the first line is {first_line(content)!r}; {DOWNLOAD_ADVICE}"
    return (
        f"{path}: not a known annotation format (docs/data.md shows them); if it is a table, its header should have "
        f"{describe_fields(options)}; its first line is {first_line(content)!r}"
    )
