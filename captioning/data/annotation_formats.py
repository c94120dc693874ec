"""The formats of annotations, told apart by content: a reader for each, in one table.

A reader takes the content of a file or a folder: parsed JSON, text (a str), or the folder's Path. It returns the
captions as they are there, or None if the content has another format. The first reader that knows the content wins.
"""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection
from pathlib import Path, PurePosixPath
from typing import Any

from captioning.base.cli import InputError, advise
from captioning.base.files import parse_json, unique_keys
from captioning.base.text import is_utf16
from captioning.data.caption_rows import CaptionRow, Parsed, ReadOptions, parse_split
from captioning.data.json_formats import read_coco, read_karpathy, read_mapping, read_objects
from captioning.data.text_formats import read_headerless, read_spaced_lines, read_table, read_token_file
from captioning.images.image_names import walk_files
from captioning.images.reading import is_image_file

METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
CAPTION_SUFFIXES = (".txt", ".caption")  # of the text beside an image


def parse_annotations(path: Path, options: ReadOptions) -> tuple[str, Parsed]:
    """Reads annotations; returns the name of their format and what was read.

    Raises:
        InputError: there is nothing at the path, or it has none of the formats.
    """
    content = read_content(path, options.encoding)
    for name, read in FORMATS.items():
        try:
            parsed = read(content, options)
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, csv.Error, InputError) as error:
            reason = str(error) if isinstance(error, ValueError | InputError) else repr(error)
            raise InputError(f"{path}: expected {name} (docs/data.md shows it); it is wrong: {reason}") from None
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
    name = encoding or ("utf-16" if is_utf16(content) else "utf-8")
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


# Folders.


def read_image_folder(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads Hugging Face's ImageFolder: metadata.csv or metadata.jsonl beside the images, of all or of each split."""
    if not isinstance(content, Path):
        return None
    files = _find_metadata(content)
    if not files and content.is_dir():
        files = [file for folder in sorted(content.iterdir()) for file in _find_metadata(folder)]
    rows, notes = [], dict[str, None]()
    splits = _splits_of([file.parent.name for file in files])
    for file in files:
        folder = PurePosixPath(file.parent.relative_to(content).as_posix())
        split = splits.get(folder.name, "")
        _, parsed = parse_annotations(file, options)
        notes[parsed.details] = None
        for row in parsed.rows:
            rows.append(row._replace(image_path=f"{folder}/{row.image_path}", split=split or row.split))
    names = ", ".join(file.relative_to(content).as_posix() for file in files)
    return Parsed(rows, "; ".join(filter(None, (names, *notes)))) if files else None


def _splits_of(folders: Collection[str]) -> dict[str, str]:
    """Returns the split that each folder's name says, also unknown ones if another folder has the name of a split."""
    return {name: name for name in folders} if any(map(parse_split, folders)) else {}


def _find_metadata(folder: Path) -> list[Path]:
    """Returns the metadata file of a folder, or nothing; of two, the table."""
    return [folder / name for name in METADATA_FILES if (folder / name).is_file()][:1]


def read_caption_files(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads a folder of images with a text file beside each: `a.jpg` and `a.txt`, whose lines are its captions."""
    if not isinstance(content, Path):
        return None
    paths = [Path(path) for path in walk_files(content)]
    texts: defaultdict[Path, list[Path]] = defaultdict(list)
    for path in paths:
        if path.suffix.lower() in CAPTION_SUFFIXES:
            texts[path.with_suffix("")].append(path)
    images = [path for path in paths if is_image_file(path)]
    stems = {image.with_suffix("") for image in images}
    if not stems & texts.keys():
        return None
    alone = [path for stem, files in texts.items() if stem not in stems for path in files]
    rows = [CaptionRow(path.as_posix(), "", problem="a text file without an image beside it") for path in alone]
    splits = _splits_of({image.parts[0] for image in images if len(image.parts) > 1})
    for image in images:
        if not (files := texts.get(image.with_suffix(""))):
            rows.append(CaptionRow(image.as_posix(), "", problem="an image without a .txt file beside it"))
            continue
        split = splits.get(image.parts[0], "")
        captions = "\n".join(read_text(content / file, options.encoding).strip() for file in files)
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
