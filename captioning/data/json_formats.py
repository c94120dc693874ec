"""The formats of annotations in JSON, each with its reader; see `annotation_formats`."""

from pathlib import PurePosixPath
from typing import Any
from urllib.parse import unquote, urlsplit

from captioning.data.caption_rows import CaptionRow, Parsed, ReadOptions, drop_empty, find_fields, parse_split
from captioning.images.reading import is_image_file


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
    id_of: dict[str, str] = {}  # of names in addresses
    for image in content["images"]:
        if "://" in image.get("file_name", "://"):
            image = image | {"file_name": _name_in_address(image)}
            details = "names from the images' addresses"
            if (other := id_of.setdefault(image["file_name"], str(image["id"]))) != str(image["id"]):
                raise ValueError(f"the addresses of the images {other} and {image['id']} end in the same name")
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
    for field in ("file_name", "coco_url", "flickr_url", "url"):
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
        captions = [caption for value in drop_empty([item[name] for name in names]) for caption in _as_list(value)]
        images = _as_list(item[fields.image])
        num_shared += len(images) > 1
        rows += [CaptionRow(image, text, split=item.get(fields.split)) for image in images for text in captions]
    shared = f"; {num_shared:,} objects have several images, each with all captions" if num_shared else ""
    return Parsed(rows, "fields {}{}".format(*fields.describe()) + shared)


def _are_objects(items: Any) -> bool:
    return isinstance(items, list) and all(isinstance(item, dict) for item in items)


def read_mapping(content: Any, options: ReadOptions) -> Parsed | None:
    """Reads `{"x.jpg": ["a caption", ...], ...}`, also with one text in place of a list."""
    if not isinstance(content, dict):
        return None
    name, captions = next((item for item in content.items() if item[1]), ("", None))
    is_text = isinstance(captions, str) and is_image_file(name)
    is_list = isinstance(captions, list) and bool(captions) and isinstance(captions[0], str)
    if not (is_text or is_list):
        return None
    return Parsed([CaptionRow(name, caption) for name, value in content.items() for caption in _as_list(value)])


def _as_list(value: Any) -> list[Any]:
    """Returns captions or images, one or several, as a list; an empty list becomes an empty text."""
    return value or [""] if isinstance(value, list) else [value]
