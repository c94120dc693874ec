"""The formats of annotations, told apart by content: a reader for each, in one table.

A reader takes the content of a file or a folder: parsed JSON, text (a str), or the folder's Path. It returns the
captions as they are there, or None if the content has another format. The first reader that knows the content wins.
"""

import ast
import codecs
import contextlib
import csv
import io
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit

from captioning.base.cli import InputError, advise
from captioning.base.files import parse_json, unique_keys
from captioning.images.image_names import walk_files
from captioning.images.reading import is_image_file

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
SEPARATORS = {",": "comma", "\t": "tab", ";": "semicolon", "|": "bar"}
METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
CAPTION_SUFFIXES = (".txt", ".caption")  # of the text beside an image
NUMBER = re.compile(r"\s*[\d.:/-]+\s*")
CODE_NAME = re.compile(r"(?=\S*\d)[\w.-]+_[\w.-]+")  # of an image, such as 1000268201_693b08cb0e
BARE_NAME = re.compile(r"(?=\S*\d)\S{5,}")  # of an image, without an ending
# name#0<TAB>caption; Flickr8k-CN has name#zhc#0 and a space.
TOKEN_LINE = re.compile(r"([^\t\n]+?\.\w+)(?:#[a-z]+)?#\d+[\t ](.*)")


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


def parse_annotations(path: Path, options: ReadOptions) -> tuple[str, Parsed]:
    """Reads annotations; returns the name of their format and what was read.

    Raises:
        InputError: there is nothing at the path, or it has none of the formats.
    """
    content = read_content(path, options.encoding)
    for name, read in FORMATS.items():
        try:
            parsed = read(content, options)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, csv.Error) as error:
            raise InputError(
                f"{path}: expected {name} (docs/data.md shows it); something in it is wrong: {error!r}"
            ) from None
        if parsed is not None:
            return name, parsed
    found = "a folder" if path.is_dir() else repr(str(content).strip()[:60])
    raise InputError(
        f"{path}: not a known annotation format; expected one of {', '.join(FORMATS)} (docs/data.md shows them), found "
        f"{found}" + advise("; name other columns or fields by --image-column, --caption-column and --separator")
    )


def read_content(path: Path, encoding: str | None = None) -> Any:
    """Reads JSON, JSON Lines (into a list; a line that is not JSON stays text), or text; a folder stays a path."""
    if path.is_dir():
        return path
    text = read_text(path, encoding)
    if not text.strip():
        raise InputError(f"{path}: empty; expected captions")
    if not text.lstrip().startswith(("{", "[")):
        return text
    lines = text.strip().split("\n")
    if len(lines) > 1 and isinstance(_parse_line(path, lines[0]), dict):
        return [_parse_line(path, line) for line in lines if line.strip()]
    return parse_json(path, text)


def _parse_line(path: Path, line: str) -> Any:
    """Returns the object of a line, or the line if it is not JSON."""
    try:
        return json.loads(line, object_pairs_hook=unique_keys(path))
    except (ValueError, RecursionError):
        return line


def read_text(path: Path | str, encoding: str | None = None) -> str:
    """Reads a text file in UTF-8, in UTF-16 with a byte order mark, or in a given encoding; lines end in a line feed.

    Raises:
        InputError: the file cannot be read, or is not text in this encoding.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    is_utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    name = encoding or ("utf-16" if is_utf16 else "utf-8")
    try:
        text = content.decode(name)
        problem = "it has NUL characters" if "\x00" in text else ""
    except UnicodeError as error:
        problem = str(error)
    except LookupError:
        raise InputError(f"--encoding {encoding}: no such encoding; expected a name such as windows-1252") from None
    if problem:
        raise InputError(
            f"{path}: expected text in {name.upper()} ({problem}); save it as UTF-8, a spreadsheet or Parquet as CSV, "
            "and unpack archives" + advise("; or name its --encoding, such as windows-1252 (Excel's), gbk or utf-16-le")
        )
    return text.removeprefix("\ufeff").replace("\r\n", "\n").replace("\r", "\n")


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


# JSON.


def read_coco(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads COCO's captions JSON: `images` with id and file_name, `annotations` with image_id and caption.

    COCO 2014 and 2017, NoCaps, VizWiz and STAIR have this form. VizWiz marks sentences that are not captions: rejected
    ones, and ready-made ones such as "Quality issues are too severe to recognize visual content." STAIR has captions
    already split into words, which are Japanese.
    """
    if not (isinstance(content, dict) and "annotations" in content):
        return None
    images: dict[str, Any] = {}
    details = ""
    for image in content["images"]:
        if not image.get("file_name"):
            image = image | {"file_name": _name_in_address(image)}
            details = "names from the images' addresses"
        # The captions of one would go to the other.
        if images.setdefault(str(image["id"]), image)["file_name"] != image["file_name"]:
            raise ValueError(f"two images have the id {image['id']}")
    rows = []
    for annotation in content["annotations"]:
        image = images.get(str(annotation["image_id"]))
        caption = annotation["caption"]
        if annotation.get("tokenized_caption"):
            caption = annotation["tokenized_caption"]
            details = "captions from tokenized_caption"
        if image is None:
            problem = "an annotation of an image that is not listed"
            rows.append(CaptionRow(f"image_id {annotation['image_id']}", caption, problem=problem))
        elif annotation.get("is_rejected") or annotation.get("is_precanned"):
            rows.append(CaptionRow(image["file_name"], caption, problem="rejected or ready-made, as VizWiz marks it"))
        else:
            rows.append(CaptionRow(image["file_name"], caption, image["id"]))
    return Parsed(rows, details)


def _name_in_address(image: dict[str, Any]) -> str:
    """Returns the name of an image of COCO that has only an address; raises KeyError without one."""
    for field in ("coco_url", "flickr_url", "url"):
        if address := image.get(field):
            return PurePosixPath(unquote(urlsplit(address).path)).name
    raise KeyError("file_name")


def read_karpathy(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads the JSON of Karpathy and Fei-Fei (2015), which also holds the split.

    The datasets of aerial images (RSICD, UCM, Sydney) have this form too.
    """
    images = content.get("images") if isinstance(content, dict) else None
    if not (isinstance(images, list) and images and "sentences" in images[0]):
        return None
    rows = []
    for image in images:
        image_path = str(PurePosixPath(image.get("filepath", "")) / image["filename"])
        for sentence in image["sentences"] or [{"raw": ""}]:
            rows.append(CaptionRow(image_path, sentence["raw"], image.get("cocoid"), image["split"]))
    return Parsed(rows, "with its split")


def read_objects(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads objects that have an image and one or several captions each.

    Hugging Face's metadata.jsonl (file_name, text), ALBEF, BLIP and LAVIS (image, caption), AI Challenger (caption, a
    list, and image_id, which is a name), TextCaps (image_name, caption_str, in a list called data) and R2Gen (report,
    and image_path, a list, in a list for each split) have this form.
    """
    if isinstance(content, dict) and all(parse_split(name) and _are_objects(content[name]) for name in content):
        content = [item | {"split": split} for split, items in content.items() for item in items]
    elif isinstance(content, dict):
        content = content.get("data", [content])
    if not isinstance(content, list):
        return None
    fields = find_fields((name for item in content if isinstance(item, dict) for name in item), options)
    if fields is None:
        return None
    rows, num_shared = [], 0
    for item in content:
        names = [name for name in fields.captions if name in item] if isinstance(item, dict) else []
        if not names or fields.image not in item:
            rows.append(CaptionRow(item, "", problem=f"not JSON with {fields.image} and {fields.captions[0]}"))
            continue
        captions = [caption for value in _drop_empty([item[name] for name in names]) for caption in _as_list(value)]
        images = _as_list(item[fields.image])
        num_shared += len(images) > 1
        rows += [CaptionRow(image, text, split=item.get(fields.split)) for image in images for text in captions]
    shared = f"; {num_shared:,} objects have several images, each with all captions" if num_shared else ""
    return Parsed(rows, "fields {}{}".format(*fields.describe()) + shared)


def _are_objects(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def _as_list(value: Any) -> list[Any]:
    """Returns captions or images, one or several, as a list; an empty list becomes an empty text."""
    return value or [""] if isinstance(value, list) else [value]


def _drop_empty(values: list[Any]) -> list[Any]:
    """Returns the values of several columns without those that are empty, of which one stays if there is no other."""
    return [value for value in values if str(value or "").strip()] or values[:1]


def read_mapping(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads `{"x.jpg": ["a caption", ...], ...}`, also with one text in place of a list."""
    if not isinstance(content, dict):
        return None
    name, captions = next(iter(content.items()), ("", None))
    is_text = isinstance(captions, str) and is_image_file(name)
    is_list = isinstance(captions, list) and bool(captions) and isinstance(captions[0], str)
    if not (is_text or is_list):
        return None
    return Parsed([CaptionRow(name, caption) for name, value in content.items() for caption in _as_list(value)])


# Text.


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
        names = [name.strip().strip('"') for name in header.split(separator)]
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
        captions = [text for cell in _drop_empty([line[i] for i in in_columns]) for text in _parse_cell(cell)]
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
    if not isinstance(content, str) or any(options[:3]):
        return None
    line = _first_line(content)
    separator = "\t" if "\t" in line else next((char for char in line if char in SEPARATORS), "\t")
    name, found, _ = line.partition(separator)
    name = name.strip().strip('"')
    # A name without an ending has a number, which tells it from the header of a column.
    is_bare_name = separator == "\t" and re.fullmatch(r"\S*\d\S*", name)
    if not (found and (is_bare_name or is_image_file(name))):
        return None
    lines, repairs = _split_lines(content, separator)
    rows, num_joined = [], 0
    for name, *parts in lines:
        in_name = not is_image_file(name) and any(map(is_image_file, parts))
        problem = "the separator seems to be in the name" if in_name else ""
        rows.append(CaptionRow(name, separator.join(parts), problem=problem))
        num_joined += len(parts) > 1 and not problem
    joined = _describe_joined(num_joined)
    return Parsed(
        rows, f"name and caption, separated by {SEPARATORS[separator]}{repairs}{joined}{_describe_long(rows)}"
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
        if not any(_holds_row(cell, separator[0], image) for fields in lines for cell in fields if "\n" in cell):
            return lines, ""
    return split(csv.QUOTE_NONE), "; quotes are part of the captions, since they do not come in pairs"


def _holds_row(cell: str, separator: str, image: int) -> bool:
    """Tells whether a further line of a cell has the name of an image in its column."""
    for line in cell.split("\n")[1:]:
        fields = [field.strip(' "') for field in line.split(separator)]
        if len(fields) > max(image, 1) and (is_image_file(fields[image]) or BARE_NAME.fullmatch(fields[image])):
            return True
    return False


def _parse_cell(cell: str) -> list[Any]:
    """Returns the captions of a cell: one, or those of a list that pandas or datasets wrote as text."""
    if cell.startswith(("['", '["')) and cell.endswith("]"):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return list(ast.literal_eval(cell))  # reads constants only, nothing is run
    return [cell]


# Folders.


def read_image_folder(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads Hugging Face's ImageFolder: metadata.csv or metadata.jsonl beside the images, of all or of each split."""
    if not isinstance(content, Path):
        return None
    files = _find_metadata(content)
    if not files and content.is_dir():
        files = [file for folder in sorted(content.iterdir()) for file in _find_metadata(folder)]
    rows = []
    for file in files:
        folder = PurePosixPath(file.parent.relative_to(content).as_posix())
        split = parse_split(folder.name)
        _, parsed = parse_annotations(file, options)
        for row in parsed.rows:
            rows.append(row._replace(image_path=f"{folder}/{row.image_path}", split=split or row.split))
    names = ", ".join(file.relative_to(content).as_posix() for file in files)
    return Parsed(rows, names) if files else None


def _find_metadata(folder: Path) -> list[Path]:
    """Returns the metadata file of a folder, or nothing; of two, the table."""
    return [folder / name for name in METADATA_FILES if (folder / name).is_file()][:1]


def read_caption_files(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads a folder of images with a text file beside each: `a.jpg` and `a.txt`, whose lines are its captions."""
    if not isinstance(content, Path):
        return None
    paths = [Path(path) for path in walk_files(content)]
    texts = {path.with_suffix(""): path for path in paths if path.suffix.lower() in CAPTION_SUFFIXES}
    images = [path for path in paths if is_image_file(path)]
    if not any(image.with_suffix("") in texts for image in images):
        return None
    rows = []
    for image in images:
        text = texts.get(image.with_suffix(""))
        if text is None:
            rows.append(CaptionRow(image.as_posix(), "", problem="an image without a .txt file beside it"))
            continue
        split = parse_split(image.parts[0])
        captions = read_text(content / text, options.encoding).strip()
        rows += [CaptionRow(image.as_posix(), line, split=split) for line in re.split(r"\n\s*", captions)]
    return Parsed(rows, "a .txt file beside each image")


# The table: the first reader that returns something wins.
FORMATS: dict[str, Callable[[Any, ReadOptions], Parsed | None]] = {
    "COCO captions JSON": read_coco,
    "Karpathy's JSON": read_karpathy,
    "JSON objects, in a list or one a line": read_objects,
    "JSON mapping of names to captions": read_mapping,
    "lines of name#0<TAB>caption": read_token_file,
    "table with a header": read_table,
    "table without a header": read_headerless,
    "lines of a name, a space and a caption": read_spaced_lines,
    "image folder with metadata": read_image_folder,
    "folder of images with .txt files": read_caption_files,
}
