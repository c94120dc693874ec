"""Downloads images and captions, reads them and splits them into train, val and test.

Tutorial sections: "Download and prepare the MS-COCO dataset", "Optional: limit the size of the training set",
"Split the data into training and testing".

    python data_utils.py                                               # MS-COCO 2014, a subset of 30,000 captions
    python data_utils.py --annotations captions.csv --images photos/   # your own images and captions

The result is a `CaptionDataset`. An image belongs to one split with all its captions: a split by caption would
train on the validation images.
"""

import dataclasses
import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import ClassVar

from captioning import shapes
from captioning.annotations import SPLITS, Example, read_annotations
from captioning.cli import InputError, add_quiet_option, format_bytes, log, make_parser, progress_bar, run_main
from captioning.config import DataConfig
from captioning.downloads import Archive, download, fetch_archive
from captioning.files import check_disk_space
from captioning.settings import add_options


@dataclasses.dataclass(frozen=True)
class CaptionDataset:
    """Images with their reference captions, in the splits train, val and test."""

    name: str
    image_dir: Path
    examples: tuple[Example, ...]

    def split(self, name: str) -> list[Example]:
        """Returns the examples of one split.

        Raises:
            InputError: the split has no images.
        """
        examples = [example for example in self.examples if example.split == name]
        if not examples:
            sizes = ", ".join(f"{split} {sum(e.split == split for e in self.examples)}" for split in SPLITS)
            raise InputError(
                f"the {name} split has no images (found: {sizes}); change the fractions or the split lists"
            )
        return examples

    def exclude(self, image_paths: set[str]) -> "CaptionDataset":
        """Returns the same dataset without some images, given by `Example.image_path`."""
        examples = tuple(example for example in self.examples if example.image_path not in image_paths)
        return dataclasses.replace(self, examples=examples)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of every image's path, split and captions: datasets with the same fingerprint are the same."""
        rows = json.dumps([[example.image_path, example.split, example.captions] for example in self.examples])
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


def load_dataset(config: DataConfig, with_images: bool = True) -> CaptionDataset:
    """Downloads a dataset if necessary, reads it and splits it.

    Args:
        config: which images and captions.
        with_images: whether the images are needed, or only their captions.

    Raises:
        InputError: see `read_annotations`, `assign_splits` and `download`.
    """
    source = find_source(config, with_images)
    source.fetch_annotations()
    split_files = find_split_files(config, source.annotations.parent)
    examples = source.resolve_image_paths(read_annotations(source.annotations))
    examples = assign_splits(examples, config, split_files)
    num_captions = source.default_num_captions if config.num_captions is None else config.num_captions
    if num_captions:
        examples = subsample(examples, num_captions, config.split_seed)
    if not examples:
        raise InputError(f"{source.annotations}: none of its images is in the split lists")
    if with_images:
        source.fetch_images(examples)
    return CaptionDataset(source.name, source.image_dir, tuple(examples))


# Archives and where they are.

# Plain http, since the host has no valid certificate: the sizes and MD5s of its archives are checked.
COCO_URL = "http://images.cocodataset.org"
FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"

COCO_CAPTIONS = Archive(
    "annotations_trainval2014.zip",
    f"{COCO_URL}/annotations/annotations_trainval2014.zip",
    num_bytes=252_872_794,
    md5="0a379cfc70b0e71301e0f377548639bd",
)
COCO_IMAGES = Archive(
    "train2014.zip",
    f"{COCO_URL}/zips/train2014.zip",
    num_bytes=13_510_573_713,
    md5="0da8c0bd3d6becc4dcb32757491aca88",
)
FLICKR8K_TEXT = Archive("Flickr8k_text.zip", f"{FLICKR8K_URL}/Flickr8k_text.zip")
FLICKR8K_IMAGES = Archive("Flickr8k_Dataset.zip", f"{FLICKR8K_URL}/Flickr8k_Dataset.zip")
FLICKR8K_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
COCO_IMAGE_BYTES = 165e3  # on average
ARCHIVE_THRESHOLD = 20_000  # missing COCO images from which the archive of 13 GB is faster than single files
NUM_DOWNLOADS = 16  # at the same time


# The datasets.


@dataclasses.dataclass
class DatasetSource:
    """The files of a dataset, and how they are downloaded."""

    default_num_captions: ClassVar[int] = 0  # captions to use unless the user asks for another number; 0: all

    name: str  # also of the dataset's features and its run
    image_dir: Path  # the folder that image paths begin in
    annotations: Path

    def fetch_annotations(self) -> None:
        """Makes sure that the annotation file and the split lists exist."""

    def resolve_image_paths(self, examples: list[Example]) -> list[Example]:
        """Returns the examples with their image paths as they are inside `image_dir`."""
        return examples

    def fetch_images(self, examples: list[Example]) -> None:
        """Makes sure that the images of the examples exist."""


class Coco(DatasetSource):
    """MS-COCO 2014: the training images and their captions, as in the tutorial."""

    default_num_captions = 30_000  # the tutorial's subset

    def __init__(self, folder: Path):
        super().__init__("coco", folder, folder / "annotations/captions_train2014.json")

    def fetch_annotations(self) -> None:
        """Downloads the annotation file."""
        if not self.annotations.exists():
            fetch_archive(COCO_CAPTIONS, self.image_dir, ("captions_train2014.json",))

    def resolve_image_paths(self, examples: list[Example]) -> list[Example]:
        """Adds the folder train2014/, which the annotation file does not name."""
        return [dataclasses.replace(example, image_path=f"train2014/{example.image_path}") for example in examples]

    def fetch_images(self, examples: list[Example]) -> None:
        """Downloads the images into train2014/: a few as single files, many as the archive."""
        folder = self.image_dir
        missing = [example.image_path for example in examples if not (folder / example.image_path).exists()]
        if len(missing) >= ARCHIVE_THRESHOLD:
            self._fetch_all_images(len(missing))
            missing = [image_path for image_path in missing if not (folder / image_path).exists()]
        elif missing:
            num_bytes = len(missing) * COCO_IMAGE_BYTES
            check_disk_space(folder, num_bytes, "these images of COCO", "use a smaller --num-captions or --data-dir")
            log(
                f"COCO: {len(examples) - len(missing):,} of {len(examples):,} images are in {folder}/, downloading "
                f"{len(missing):,} one by one (about {format_bytes(num_bytes)})"
            )
        if missing:
            self._fetch_single_images(missing)

    def _fetch_all_images(self, num_missing: int) -> None:
        """Downloads and unpacks the archive of all training images."""
        num_bytes = num_missing * COCO_IMAGE_BYTES
        if not (self.image_dir / COCO_IMAGES.name).exists():
            num_bytes += COCO_IMAGES.num_bytes or 0
        hint = "use --num-captions 30000 (about 1 GB) or --data-dir"
        check_disk_space(self.image_dir, num_bytes, "all of COCO", hint)
        fetch_archive(COCO_IMAGES, self.image_dir, (".jpg",))

    def _fetch_single_images(self, image_paths: list[str]) -> None:
        """Downloads images as single files, many at the same time."""

        def fetch(image_path: str) -> Path:
            return download(f"{COCO_URL}/{image_path}", self.image_dir / image_path, quiet=True)

        pool = ThreadPoolExecutor(NUM_DOWNLOADS)
        try:
            downloads = pool.map(fetch, image_paths)
            for _ in progress_bar(downloads, total=len(image_paths), unit="image", desc="COCO images"):
                pass
        finally:
            pool.shutdown(cancel_futures=True)  # do not wait for the rest after an error or Ctrl-C


class Flickr8k(DatasetSource):
    """Flickr8k: 8,000 images with five captions each, and the lists of its usual split."""

    def __init__(self, folder: Path):
        super().__init__("flickr8k", folder / "Flicker8k_Dataset", folder / "Flickr8k.token.txt")
        self.folder = folder

    def fetch_annotations(self) -> None:
        """Downloads the captions and the split lists."""
        names = (self.annotations.name, *FLICKR8K_SPLIT_FILES.values())
        if not all((self.folder / name).exists() for name in names):
            fetch_archive(FLICKR8K_TEXT, self.folder, (".token.txt", "Images.txt"))

    def fetch_images(self, examples: list[Example]) -> None:
        """Downloads all images, unless those of the examples exist."""
        if not all((self.image_dir / example.image_path).exists() for example in examples):
            fetch_archive(FLICKR8K_IMAGES, self.folder, (".jpg",))


class Shapes(DatasetSource):
    """The toy dataset, which is drawn instead of downloaded."""

    def __init__(self, folder: Path):
        super().__init__("shapes", folder, folder / shapes.ANNOTATIONS)

    def fetch_annotations(self) -> None:
        """Draws the images and writes the annotation file."""
        shapes.draw_dataset(self.image_dir)


class UserFiles(DatasetSource):
    """The user's own annotation file and image folder; without a folder, the one of the annotation file."""

    def __init__(self, annotations: Path, image_dir: Path | None):
        self.has_image_dir = image_dir is not None
        image_dir = image_dir or annotations.parent
        super().__init__(image_dir.resolve().name, image_dir, annotations)
        if not image_dir.is_dir():
            raise InputError(f"{image_dir}: no such image folder")

    def resolve_image_paths(self, examples: list[Example]) -> list[Example]:
        """Removes the folders of image paths if the image folder has none of them.

        Karpathy's COCO names train2014/ and val2014/, but the images may lie in one folder. Raises InputError if two
        images have the same name without their folders.
        """
        folders = {PurePosixPath(example.image_path).parent for example in examples}
        if not self.has_image_dir or any((self.image_dir / folder).is_dir() for folder in folders):
            return examples
        examples = [
            dataclasses.replace(example, image_path=PurePosixPath(example.image_path).name) for example in examples
        ]
        if len({example.image_path for example in examples}) < len(examples):
            raise InputError(
                f"{self.image_dir}: has none of the folders that {self.annotations} names, and without them its "
                "names clash"
            )
        return examples


DATASETS: dict[str, Callable[[Path], DatasetSource]] = {"coco": Coco, "flickr8k": Flickr8k, "shapes": Shapes}


def find_source(config: DataConfig, with_images: bool) -> DatasetSource:
    """Returns the source that the settings name; raises InputError if they do not fit together."""
    if config.annotations:
        if with_images and not config.images:
            raise InputError("--annotations needs --images DIR, the folder its images are in")
        return UserFiles(Path(config.annotations), Path(config.images) if config.images else None)
    if config.images:
        raise InputError("--images needs --annotations FILE, the captions of its images")
    if config.dataset is None:
        raise InputError("expected --dataset or --annotations, found neither")
    return DATASETS[config.dataset](Path(config.data_dir or "data") / config.dataset)


# Limiting and splitting.


def subsample(examples: Sequence[Example], num_captions: int, seed: int) -> list[Example]:
    """Returns random images, in the order of `examples`, until they have at least `num_captions` captions."""
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    chosen: list[int] = []
    count = 0
    for index in order:
        if count >= num_captions:
            break
        chosen.append(index)
        count += len(examples[index].captions)
    return [examples[index] for index in sorted(chosen)]


def find_split_files(config: DataConfig, folder: Path) -> dict[str, Path]:
    """Returns the lists of image names that define the split: those of the settings, else Flickr8k's in a folder."""
    given = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    split_files = {split: Path(path) for split, path in given.items() if path}
    if split_files:
        return split_files
    default_files = {split: folder / name for split, name in FLICKR8K_SPLIT_FILES.items()}
    if not (default_files["train"].exists() and default_files["val"].exists()):
        return {}
    split_files = {split: path for split, path in default_files.items() if path.exists()}
    log(f"split: the dataset's own lists, {', '.join(path.name for path in split_files.values())}")
    return split_files


def assign_splits(examples: Sequence[Example], config: DataConfig, split_files: dict[str, Path]) -> list[Example]:
    """Assigns every image to a split: by the lists, else as the annotations have it, else at random.

    Images that no list names are left out. `split_files` has the lists by split, and is empty without lists.

    Raises:
        InputError: a list is missing, unreadable or empty, or names an image of another list; the fractions are not
            valid; or the images are too few.
    """
    if split_files:
        return _split_by_lists(examples, split_files)
    if any(example.split for example in examples):
        return [example for example in examples if example.split in SPLITS]
    return _split_at_random(examples, config)


def _split_at_random(examples: Sequence[Example], config: DataConfig) -> list[Example]:
    """Splits by the fractions and the seed of the settings."""
    from sklearn.model_selection import train_test_split  # slow to import, and often not needed

    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    if not (min(fractions.values()) >= 0 and sum(fractions.values()) < 1):
        raise InputError(f"the fractions of val and test must be at least 0 and sum to less than 1, found {fractions}")
    split_of: dict[str, str] = {}
    rest = [example.image_path for example in examples]
    for split, fraction in fractions.items():
        size = max(1, round(fraction * len(examples))) if fraction else 0
        if size >= len(rest):
            raise InputError(f"{len(examples)} images are too few to split into train, val and test")
        if size:
            rest, held_out = train_test_split(rest, test_size=size, random_state=config.split_seed)
            split_of.update(dict.fromkeys(held_out, split))
    return [dataclasses.replace(example, split=split_of.get(example.image_path, "train")) for example in examples]


def _split_by_lists(examples: Sequence[Example], split_files: dict[str, Path]) -> list[Example]:
    """Splits by lists of image names; a name may leave out the image's folder."""
    missing = {"train", "val"} - set(split_files)
    if missing:
        raise InputError(f"split lists need at least train and val, missing: {', '.join(sorted(missing))}")
    known = {name for example in examples for name in _names_of(example)}
    split_of: dict[str, str] = {}
    for split, path in split_files.items():
        names = _read_split_file(path, split)
        unknown = [name for name in names if name not in known]
        if unknown:
            log(f"{path}: {len(unknown):,} images without captions are left out, the first: {unknown[0]!r}")
        for name in names:
            if split_of.setdefault(name, split) != split:
                raise InputError(f"{path}: {name} is in the {split} list and in the {split_of[name]} list")
    result = []
    for example in examples:
        split = next((split_of[name] for name in _names_of(example) if name in split_of), "")
        if split:
            result.append(dataclasses.replace(example, split=split))
    return result


def _names_of(example: Example) -> tuple[str, str]:
    """Returns the names that a list may give an image, the one that decides first."""
    return example.image_path, PurePosixPath(example.image_path).name


def _read_split_file(path: Path, split: str) -> list[str]:
    """Returns the image names of a list, one a line; raises InputError if it is unreadable or empty."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot read the {split} list ({error})") from None
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise InputError(f"{path}: the {split} list is empty; expected names of images, one a line")
    return names


def main(argv: list[str] | None = None) -> None:
    """Downloads and reads a dataset, and prints the sizes of its splits and an example."""
    parser = make_parser(__doc__)
    add_options(parser.add_argument_group("data"), DataConfig)
    add_quiet_option(parser)
    dataset = load_dataset(DataConfig.from_args(parser.parse_args(argv)))
    for split in SPLITS:
        examples = [example for example in dataset.examples if example.split == split]
        print(f"{split:5} {len(examples):7,} images {sum(len(e.captions) for e in examples):8,} captions")
    example = random.Random(0).choice(dataset.examples)
    print(f"{dataset.image_dir / example.image_path}:", *example.captions, sep="\n  ")


if __name__ == "__main__":
    run_main(main)
