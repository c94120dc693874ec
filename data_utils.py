"""Pictures and their captions: download, read, check and split them.

    python data_utils.py                                  # MS-COCO 2014, as many pictures as 30,000 captions need
    python data_utils.py --annotations captions.csv --images photos/

Every data set ends as a `Dataset`: examples (picture, captions) in the splits train, val and test. A
picture belongs to one split with all its captions; a split by caption would show the validation pictures
to the training.
"""

import argparse
import csv
import dataclasses
import functools
import hashlib
import io
import json
import random
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Any

import shapes
from common import (
    InputError,
    add_quiet,
    at_least,
    in_words,
    make_parser,
    need_room,
    parse_json,
    progress_bar,
    run_command,
    say,
)
from downloads import download, unpack

SPLITS = ("train", "val", "test")
PRESETS = ("coco", "flickr8k", "shapes")

# Plain http, since the host has no valid certificate: the size and the MD5 of the archives are checked.
COCO = "http://images.cocodataset.org"
FLICKR8K = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
ARCHIVES: dict[str, tuple[str, int | None, str | None]] = {  # file: address, bytes, MD5
    "annotations_trainval2014.zip": (
        f"{COCO}/annotations/annotations_trainval2014.zip",
        252_872_794,
        "0a379cfc70b0e71301e0f377548639bd",
    ),
    "train2014.zip": (f"{COCO}/zips/train2014.zip", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
    "Flickr8k_Dataset.zip": (f"{FLICKR8K}/Flickr8k_Dataset.zip", None, None),
    "Flickr8k_text.zip": (f"{FLICKR8K}/Flickr8k_text.zip", None, None),
}
SPLIT_LISTS = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
COCO_PICTURE = 165e3  # bytes, on average
ZIP_FROM = 20_000  # missing COCO pictures from which the 13 GB archive is quicker than single files


@dataclasses.dataclass(frozen=True)
class Example:
    """One picture with its captions."""

    image: str  # the picture's path inside the image folder, with forward slashes; also names its features
    captions: tuple[str, ...]
    image_id: int  # COCO's id, or the picture's place in the annotation file
    split: str = ""  # train, val or test; empty while undecided


@dataclasses.dataclass(frozen=True)
class DataOptions:
    """Which data to use; saved in a run's config.json, so that the same split can be made again."""

    dataset: str | None = "coco"
    annotations: str | None = None
    images: str | None = None
    train_list: str | None = None
    val_list: str | None = None
    test_list: str | None = None
    num_captions: int | None = None  # None: 30,000 of COCO, all of the others; 0: all
    val_fraction: float = 0.1
    test_fraction: float = 0.1
    split_seed: int = 0
    data_dir: str = "data"

    def __post_init__(self):
        if self.dataset not in (*PRESETS, None):
            raise InputError(f"dataset: expected {', '.join(PRESETS)}, found {self.dataset!r}")
        if (self.num_captions or 0) < 0:
            raise InputError(f"num_captions: expected at least 0, found {self.num_captions}")
        if not 0 <= self.split_seed < 2**32:  # NumPy's seeds
            raise InputError(f"split_seed: expected at least 0 and less than {2**32}, found {self.split_seed}")


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Examples in their splits, and the folder their pictures are in."""

    name: str
    images: Path
    examples: tuple[Example, ...]

    def split(self, name: str) -> list[Example]:
        """The examples of one split.

        Raises:
            InputError: the split has no picture.
        """
        found = [example for example in self.examples if example.split == name]
        if not found:
            sizes = ", ".join(f"{split} {sum(e.split == split for e in self.examples)}" for split in SPLITS)
            raise InputError(
                f"the {name} split has no picture (found: {sizes}); change the fractions or the split lists"
            )
        return found

    def without(self, unreadable: set[str]) -> "Dataset":
        """The same data set less some pictures."""
        return dataclasses.replace(self, examples=tuple(e for e in self.examples if e.image not in unreadable))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of every picture's name, split and captions: two data sets that share it are the same."""
        rows = json.dumps([[e.image, e.split, e.captions] for e in self.examples])
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


# Reading annotations: four formats, told apart by what is in the file.


def read_annotations(path: Path | str) -> list[Example]:
    """Reads the captions of a file in any of four formats, told apart by content.

    COCO's captions JSON; Karpathy's dataset_*.json (with its split); a CSV with the header `image,caption`;
    Flickr8k's `name#0<TAB>caption`. Captions without a word are named and left out, and so are pictures left
    without any.

    Raises:
        InputError: no such file, none of these formats, no usable caption, a picture's name that leads out of the
            image folder, or a split or an id that cannot be.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (FileNotFoundError, IsADirectoryError):
        raise InputError(f"{path}: no such annotation file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected text in UTF-8 ({error}); save it as UTF-8") from None
    if text.lstrip()[:1] in ("{", "["):
        rows = _rows_from_json(path, parse_json(path, text))
    elif re.match(r"[^\t\n]+#\d+\t", text):
        rows = [(*_split_token_line(line), None, "") for line in text.split("\n") if line.strip()]
    elif text.split("\n", 1)[0].strip().lower().replace('"', "") == "image,caption":
        # An unquoted comma inside a caption makes more than two fields: they belong together.
        try:
            lines = [row for row in csv.reader(io.StringIO(text)) if "".join(row).strip()][1:]
        except csv.Error as error:
            raise InputError(f"{path}: not a CSV that can be read ({error}); is a quote left open?") from None
        # Many lines in one field, or one that begins as a line of its own does.
        if torn := next((row for row in lines if re.search(r"\n[^,\n]*\.\w+,|(\n.*){3}", ",".join(row))), None):
            raise InputError(f"{path}: the caption of {torn[0][:60]!r} runs over other lines; close its quote")
        rows = [(row[0].strip(), ",".join(row[1:]), None, "") for row in lines]
    else:
        raise InputError(
            f"{path}: not a known annotation format; expected COCO captions JSON, Karpathy's dataset_*.json, a CSV "
            f"whose first line is image,caption, or lines of name#0<TAB>caption; its first line is {text[:60]!r}"
        )
    return _group_by_image(path, rows)


def _split_token_line(line: str) -> tuple[str, str]:
    name, _, caption = line.partition("\t")
    return name.rsplit("#", 1)[0], caption


def _rows_from_json(path: Path | str, content: Any) -> list[tuple[str, str, Any, Any]]:
    """Rows (image, caption, id, split) of COCO's or Karpathy's JSON."""
    try:
        if "annotations" in content:
            names = {image["id"]: image["file_name"] for image in content["images"]}
            return [(names[a["image_id"]], a["caption"], a["image_id"], "") for a in content["annotations"]]
        if "sentences" in content["images"][0]:
            return [
                (
                    str(PurePosixPath(image.get("filepath", "")) / image["filename"]),
                    sentence["raw"],
                    image.get("cocoid"),
                    "train" if image["split"] == "restval" else image["split"] or None,  # an empty one is none of ours
                )
                for image in content["images"]
                for sentence in image["sentences"] or [{"raw": ""}]
            ]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(
            f"{path}: neither COCO's captions JSON (images, annotations) nor Karpathy's (images, sentences): {error!r}"
        ) from None
    raise InputError(f"{path}: JSON without captions; expected COCO's `annotations` or Karpathy's `sentences`")


def _group_by_image(path: Path | str, rows: list[tuple[str, str, Any, Any]]) -> list[Example]:
    """One Example per picture, in the order of the file."""
    captions: dict[str, list[str]] = {}
    about: dict[str, tuple[int | None, str]] = {}
    skipped = []
    for image, caption, image_id, split in rows:
        if not isinstance(image, str) or not isinstance(caption, str):
            raise InputError(f"{path}: expected text for picture and caption, found {image!r} and {caption!r}")
        if not image or PurePosixPath(image).is_absolute() or ".." in PurePosixPath(image).parts or "\\" in image:
            raise InputError(f"{path}: picture name {image!r} leads out of the image folder; expected a name inside it")
        if type(image_id) not in (int, str, type(None)) or split not in ("", *SPLITS):
            raise InputError(
                f"{path}: {image}: expected an id, and the split train, restval, val or test; found the id "
                f"{image_id!r} and the split {split!r}"
            )
        try:
            f"{image} {caption}".encode()
        except UnicodeEncodeError:  # JSON can write half of a character
            raise InputError(f"{path}: a caption of {image!r} is not Unicode text: {caption!r}") from None
        if re.search(r"[^\W_]", caption):
            captions.setdefault(image, []).append(" ".join(caption.split()))
            about.setdefault(image, (image_id, split))
        else:
            skipped.append(f"{image!r} {caption[:60]!r}")
    if not captions:
        raise InputError(f"{path}: no usable caption in {len(rows)} rows; expected at least one word per caption")
    for row in skipped:
        say(f"skipped {path}: a caption without a word: {row}")
    ids: dict[str, str] = {}
    examples = []
    for number, (image, texts) in enumerate(captions.items()):
        image_id, split = about[image]
        example = Example(image, tuple(texts), number if image_id is None else image_id, split)
        if (other := ids.setdefault(str(example.image_id), image)) != image:
            raise InputError(f"{path}: {other} and {image} have the same id, {example.image_id}")
        examples.append(example)
    return examples


# Choosing and splitting.


def choose(examples: list[Example], num_captions: int, seed: int) -> list[Example]:
    """Random whole pictures, in the file's order, until they have at least `num_captions` captions."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    chosen, count = [], 0
    for index in order:
        if count >= num_captions:
            break
        chosen.append(index)
        count += len(examples[index].captions)
    return [examples[index] for index in sorted(chosen)]


def assign_splits(examples: list[Example], options: DataOptions, lists: dict[str, Path]) -> list[Example]:
    """Gives every picture its split: by the lists, else the data set's own, else seeded by scikit-learn.

    Pictures that no list names are left out.
    """
    if lists:
        return _split_by_lists(examples, lists)
    if any(example.split for example in examples):
        return [example for example in examples if example.split in SPLITS]
    from sklearn.model_selection import train_test_split  # slow to import, and needed here only

    fractions = {"test": options.test_fraction, "val": options.val_fraction}
    if not (min(fractions.values()) >= 0 and sum(fractions.values()) < 1):  # also not a number
        raise InputError(f"the fractions of val and test must be at least 0 and sum to less than 1, found {fractions}")
    split = {}
    rest = [example.image for example in examples]
    for name, fraction in fractions.items():
        size = max(1, round(fraction * len(examples))) if fraction else 0
        if size >= len(rest):
            raise InputError(f"{len(examples)} pictures are too few to split into train, val and test")
        if size:
            rest, held_out = train_test_split(rest, test_size=size, random_state=options.split_seed)
            split.update(dict.fromkeys(held_out, name))
    return [dataclasses.replace(example, split=split.get(example.image, "train")) for example in examples]


def _split_by_lists(examples: list[Example], lists: dict[str, Path]) -> list[Example]:
    if missing := {"train", "val"} - set(lists):
        raise InputError(f"split lists need at least train and val, missing: {', '.join(sorted(missing))}")
    split: dict[str, str] = {}
    known = {name for example in examples for name in (example.image, PurePosixPath(example.image).name)}
    for name, path in lists.items():
        try:
            images = path.read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{path}: cannot read the {name} list ({error})") from None
        if not (images := list(filter(None, map(str.strip, images)))):
            raise InputError(f"{path}: the {name} list is empty; expected names of pictures, one a line")
        if unknown := [image for image in images if image not in known]:
            say(f"{path}: {len(unknown):,} pictures without captions are left out, the first: {unknown[0]!r}")
        for image in images:
            if split.setdefault(image, name) != name:
                raise InputError(f"{path}: {image} is in the {name} list and in the {split[image]} list")
    return [
        dataclasses.replace(example, split=found)
        for example in examples
        if (found := split.get(example.image) or split.get(PurePosixPath(example.image).name))
    ]


# Downloading what a preset needs.


def _fetch_archive(name: str, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Downloads, unpacks and removes one archive; one put there by hand is used, and kept."""
    by_hand = (folder / name).exists()
    url, size, md5 = ARCHIVES[name]
    if not by_hand:
        gigabytes = f", {in_words(size)}," if size else ""
        say(f"downloading {name}{gigabytes} into {folder}/; it is deleted once it is unpacked")
    unpack(download(url, folder / name, size, md5), folder, suffixes)
    if not by_hand:
        (folder / name).unlink()


def _fetch_coco_images(folder: Path, examples: list[Example]) -> None:
    """The pictures of these examples into train2014/: a few as single files, many as the archive."""
    missing = [example.image for example in examples if not (folder / example.image).exists()]
    size = len(missing) * COCO_PICTURE
    if len(missing) >= ZIP_FROM:
        if not (folder / "train2014.zip").exists():
            size += ARCHIVES["train2014.zip"][1] or 0
        need_room(folder, size, "all of COCO", "use --num-captions 30000 (about 1 GB) or --data-dir")
        _fetch_archive("train2014.zip", folder, (".jpg",))
        missing = [name for name in missing if not (folder / name).exists()]
    elif missing:
        need_room(folder, size, "these pictures of COCO", "use a smaller --num-captions or --data-dir")
        found = len(examples) - len(missing)
        say(
            f"COCO: {found:,} of {len(examples):,} pictures are in {folder}/, downloading {len(missing):,} one by one "
            f"(about {in_words(size)})"
        )
    fetch = lambda name: download(f"{COCO}/{name}", folder / name, quiet=True)
    pool = ThreadPoolExecutor(16)
    try:
        for _ in progress_bar(
            pool.map(fetch, missing), total=len(missing), unit="picture", desc="COCO pictures", disable=not missing
        ):
            pass
    finally:
        pool.shutdown(cancel_futures=True)


# Putting it together.


def load_dataset(options: DataOptions, pictures: bool = True) -> Dataset:
    """The data set these options name: downloaded if need be, read, and split.

    Args:
        options: which data.
        pictures: whether the pictures are needed, or only what people wrote about them.

    Raises:
        InputError: see `read_annotations`, `assign_splits` and `download`.
    """
    lists = {s: Path(p) for s in SPLITS if (p := getattr(options, f"{s}_list"))}
    root = Path(options.data_dir) / (options.dataset or "")
    if options.annotations:
        if pictures and not options.images:
            raise InputError("--annotations needs --images DIR, the folder its pictures are in")
        annotations = Path(options.annotations)
        images = Path(options.images) if options.images else annotations.parent
        name = images.resolve().name
        if not images.is_dir():
            raise InputError(f"{images}: no such image folder")
    elif options.images:
        raise InputError("--images needs --annotations FILE, the captions of its pictures")
    elif options.dataset == "coco":
        name, images, annotations = "coco", root, root / "annotations/captions_train2014.json"
        if not annotations.exists():
            _fetch_archive("annotations_trainval2014.zip", root, ("captions_train2014.json",))
    elif options.dataset == "flickr8k":
        name, images, annotations = "flickr8k", root / "Flicker8k_Dataset", root / "Flickr8k.token.txt"
        if not all((root / file).exists() for file in (annotations.name, *SPLIT_LISTS.values())):
            _fetch_archive("Flickr8k_text.zip", root, (".token.txt", "Images.txt"))
    else:
        name, images, annotations = "shapes", root, shapes.draw_dataset(root)
    beside = {split: annotations.parent / list_name for split, list_name in SPLIT_LISTS.items()}
    if not lists and beside["train"].exists() and beside["val"].exists():
        lists = {split: path for split, path in beside.items() if path.exists()}
        say(f"split: the data set's own lists, {', '.join(path.name for path in lists.values())}")

    examples = read_annotations(annotations)
    if name == "coco" and not options.annotations:
        examples = [dataclasses.replace(example, image=f"train2014/{example.image}") for example in examples]
    elif (pictures or options.images) and not any(
        (images / folder).is_dir() for folder in {PurePosixPath(e.image).parent for e in examples}
    ):
        # Karpathy's COCO names train2014/ and val2014/; the pictures may also lie in one folder.
        examples = [dataclasses.replace(example, image=PurePosixPath(example.image).name) for example in examples]
        if len({example.image for example in examples}) < len(examples):
            raise InputError(
                f"{images}: has none of the folders that {annotations} names, and without them its names clash"
            )
    examples = assign_splits(examples, options, lists)
    default = 30_000 if name == "coco" and not options.annotations else 0
    if limit := default if options.num_captions is None else options.num_captions:
        examples = choose(examples, limit, options.split_seed)
    if not examples:
        raise InputError(f"{annotations}: none of its pictures is in the split lists")
    if pictures and not options.annotations:
        if name == "coco":
            _fetch_coco_images(root, examples)
        elif name == "flickr8k" and not all((images / e.image).exists() for e in examples):
            _fetch_archive("Flickr8k_Dataset.zip", root, (".jpg",))
    return Dataset(name, images, tuple(examples))


# The command.


def add_arguments(
    parser: argparse.ArgumentParser, title: str = "data", preset: str | None = DataOptions.dataset
) -> None:
    """The options of the data, for every script that reads them."""

    def count(text: str) -> int:
        return 0 if text == "all" else at_least(1)(text)

    default = DataOptions()
    group = parser.add_argument_group(title)
    known = "a known data set" + " (default: %(default)s)" * bool(preset)
    group.add_argument("--dataset", choices=PRESETS, default=preset, help=known)
    group.add_argument(
        "--annotations",
        metavar="FILE",
        help="your own captions instead: COCO JSON, Karpathy's JSON, "
        "CSV with the header image,caption, or name#0<TAB>caption",
    )
    group.add_argument("--images", metavar="DIR", help="the folder of the pictures that --annotations names")
    group.add_argument(
        "--num-captions",
        type=count,
        metavar="N|all",
        help="captions to use, of whole pictures chosen at random (default: 30000 of coco, all of the others)",
    )
    for split in SPLITS:
        group.add_argument(f"--{split}-list", metavar="FILE", help=f"names of the {split} pictures, one a line")
    group.add_argument(
        "--val-fraction",
        type=float,
        metavar="X",
        default=default.val_fraction,
        help="share of the pictures that chooses the best epoch, without lists (default: %(default)s)",
    )
    group.add_argument(
        "--test-fraction",
        type=float,
        metavar="X",
        default=default.test_fraction,
        help="share of the pictures kept aside, without lists (default: %(default)s)",
    )
    group.add_argument(
        "--split-seed",
        type=at_least(0),
        metavar="N",
        default=default.split_seed,
        help="seed of the split, and of the captions chosen (default: %(default)s)",
    )
    group.add_argument(
        "--data-dir",
        metavar="DIR",
        default=default.data_dir,
        help="folder for downloaded data sets (default: %(default)s)",
    )


def options_from(args: argparse.Namespace) -> DataOptions:
    """The data options of a parsed command line."""
    return DataOptions(**{field.name: getattr(args, field.name) for field in dataclasses.fields(DataOptions)})


def main(argv: list[str] | None = None) -> None:
    """Downloads and reads a data set, and says what is in it."""
    parser = make_parser(__doc__)
    add_arguments(parser)
    add_quiet(parser)
    dataset = load_dataset(options_from(parser.parse_args(argv)))
    for split in SPLITS:
        examples = [example for example in dataset.examples if example.split == split]
        print(f"{split:5} {len(examples):7,} pictures {sum(len(e.captions) for e in examples):8,} captions")
    example = random.Random(0).choice(dataset.examples)
    print(f"{dataset.images / example.image}:", *example.captions, sep="\n  ")


if __name__ == "__main__":
    run_command(main)
