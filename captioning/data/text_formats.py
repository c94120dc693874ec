"""The formats of annotations in lines of text and in tables, each with its reader; see `annotation_formats`."""

import ast
import contextlib
import csv
import io
import re
import tokenize
from typing import Any

from captioning.base.cli import InputError
from captioning.data.caption_rows import CaptionRow, Fields, Parsed, ReadOptions, drop_empty, find_fields, parse_split
from captioning.images.reading import is_image_file

SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
NUMBER = re.compile(r"\s*[\d.:/-]+\s*")
CODE_NAME = re.compile(r"(?=\S*\d)[\w.-]+_[\w.-]+")  # of an image, such as 1000268201_693b08cb0e
BARE_NAME = re.compile(r"(?=\S*\d)\S+")  # of an image, without an ending
# name#0<TAB>caption; Flickr8k-CN has name#zhc#0 and a space.
TOKEN_LINE = re.compile(r"([^\t\n]+?\.\w+)(?:#[a-z]+)?#\d+[\t ](.*)")


def read_token_file(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads lines of `name#0<TAB>caption`, as Flickr8k, Flickr30k and Flickr8k-CN have them."""
    if not (isinstance(content, str) and TOKEN_LINE.match(content.lstrip("\n"))):
        return None
    rows = []
    for line in filter(str.strip, content.split("\n")):
        match = TOKEN_LINE.fullmatch(line)
        rows.append(CaptionRow(*match.groups()) if match else CaptionRow(line, "", problem="not name#0<TAB>caption"))
    return Parsed(rows)


def read_table(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads a table with a header. Columns other than those of image, caption and split are ignored."""
    if not isinstance(content, str):
        return None
    header = _first_line(content)
    for separator in [parse_separator(options.separator)] if options.separator else SEPARATORS:
        names = [name.strip().strip('"') for name in next(csv.reader([header], delimiter=separator))]
        columns = find_fields(names, options)
        if columns:
            break
    else:
        return None
    joint = f"{separator} " if f"{separator} " in header else separator
    image = names.index(columns.image)
    in_columns = [i for i, name in enumerate(names) if name in columns.captions]
    lines, repairs = _split_lines(content, joint, image)
    rows, num_joined = [], 0
    for line in lines[1:]:
        if len(line) > len(names) and (joined := _join_caption(line, names, columns, joint)):
            line = joined
            num_joined += 1
        elif len(line) == len(names) - 1 and (match := re.fullmatch(r"\s*(\d+)\s+(\D.*)", line[-1])):
            # Flickr30k's results.csv has one such row: "name| 4   A dog runs ."
            line[-1:] = match.groups()
            repairs += f"; the separator that a row of {line[0]!r} lacks was added"
        if len(line) != len(names):
            rows.append(CaptionRow(line[0], "", problem=f"{len(line)} columns, expected {len(names)}"))
            continue
        split = line[names.index(columns.split)] if columns.split else ""
        captions = [text for cell in drop_empty([line[i] for i in in_columns]) for text in _parse_cell(cell)]
        rows += [CaptionRow(line[image], text, split=split) for text in captions]
    used, unused = columns.describe()
    return Parsed(
        rows,
        f"columns {used}, separated by {SEPARATORS.get(separator, separator)}{unused}{repairs}"
        f"{_describe_joined(num_joined)}{_describe_long(rows)}",
    )


def _join_caption(line: list[str], names: list[str], columns: Fields, joint: str) -> list[str] | None:
    """Joins the caption of a row with too many columns; None if another column may have the separators in it.

    It has not if nothing else is text: the image is one, the split is known, and the others are numbers.
    """
    caption = names.index(columns.captions[0])
    end = caption + len(line) - len(names) + 1
    parts = line[caption:end]
    joined = [*line[:caption], joint.join(parts), *line[end:]]
    values = dict(zip(names, joined, strict=True))
    image = values.pop(columns.image)
    split = values.pop(columns.split) if columns.split else ""
    others = [value for name, value in values.items() if name != columns.captions[0]]
    is_clear = (
        names.count(columns.captions[0]) == len(columns.captions) == 1
        and not image.startswith(" ")
        and (is_image_file(image) or not any(map(is_image_file, line)))
        and (parse_split(split) or not split)
        and all(map(NUMBER.fullmatch, others))
        and not (others and any(map(NUMBER.fullmatch, parts)))
    )
    return joined if is_clear else None


def _describe_joined(num_joined: int) -> str:
    return f"; {num_joined:,} captions without quotes have the separator in them" if num_joined else ""


def _describe_long(rows: list[CaptionRow]) -> str:
    long = [row.caption for row in rows if "\n" in str(row.caption)]
    if not long:
        return ""
    return f"; {len(long):,} captions run over several lines (is a quote left open?), the first: {long[0][:60]!r}"


def read_headerless(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads lines of a name and a caption: `a.jpg,a dog`, or `a1<TAB>a dog` as ROCO has it."""
    if not isinstance(content, str) or options.image_column or options.caption_column:
        return None
    line = _first_line(content)
    separator = "\t" if "\t" in line else next((char for char in line if char in SEPARATORS), "\t")
    if options.separator:
        separator = parse_separator(options.separator)
    name, found, _ = line.partition(separator)
    name = name.strip().strip('"')
    # A name without an ending has a number, which tells it from the header of a column.
    is_bare_name = separator == "\t" and re.fullmatch(r"\S*\d\S*", name)
    if not (found and (is_bare_name or is_image_file(name))):
        return None
    lines, repairs = _split_lines(content, separator)
    if len(lines) > 2 and len(lines[0]) > 2 and len(set(map(len, lines))) == 1:
        raise InputError(
            f"expected a name and a caption in each row, or a first row that names the {len(lines[0])} columns"
        )
    rows, num_joined = [], 0
    for name, *parts in lines:
        in_name = not is_image_file(name) and any(map(is_image_file, parts))
        problem = "the separator seems to be in the name" if in_name else ""
        rows.append(CaptionRow(name, separator.join(parts), problem=problem))
        num_joined += len(parts) > 1 and not problem
    joined = _describe_joined(num_joined)
    return Parsed(
        rows,
        f"name and caption, separated by {SEPARATORS.get(separator, separator)}{repairs}{joined}{_describe_long(rows)}",
    )


def read_spaced_lines(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads lines of a name, a space and a caption, as the descriptions.txt of many tutorials has them.

    Such captions begin with startseq; else every line must begin with what can only be the name of an image.
    """
    if not isinstance(content, str) or any(options[:3]):
        return None
    lines = [line.split(None, 1) for line in content.split("\n") if line.strip()]
    is_marked = lines[0][1:] and lines[0][1].startswith("startseq ")
    if not is_marked and not all(
        len(line) == 2 and (is_image_file(line[0]) or CODE_NAME.fullmatch(line[0])) for line in lines
    ):
        return None
    return Parsed([CaptionRow(*line) if len(line) == 2 else CaptionRow(line[0], "") for line in lines])


def parse_separator(text: str) -> str:
    """Returns the character that --separator names; raises InputError if it names none."""
    separator = {"tab": "\t", "\\t": "\t", "comma": ",", "semicolon": ";", "bar": "|"}.get(text, text)
    if len(separator) != 1 or separator in '\r\n"':
        raise InputError(f"--separator: expected one character, or tab, found {text!r}")
    return separator


def _first_line(text: str) -> str:
    """Returns the first line that is not empty."""
    return text.lstrip("\n").partition("\n")[0]


def _split_lines(content: str, separator: str, image: int = 0) -> tuple[list[list[str]], str]:
    """Splits a table, without its empty lines, at a separator that may have a space after it; returns also a note.

    `image` is the column of the images' names, by which rows inside of a cell are known.
    """

    def split(quoting: Any) -> list[list[str]]:
        lines = csv.reader(
            io.StringIO(content),
            delimiter=separator[0],
            skipinitialspace=separator.endswith(" "),
            quoting=quoting,
            strict=True,
        )
        return [fields for fields in lines if "".join(fields).strip()]

    # A quote that is left open swallows the rows after it, up to the next quote or to the end.
    with contextlib.suppress(csv.Error):
        lines = split(csv.QUOTE_MINIMAL)
        if not any(_holds_row(fields, separator[0], image) for fields in lines):
            return lines, ""
    return split(csv.QUOTE_NONE), "; quotes are part of the captions, since they do not come in pairs"


def _holds_row(row: list[str], separator: str, image: int) -> bool:
    """Tells whether a further line of a cell has the name of an image in its column."""
    has_ending = len(row) > image and is_image_file(row[image])  # as then all names have
    for line in (line for cell in row for line in cell.split("\n")[1:]):
        fields = [field.strip(' "') for field in line.split(separator)]
        if len(fields) <= max(image, 1):
            continue
        if is_image_file(fields[image]) or (not has_ending and BARE_NAME.fullmatch(fields[image])):
            return True
    return False


def _parse_cell(cell: str) -> list[Any]:
    """Returns the captions of a cell: one, or those of a list that pandas, NumPy or datasets wrote as text."""
    if cell.startswith(("['", '["')) and cell.endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError, tokenize.TokenError):
            # NumPy writes no commas: all of it, as Python, would be one string. Nothing is run.
            tokens = [token for token in tokenize.generate_tokens(io.StringIO(cell).readline) if token.string.strip()]
            if all(token.type == tokenize.STRING or token.string in "[,]" for token in tokens):
                return [ast.literal_eval(token.string) for token in tokens if token.type == tokenize.STRING]
            return list(ast.literal_eval(cell))
    return [cell]
