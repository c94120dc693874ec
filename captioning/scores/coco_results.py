"""Reads captions that another program made, in the format of COCO's results."""

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from captioning.base.cli import InputError, log
from captioning.base.files import read_json
from captioning.base.text import normalize_text, strip_marks
from captioning.data.annotations import Example


class ImageIndex:
    """Finds images by what results call them: a number is an id; a text is an id, or the image's path, name or stem.

    Leading zeros of an id do not count. Of a path, a name and a stem, the longest that fits decides.
    """

    def __init__(self, examples: Sequence[Example]):
        self.images: defaultdict[tuple[str, str], set[Example]] = defaultdict(set)
        for example in examples:
            path = PurePosixPath(example.image_path)
            self.images["id", _without_zeros(example.image_id)].add(example)
            self.images["path", str(path)].add(example)
            self.images["name", path.name].add(example)
            self.images["stem", path.stem].add(example)

    def find(self, image_id: int | str) -> Example | None:
        """Returns the image that an id or a name means, or None; raises InputError if it means several."""
        found = self.images.get(("id", _without_zeros(image_id)), set())
        if isinstance(image_id, str):
            named = (self.images.get((kind, image_id)) for kind in ("path", "name", "stem"))
            found = found | next(filter(None, named), set())
        if len(found) > 1:
            first, second = sorted(f"{example.image_path} (id {example.image_id})" for example in found)[:2]
            raise InputError(
                f"image_id {image_id!r} means {len(found)} images, such as {first} and {second}; expected ids as "
                "numbers, or paths as the data have them"
            )
        return next(iter(found), None)


def _without_zeros(image_id: int | str) -> str:
    text = str(image_id)
    return text.lstrip("0") or text[-1:]


def read_results(path: Path, examples: Sequence[Example], all_examples: Sequence[Example] = ()) -> list[str]:
    """Reads the captions of some images from a COCO results file.

    Captions of other images of the data are left out; so are those of no image at all, which may be a mistake in the
    ids. Both are logged.

    Args:
        path: the file.
        examples: the images.
        all_examples: the images of all splits; by default `examples`.

    Returns:
        The caption of each image.

    Raises:
        InputError: it is not such a file; an image has no caption or two; or an id means several images.
    """
    rows = read_json(path)
    if not isinstance(rows, list) or not all(map(_is_result, rows)):
        raise InputError(f'{path}: not COCO results; expected a list of {{"image_id": ..., "caption": "..."}}')
    texts, note = strip_marks([normalize_text(row["caption"]) for row in rows])
    if note:
        log(f"{path}: {note}")
    index = ImageIndex(all_examples or examples)
    captions: dict[Example, str] = {}
    strangers = []
    for row, caption in zip(rows, texts, strict=True):
        image_id = row["image_id"]
        try:
            example = index.find(image_id)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if example is None:
            strangers.append(image_id)
        elif example in captions:
            raise InputError(
                f"{path}: expected one caption for each image, found two of image_id {example.image_id} "
                f"({example.image_path}), the second as {image_id!r}"
            )
        else:
            captions[example] = caption

    no_image = ""
    if strangers:
        no_image = (
            f"{len(strangers):,} of its {len(rows):,} captions belong to no image of the data, the first with image_id "
            f"{strangers[0]!r}"
        )
    if missing := [example for example in examples if example not in captions]:
        reason = f"{no_image}; expected ids, paths or file names" if no_image else "are they of this --split?"
        raise InputError(
            f"{path}: no caption of {len(missing):,} of the {len(examples):,} images, the first with image_id "
            f"{missing[0].image_id} ({missing[0].image_path}); {reason}"
        )
    if no_image:
        log(f"{path}: {no_image}; left out")
    if num_others := len(captions) - len(examples):
        log(f"{path}: {num_others:,} captions of images of other splits are left out")
    return [captions[example] for example in examples]


def _is_result(row: Any) -> bool:
    """Tells whether a row of JSON is a caption with the number or the name of its image."""
    if not isinstance(row, dict):
        return False
    image_id, caption = row.get("image_id"), row.get("caption")
    if type(image_id) not in (int, str) or not isinstance(caption, str):  # True and False are ints, too
        return False
    try:
        f"{image_id} {caption}".encode()
    except UnicodeEncodeError:  # JSON can hold half of a surrogate pair
        return False
    return True
