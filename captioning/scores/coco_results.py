"""Reads captions that another program made, in the format of COCO's results, and finds the images they belong to."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from captioning.base.cli import InputError
from captioning.base.files import read_json
from captioning.base.text import normalize_text
from captioning.data.annotations import Example


def read_results(path: Path) -> dict[int | str, str]:
    """Reads a COCO results file.

    Returns:
        The captions by `image_id`, as the file has it: a number or a text.

    Raises:
        InputError: it is not such a file, or has two captions of one id.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(map(_is_result, rows)):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    results: dict[int | str, str] = {}
    for row in rows:
        image_id, caption = row["image_id"], normalize_text(row["caption"])
        if image_id in results:
            raise InputError(f"{path}: expected one caption for each image, found two of image_id {image_id}")
        try:
            f"{image_id} {caption}".encode()
        except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
            raise InputError(f"{path}: the caption of image_id {image_id} is not Unicode text: {caption!r}") from None
        results[image_id] = caption
    return results


def _is_result(row: Any) -> bool:
    """Tells whether a row of JSON is a caption with the number or the name of its image."""
    if not isinstance(row, dict):
        return False
    image_id = row.get("image_id")
    return type(image_id) in (int, str) and isinstance(row.get("caption"), str)  # True and False are ints, too


class ImageIndex:
    """Finds images by what results call them: a number is an id; a text is an id, or the image's path, name or stem.

    Leading zeros of an id do not count. Of a path, a name and a stem, the longest that fits decides.
    """

    def __init__(self, examples: Sequence[Example]):
        self.by_id: defaultdict[str, set[Example]] = defaultdict(set)
        self.by_path: defaultdict[str, set[Example]] = defaultdict(set)
        self.by_name: defaultdict[str, set[Example]] = defaultdict(set)
        self.by_stem: defaultdict[str, set[Example]] = defaultdict(set)
        for example in examples:
            image_id, path = str(example.image_id), PurePosixPath(example.image_path)
            self.by_id[image_id].add(example)
            self.by_id[_without_zeros(image_id)].add(example)
            self.by_path[example.image_path].add(example)
            self.by_name[path.name].add(example)
            self.by_stem[path.stem].add(example)

    def find(self, image_id: int | str) -> Example | None:
        """Returns the image that an id or a name means, or None.

        Raises:
            InputError: it means several images.
        """
        text = str(image_id)
        found = self.by_id.get(text) or self.by_id.get(_without_zeros(text), set())
        if isinstance(image_id, str):
            found = found | (self.by_path.get(text) or self.by_name.get(text) or self.by_stem.get(text, set()))
        if len(found) > 1:
            first, second = sorted(f"{example.image_path} (id {example.image_id})" for example in found)[:2]
            raise InputError(
                f"image_id {image_id!r} means {len(found)} images, such as {first} and {second}; expected ids as "
                "numbers, or paths as the data have them"
            )
        return next(iter(found), None)


def _without_zeros(text: str) -> str:
    """Returns a number without leading zeros, and any other text as it is."""
    if not (text.isascii() and text.isdecimal()):
        return text
    return text.lstrip("0") or "0"


def match_results(
    path: Path, results: dict[int | str, str], examples: Sequence[Example]
) -> tuple[dict[Example, str], list[int | str]]:
    """Finds the images that captions belong to.

    Args:
        path: of the results, for messages.
        results: see `read_results`.
        examples: all images of the data.

    Returns:
        The captions by image; and the ids of those that belong to none of the images.

    Raises:
        InputError: an id or a name means several images, or two of them mean the same image.
    """
    index = ImageIndex(examples)
    texts: dict[Example, str] = {}
    strangers: list[int | str] = []
    for image_id, text in results.items():
        try:
            example = index.find(image_id)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if example is None:
            strangers.append(image_id)
        elif example in texts:
            raise InputError(
                f"{path}: expected one caption for each image, found two of image_id {example.image_id} "
                f"({example.image_path}), the second as {image_id!r}"
            )
        else:
            texts[example] = text
    return texts, strangers
