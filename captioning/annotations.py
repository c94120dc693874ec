"""Reads annotation files: images and their captions, in any of four formats that are told apart by content."""

import contextlib
import csv
import dataclasses
import io
import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from captioning.cli import InputError, log
from captioning.files import parse_json

SPLITS = ("train", "val", "test")


@dataclasses.dataclass(frozen=True)
class Example:
    """An image with its reference captions."""

    image_path: str  # inside the image folder, with forward slashes; its cached features have the same path
    captions: tuple[str, ...]
    image_id: int  # COCO's id, or the index of the image in the annotation file
    split: str = ""  # train, val or test; empty if it is not decided yet


class CaptionRow(NamedTuple):
    """A caption as the file has it, before any check."""

    image_path: Any
    caption: Any
    image_id: Any = None
    split: Any = ""


def read_annotations(path: Path | str) -> list[Example]:
    """Reads an annotation file in one of the formats of `FORMATS`.

    Captions without a word are logged and left out. So are images without any other caption.

    Returns:
        One example for each image, in the order of the file. Only Karpathy's format sets `split`.

    Raises:
        InputError: there is no such file; it has none of these formats; it has no usable caption; an image's name
            leads out of the image folder; or a split or an id is not valid.
    """
    content = _read_content(path)
    for matches, read_rows in FORMATS:
        if matches(content):
            return _group_by_image(path, read_rows(path, content))
    if not isinstance(content, str):
        raise InputError(
            f"{path}: JSON without captions; it is neither COCO's captions JSON (images, annotations) nor Karpathy's "
            "(images, sentences)"
        )
    raise InputError(
        f"{path}: not a known annotation format; expected COCO captions JSON, Karpathy's dataset_*.json, a CSV "
        f"whose first line is image,caption, or lines of name#0<TAB>caption; its first line is {content[:60]!r}"
    )


def _read_content(path: Path | str) -> Any:
    """Returns the parsed JSON of a file that begins with a bracket, and the text of any other file."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such annotation file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8 ({error}); save it as UTF-8") from None
    return parse_json(path, text) if text.lstrip().startswith(("{", "[")) else text


# The formats. `content` is parsed JSON (a dict or a list) or text (a str).


@contextlib.contextmanager
def _json_errors(path: Path | str) -> Iterator[None]:
    """Turns the errors of JSON with missing or wrong fields into an InputError."""
    try:
        yield
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path}: neither COCO's captions JSON (images, annotations) nor Karpathy's (images, sentences): {error!r}"
        ) from None


def is_coco(content: Any) -> bool:
    """Tells whether JSON is COCO's captions_*.json."""
    return isinstance(content, dict) and "annotations" in content


def read_coco(path: Path | str, content: Any) -> list[CaptionRow]:
    """Reads COCO's captions JSON: `images` with id and file_name, `annotations` with image_id and caption."""
    with _json_errors(path):
        names = {image["id"]: image["file_name"] for image in content["images"]}
        return [
            CaptionRow(names[annotation["image_id"]], annotation["caption"], annotation["image_id"])
            for annotation in content["annotations"]
        ]


def is_karpathy(content: Any) -> bool:
    """Tells whether JSON is Karpathy's dataset_*.json."""
    images = content.get("images") if isinstance(content, dict) else None
    return isinstance(images, list) and bool(images) and isinstance(images[0], dict) and "sentences" in images[0]


def read_karpathy(path: Path | str, content: Any) -> list[CaptionRow]:
    """Reads the JSON of Karpathy and Fei-Fei (2015), which also holds the split; restval belongs to train."""
    rows = []
    with _json_errors(path):
        for image in content["images"]:
            image_path = str(PurePosixPath(image.get("filepath", "")) / image["filename"])
            # None is refused later; an empty split would pass for an undecided one.
            split = "train" if image["split"] == "restval" else image["split"] or None
            for sentence in image["sentences"] or [{"raw": ""}]:
                rows.append(CaptionRow(image_path, sentence["raw"], image.get("cocoid"), split))
    return rows


def is_token_file(content: Any) -> bool:
    """Tells whether text is like Flickr8k.token.txt."""
    return isinstance(content, str) and re.match(r"[^\t\n]+#\d+\t", content) is not None


def read_token_file(path: Path | str, content: str) -> list[CaptionRow]:
    """Reads lines of `name#0<TAB>caption`, as Flickr8k has them."""
    rows = []
    for line in content.split("\n"):
        if line.strip():
            name, _, caption = line.partition("\t")
            rows.append(CaptionRow(name.rsplit("#", 1)[0], caption))
    return rows


def is_csv(content: Any) -> bool:
    """Tells whether text is a CSV file with the header image,caption."""
    return isinstance(content, str) and content.split("\n", 1)[0].strip().lower().replace('"', "") == "image,caption"


def read_csv(path: Path | str, content: str) -> list[CaptionRow]:
    """Reads a CSV file with the header image,caption.

    Raises:
        InputError: it cannot be parsed, or a quote is left open.
    """
    try:
        lines = [fields for fields in csv.reader(io.StringIO(content)) if "".join(fields).strip()][1:]
    except csv.Error as error:
        raise InputError(f"{path}: not a CSV that can be read ({error}); is a quote left open?") from None
    for fields in lines:
        # An open quote joins the lines after it: one that begins like a row of its own, or at least three lines.
        if re.search(r"\n[^,\n]*\.\w+,|(\n.*){3}", ",".join(fields)):
            raise InputError(f"{path}: the caption of {fields[0][:60]!r} runs over other lines; close its quote")
    # An unquoted comma inside a caption makes more than two fields; they belong together.
    return [CaptionRow(fields[0].strip(), ",".join(fields[1:])) for fields in lines]


# A matcher and a reader for each format; the first one that matches reads the file.
FORMATS: list[tuple[Callable[[Any], bool], Callable[[Path | str, Any], list[CaptionRow]]]] = [
    (is_coco, read_coco),
    (is_karpathy, read_karpathy),
    (is_token_file, read_token_file),
    (is_csv, read_csv),
]


# From rows to examples.


def _check_row(path: Path | str, row: CaptionRow) -> None:
    """Checks a row of any format; raises InputError if it is not valid."""
    name = row.image_path
    if not isinstance(name, str) or not isinstance(row.caption, str):
        raise InputError(f"{path}: expected text for image and caption, found {name!r} and {row.caption!r}")
    if not name or PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts or "\\" in name:
        raise InputError(f"{path}: image name {name!r} leads out of the image folder; expected a name inside it")
    if type(row.image_id) not in (int, str, type(None)) or row.split not in ("", *SPLITS):
        raise InputError(
            f"{path}: {name}: expected an id, and the split train, restval, val or test; found the id "
            f"{row.image_id!r} and the split {row.split!r}"
        )
    try:
        f"{name} {row.caption}".encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        raise InputError(f"{path}: a caption of {name!r} is not Unicode text: {row.caption!r}") from None


def _group_by_image(path: Path | str, rows: list[CaptionRow]) -> list[Example]:
    """Checks the rows and returns one example for each image, in the order of the file."""
    captions: dict[str, list[str]] = {}
    metadata: dict[str, tuple[Any, str]] = {}  # image id and split
    wordless = []
    for row in rows:
        _check_row(path, row)
        if re.search(r"[^\W_]", row.caption):
            captions.setdefault(row.image_path, []).append(" ".join(row.caption.split()))
            metadata.setdefault(row.image_path, (row.image_id, row.split))
        else:
            wordless.append(row)
    if not captions:
        raise InputError(f"{path}: no usable caption in {len(rows)} rows; expected at least one word per caption")
    for row in wordless:
        log(f"skipped {path}: a caption without a word: {row.image_path!r} {row.caption[:60]!r}")
    examples = []
    for index, (image_path, texts) in enumerate(captions.items()):
        image_id, split = metadata[image_path]
        examples.append(Example(image_path, tuple(texts), index if image_id is None else image_id, split))
    _check_unique_ids(path, examples)
    return examples


def _check_unique_ids(path: Path | str, examples: list[Example]) -> None:
    """Checks that no two images have the same id; 1 and "1" are the same."""
    image_paths: dict[str, str] = {}
    for example in examples:
        other = image_paths.setdefault(str(example.image_id), example.image_path)
        if other != example.image_path:
            raise InputError(f"{path}: {other} and {example.image_path} have the same id, {example.image_id}")
