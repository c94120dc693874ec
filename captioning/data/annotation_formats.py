"""The formats of annotations, told apart by content: a matcher and a reader for each, in one list.

`content` is parsed JSON (a dict or a list), JSON Lines (`JsonLines`), text (a str), or a folder (`Folder`).
"""

import functools
import json
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from captioning.base.cli import InputError
from captioning.base.files import parse_json
from captioning.data.caption_table import (
    DOWNLOAD_ADVICE,
    CaptionRow,
    Parsed,
    ReadOptions,
    describe_fields,
    find_fields,
    first_line,
    is_headerless,
    is_table,
    parse_split,
    parse_splits,
    read_headerless,
    read_table,
    read_text,
)
from captioning.images.image_names import walk_files
from captioning.images.reading import is_image_file

METADATA_FILES = ("metadata.csv", "metadata.jsonl")  # of Hugging Face's ImageFolder
CAPTION_SUFFIXES = (".txt", ".caption")  # of the text beside an image
# name#0<TAB>caption; Flickr8k-CN has name#zhc#0 and a space.
TOKEN_LINE = re.compile(r"([^\t\n]+?)(?:#[a-z]+)?#\d+\t(.*)|(\S+?\.\w+)(?:#[a-z]+)?#\d+ (.*)")


class JsonLines(list):
    """The objects of a file with one JSON object a line; a line that is none is kept as text."""


class Folder:
    """A folder that may hold images and captions; it is searched when that is first asked for."""

    def __init__(self, path: Path):
        self.path = path

    @functools.cached_property
    def metadata_files(self) -> list[Path]:
        """The metadata file of Hugging Face's ImageFolder, or else those of the subfolders, one each."""
        for folders in ([self.path], sorted(path for path in self.path.iterdir() if path.is_dir())):
            files = [next((f for name in METADATA_FILES if (f := folder / name).is_file()), None) for folder in folders]
            if found := [file for file in files if file is not None]:
                return found
        return []

    @functools.cached_property
    def caption_files(self) -> dict[str, list[Path]]:
        """The images, by their path inside the folder, with the text files of the same name beside them."""
        paths = walk_files(self.path)
        texts: dict[PurePosixPath, list[Path]] = defaultdict(list)
        for path in map(PurePosixPath, paths):
            if path.suffix.lower() in CAPTION_SUFFIXES:
                texts[path.with_suffix("")].append(self.path / path)
        return {path: texts.get(PurePosixPath(path).with_suffix(""), []) for path in paths if is_image_file(path)}


def read_content(path: Path, encoding: str | None) -> Any:
    """Reads what is at a path: a folder as it is, JSON, JSON Lines, or text.

    Raises:
        InputError: there is nothing; or it is no text, or broken JSON.
    """
    if path.is_dir():
        return Folder(path)
    if not path.exists():
        raise InputError(f"{path}: no such annotation file")
    text = re.sub(r"^sep=.\n", "", read_text(path, encoding))  # a line of Excel
    if not text.strip():
        raise InputError(f"{path}: empty; expected captions")
    if not text.lstrip().startswith(("{", "[")):
        return text
    first, _, rest = text.strip().partition("\n")
    if rest and isinstance(_parse_json_line(first), dict):
        return JsonLines(_parse_json_line(line) for line in text.split("\n") if line.strip())
    return parse_json(path, text)


def _parse_json_line(line: str) -> Any:
    """Returns the object of a line, or the line if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return line


# COCO.


def is_coco(content: Any, options: ReadOptions) -> bool:
    """Tells whether JSON is like COCO's captions_*.json."""
    return isinstance(content, dict) and "annotations" in content


def read_coco(path: Path | str, content: Any, options: ReadOptions) -> Parsed:
    """Reads COCO's captions JSON: `images` with id and file_name, `annotations` with image_id and caption.

    COCO 2014 and 2017, NoCaps, VizWiz and STAIR have this form. VizWiz marks sentences that are no captions: rejected
    ones, and ready-made ones such as "Quality issues are too severe to recognize visual content." STAIR has captions
    already split into words, which are Japanese.
    """
    parsed = Parsed([])
    images = [image for image in content["images"] if isinstance(image, dict) and "id" in image]
    names = {str(image["id"]): (image.get("file_name"), image["id"]) for image in images}
    for annotation in content["annotations"]:
        image_id, problem = annotation.get("image_id"), ""
        name, image_id = names.get(str(image_id), (f"image_id {image_id}", image_id))
        caption = annotation.get("tokenized_caption") or annotation.get("caption")
        if str(image_id) not in names:
            problem = "an annotation of an image that is not listed"
        elif annotation.get("is_rejected") or annotation.get("is_precanned"):
            problem = "a sentence that is rejected or ready-made, as VizWiz marks them"
        parsed.rows.append(CaptionRow(name, caption, image_id, problem=problem))
    if any("tokenized_caption" in annotation for annotation in content["annotations"]):
        parsed.details = "captions from tokenized_caption"
    return parsed


# Karpathy's splits, TextCaps.


def is_karpathy(content: Any, options: ReadOptions) -> bool:
    """Tells whether JSON is Karpathy's dataset_*.json."""
    return _has_objects(content, "images", "sentences")


def _has_objects(content: Any, name: str, field: str) -> bool:
    """Tells whether JSON has a list of objects under a name, the first of which has a field."""
    objects = content.get(name) if isinstance(content, dict) else None
    return isinstance(objects, list) and bool(objects) and isinstance(objects[0], dict) and field in objects[0]


def read_karpathy(path: Path | str, content: Any, options: ReadOptions) -> Parsed:
    """Reads the JSON of Karpathy and Fei-Fei (2015), which also holds the split; restval belongs to train.

    The datasets of aerial images (RSICD, UCM, Sydney) have this form too.
    """
    parsed = Parsed([], "with its split")
    for image in content["images"]:
        image_path = str(PurePosixPath(image.get("filepath", "")) / image["filename"])
        # None is refused later; an empty split would pass for an undecided one.
        split = parse_split(image.get("split")) or None
        problem = "" if split else f"a split that is not train, restval, val or test, {image.get('split')!r}"
        for sentence in image["sentences"] or [{"raw": ""}]:
            parsed.rows.append(CaptionRow(image_path, sentence.get("raw"), image.get("cocoid"), split, problem))
    return parsed


def is_textcaps(content: Any, options: ReadOptions) -> bool:
    """Tells whether JSON is TextCaps."""
    return _has_objects(content, "data", "caption_str")


def read_textcaps(path: Path | str, content: Any, options: ReadOptions) -> Parsed:
    """Reads TextCaps: `data` with a caption_str, an image and its split in every row."""
    parsed = Parsed([], "with its split")
    for row in content["data"]:
        name = row.get("image_path") or row.get("image_name") or row["image_id"]
        parsed.rows.append(CaptionRow(name, row["caption_str"], row["image_id"], parse_split(row.get("set_name"))))
    return parsed


# Lists and lines of objects, and mappings.


def is_json_lines(content: Any, options: ReadOptions) -> bool:
    """Tells whether content is JSON Lines, or one such line."""
    return isinstance(content, JsonLines) or (
        isinstance(content, dict) and {str(name).lower() for name in content} >= {"file_name", "text"}
    )


def is_object_list(content: Any, options: ReadOptions) -> bool:
    """Tells whether JSON is a list of objects."""
    return isinstance(content, list) and bool(content) and all(isinstance(item, dict) for item in content[:5])


def read_objects(path: Path | str, content: Any, options: ReadOptions) -> Parsed:
    """Reads objects that have an image and one or several captions each.

    Hugging Face's metadata.jsonl (file_name, text), ALBEF, BLIP and LAVIS (image, caption), and AI Challenger (caption,
    a list, and image_id, which is a name) have this form.

    Raises:
        InputError: the first object has no image or no caption.
    """
    objects = content if isinstance(content, list) else [content]
    first = next((item for item in objects if isinstance(item, dict)), {})
    fields = find_fields(map(str, first), options)
    if fields is None:
        found = ", ".join(map(str, first))[:60]
        raise InputError(
            f"{path}: expected objects with {describe_fields(options)}; the fields of the first are {found}"
        )
    parsed = Parsed([], f"fields {fields.image} and {fields.caption}")
    for number, item in enumerate(objects, 1):
        if not isinstance(item, dict) or fields.image not in item or fields.caption not in item:
            problem = f"object {number} is not JSON with {fields.image} and {fields.caption}"
            parsed.rows.append(CaptionRow(str(item)[:60], "", problem=problem))
            continue
        for text in _as_list(item[fields.caption]):
            parsed.rows.append(CaptionRow(item[fields.image], text, split=item.get(fields.split)))
    parse_splits(parsed, f"{path}: field {fields.split}")
    return parsed


def _as_list(captions: Any) -> list[Any]:
    """Returns the captions of an image, one or several, as a list; Karpathy's sentences by their `raw`."""
    captions = captions if isinstance(captions, list) else [captions]
    return [item.get("raw", item) if isinstance(item, dict) else item for item in captions or [None]]


def is_mapping(content: Any, options: ReadOptions) -> bool:
    """Tells whether JSON maps names of images to their captions."""
    if not isinstance(content, dict) or not content:
        return False
    lists = [value for value in content.values() if isinstance(value, list) and any(isinstance(t, str) for t in value)]
    texts = [name for name, value in content.items() if isinstance(value, str) and is_image_file(name)]
    return len(lists) + len(texts) > len(content) / 2


def read_mapping(path: Path | str, content: Any, options: ReadOptions) -> Parsed:
    """Reads `{"x.jpg": ["a caption", ...], ...}`, also with one text in place of a list."""
    return Parsed([CaptionRow(name, text) for name, captions in content.items() for text in _as_list(captions)])


# Text.


def is_token_file(content: Any, options: ReadOptions) -> bool:
    """Tells whether text is like Flickr8k.token.txt."""
    return isinstance(content, str) and TOKEN_LINE.match(content.lstrip("\n")) is not None


def read_token_file(path: Path | str, content: str, options: ReadOptions) -> Parsed:
    """Reads lines of `name#0<TAB>caption`, as Flickr8k, Flickr30k and Flickr8k-CN have them."""
    parsed = Parsed([])
    for number, line in enumerate(content.split("\n"), 1):
        if match := TOKEN_LINE.fullmatch(line):
            parsed.rows.append(CaptionRow(match[1] or match[3], match[2] or match[4] or ""))
        elif line.strip():
            parsed.rows.append(CaptionRow(line[:60], "", problem=f"line {number} is not name#0<TAB>caption"))
    return parsed


# Folders.


def has_metadata(content: Any, options: ReadOptions) -> bool:
    """Tells whether content is a folder like Hugging Face's ImageFolder."""
    return isinstance(content, Folder) and bool(content.metadata_files)


def read_image_folder(path: Path | str, content: Folder, options: ReadOptions) -> Parsed:
    """Reads Hugging Face's ImageFolder: metadata.csv or metadata.jsonl beside the images, of all or of each split."""
    parsed = Parsed([], ", ".join(file.relative_to(content.path).as_posix() for file in content.metadata_files))
    for file in content.metadata_files:
        folder = PurePosixPath(file.parent.relative_to(content.path).as_posix())
        split = parse_split(folder.name)
        _, found = parse_annotations(file, options)
        for row in found.rows:
            name = f"{folder}/{row.image_path}" if isinstance(row.image_path, str) else row.image_path
            parsed.rows.append(row._replace(image_path=name, split=split or row.split))
        parsed.notes += found.notes
    return parsed


def has_caption_files(content: Any, options: ReadOptions) -> bool:
    """Tells whether content is a folder in which an image has a text file beside it."""
    return isinstance(content, Folder) and any(content.caption_files.values())


def read_caption_files(path: Path | str, content: Folder, options: ReadOptions) -> Parsed:
    """Reads a folder of images with a text file beside each: `a.jpg` and `a.txt`, whose lines are its captions."""
    parsed = Parsed([], "a .txt file beside each image")
    for image, files in content.caption_files.items():
        first_folder, _, _ = image.rpartition("/")[0].partition("/")
        split = parse_split(first_folder) or ""
        for file in files:
            try:
                lines = [line for line in read_text(file, options.encoding).split("\n") if line.strip()]
            except InputError as error:
                parsed.rows.append(CaptionRow(image, "", problem=f"a text that cannot be read ({error})"))
                continue
            parsed.rows += [CaptionRow(image, line, split=split) for line in lines or [""]]
        if not files:
            parsed.rows.append(CaptionRow(image, "", problem="an image without a .txt file beside it"))
    return parsed


# The list.


class AnnotationFormat(NamedTuple):
    """A format of annotations."""

    name: str
    matches: Callable[[Any, ReadOptions], bool]
    read: Callable[[Path | str, Any, ReadOptions], Parsed]


# The first one that matches reads the file.
FORMATS: list[AnnotationFormat] = [
    AnnotationFormat("COCO captions JSON", is_coco, read_coco),
    AnnotationFormat("Karpathy's JSON", is_karpathy, read_karpathy),
    AnnotationFormat("TextCaps JSON", is_textcaps, read_textcaps),
    AnnotationFormat("JSON Lines", is_json_lines, read_objects),
    AnnotationFormat("JSON list of objects", is_object_list, read_objects),
    AnnotationFormat("JSON mapping of names to captions", is_mapping, read_mapping),
    AnnotationFormat("lines of name#0<TAB>caption", is_token_file, read_token_file),
    AnnotationFormat("table with a header", is_table, read_table),
    AnnotationFormat("table without a header", is_headerless, read_headerless),
    AnnotationFormat("image folder with metadata", has_metadata, read_image_folder),
    AnnotationFormat("folder of images with .txt files", has_caption_files, read_caption_files),
]


def describe_unknown(path: Path | str, content: Any, options: ReadOptions) -> str:
    """Says why content has none of the formats, and what to do."""
    if isinstance(content, str) and re.search(r"https?://", content[:1000]):
        return f"{path}: it has addresses of images, the first line is {first_line(content)[:60]!r}; {DOWNLOAD_ADVICE}"
    if isinstance(content, str):
        return (
            f"{path}: not a known annotation format (docs/data.md shows them); if it is a table, its header should "
            f"have {describe_fields(options)}; its first line is {first_line(content)[:60]!r}"
        )
    if isinstance(content, Folder):
        return (
            f"{path}: expected a folder with metadata.csv or metadata.jsonl, or with a .txt file beside each image; "
            "found neither"
        )
    return (
        f"{path}: JSON without captions; expected COCO's (images, annotations), Karpathy's (images, sentences), names "
        f"of images with their captions, or a list of objects with {describe_fields(options)}"
    )


def parse_annotations(path: Path, options: ReadOptions) -> tuple[str, Parsed]:
    """Reads annotations in whichever format they have.

    Returns:
        The name of the format, and what was read.

    Raises:
        InputError: there is nothing at the path, or it has none of the formats.
    """
    content = read_content(path, options.encoding)
    for annotation_format in FORMATS:
        if annotation_format.matches(content, options):
            try:
                return annotation_format.name, annotation_format.read(path, content, options)
            except (KeyError, TypeError, IndexError, AttributeError) as error:  # of JSON
                raise InputError(
                    f"{path}: expected {annotation_format.name} (docs/data.md shows it); a field is missing or wrong: "
                    f"{error!r}"
                ) from None
    raise InputError(describe_unknown(path, content, options))
