"""Where datasets come from: the known ones, which are downloaded or drawn, and the user's own files."""

import dataclasses
import functools
import os
from collections.abc import Callable, Container, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import ClassVar, NamedTuple

from captioning.base.cli import InputError, advise, format_bytes, log, progress_bar
from captioning.base.downloads import Archive, bytes_to_download, download, fetch_archive
from captioning.base.files import check_disk_space
from captioning.config.settings import DataConfig
from captioning.data import shapes
from captioning.data.annotations import NUM_NAMED, Example, read_annotations, rename_images
from captioning.data.caption_rows import ReadOptions
from captioning.images.image_names import find_clash, find_images

# Plain http, since the host has no valid certificate: the sizes and MD5s of its archives are checked.
COCO_URL = "http://images.cocodataset.org"
COCO_ARCHIVES = {  # with their lengths and MD5s
    name: Archive(
        f"{name}.zip", f"{COCO_URL}/{'annotations' if '_' in name else 'zips'}/{name}.zip", num_bytes=num_bytes, md5=md5
    )
    for name, num_bytes, md5 in (
        ("annotations_trainval2014", 252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
        ("train2014", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
        ("val2014", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        ("annotations_trainval2017", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
        ("train2017", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
        ("val2017", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
    )
}
COCO_IMAGE_BYTES = 165e3  # on average
SHAPES_IMAGE_BYTES = 6e3
ARCHIVE_SHARE = 0.25  # of a COCO archive's images that are missing, from which it is faster than single files
COCO_IMAGES = {"train2014": 82_783, "val2014": 40_504, "train2017": 118_287, "val2017": 5_000}
CAPTIONS_PER_IMAGE = 5  # of COCO and of Flickr8k
NUM_DOWNLOADS = 16  # at the same time
SMALLER = ", or use fewer --num-captions, or --data-dir on another disk"

FLICKR8K_URL = "https://github.com/jbrownlee/Datasets/releases/download/Flickr8k"
FLICKR8K_TEXT = Archive("Flickr8k_text.zip", f"{FLICKR8K_URL}/Flickr8k_text.zip")
FLICKR8K_IMAGES = Archive("Flickr8k_Dataset.zip", f"{FLICKR8K_URL}/Flickr8k_Dataset.zip")
FLICKR8K_SPLIT_FILES = {
    "train": "Flickr_8k.trainImages.txt",
    "val": "Flickr_8k.devImages.txt",
    "test": "Flickr_8k.testImages.txt",
}
KARPATHY_SPLITS = Archive(
    "caption_datasets.zip", "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
)


class AnnotationPart(NamedTuple):
    """Annotations of a dataset, which may have several."""

    path: Path  # a file or a folder
    folder: str = ""  # inside the image folder, which the names of the images begin in
    split: str = ""  # of all its images, if it is known


class Missing(NamedTuple):
    """Files that are missing."""

    name: str
    folder: Path
    num_bytes: float | None  # to download or to draw; None if it is not known
    disk_bytes: float  # that they take, as far as it is known
    fetch: Callable[[], object]  # downloads or draws them
    archive_bytes: float = 0  # of an archive, which is deleted once it is unpacked


@dataclasses.dataclass
class DatasetSource:
    """The files of a dataset, and how they are downloaded."""

    default_num_captions: ClassVar[int] = 0  # captions to use unless the user asks for another number; 0: all

    name: str  # also of the dataset's features and its run
    image_dir: Path  # the folder that image paths begin in
    parts: list[AnnotationPart]
    num_images: dict[str, int] = dataclasses.field(default_factory=dict)  # by folder, as far as it is always the same

    def find_missing_annotations(self) -> list[Missing]:
        """Returns what is missing of the annotations and the split lists."""
        return []

    def find_image_paths(self, part: AnnotationPart, examples: list[Example]) -> list[Example]:
        """Returns the examples of a part with their image paths as they are inside its folder."""
        return examples

    def find_missing_images(self, image_paths: list[str]) -> list[Missing]:
        """Returns how to get those of some images that are missing; raises InputError if there is no way."""
        return []

    def guess_image_paths(self, num_captions: int) -> list[str]:
        """Returns as many names as so many captions have images (0: all captions), for a plan without the captions."""
        share = min(1.0, num_captions / CAPTIONS_PER_IMAGE / max(1, sum(self.num_images.values()))) or 1.0
        sizes = {folder: round(share * size) for folder, size in self.num_images.items()}
        return [str(PurePosixPath(folder) / str(number)) for folder, size in sizes.items() for number in range(size)]

    def read_examples(self, options: ReadOptions) -> list[Example]:
        """Reads all parts, which must have different images; numbers the images of a part if an id of it is not unique.

        Ids of different parts may be the same: each has the ids of its file, which other programs know.
        """
        examples: dict[str, Example] = {}
        for part in self.parts:
            part_examples = self.find_image_paths(part, read_annotations(part.path, options))
            if len({str(example.image_id) for example in part_examples}) < len(part_examples):
                log(f"{part.path}: several images have the same id; the images are numbered anew")
                part_examples = [dataclasses.replace(e, image_id=index) for index, e in enumerate(part_examples)]
            for example in part_examples:
                image_path = str(PurePosixPath(part.folder) / example.image_path)
                if image_path in examples:
                    raise InputError(
                        f"{part.path}: {image_path} is also in the annotations of another split; expected it in one"
                    )
                if part.split and example.split not in ("", part.split):
                    raise InputError(
                        f"{part.path}: expected images of the {part.split} split, found {example.image_path} of the "
                        f"{example.split} split; a file with its own split is to be given alone"
                    )
                split = part.split or example.split
                examples[image_path] = dataclasses.replace(example, image_path=image_path, split=split)
        return list(examples.values())

    def find_missing(self, image_paths: Iterable[str]) -> list[str]:
        """Returns the images that are not in the image folder."""
        return [image_path for image_path in image_paths if not (self.image_dir / image_path).exists()]


def _missing_archive(
    archive: Archive, folder: Path, suffixes: tuple[str, ...], names: Container[str] | None = None
) -> Missing:
    """Describes an archive that is to be downloaded and unpacked into a folder, see `fetch_archive`."""
    num_bytes = bytes_to_download(archive, folder)
    fetch = functools.partial(fetch_archive, archive, folder, suffixes, names)
    return Missing(archive.name, folder, num_bytes, archive.num_bytes or 0, fetch, num_bytes or 0)


class Coco(DatasetSource):
    """MS-COCO: the training images and their captions, as in the tutorial, and the official validation images."""

    default_num_captions = 30_000  # the tutorial's subset

    def __init__(self, folder: Path, year: int = 2014, official_val: bool = False):
        splits = {"train": "train", "val": "val"} if official_val else {"train": ""}
        annotations = folder / "annotations"
        parts = [
            AnnotationPart(annotations / f"captions_{name}{year}.json", f"{name}{year}", split)
            for name, split in splits.items()
        ]
        super().__init__(folder.name, folder, parts, {part.folder: COCO_IMAGES[part.folder] for part in parts})
        self.year = year

    def find_missing_annotations(self) -> list[Missing]:
        """Returns the archive of the annotations, if some are missing."""
        if all(part.path.exists() for part in self.parts):
            return []
        names = tuple(part.path.name for part in self.parts)
        return [_missing_archive(COCO_ARCHIVES[f"annotations_trainval{self.year}"], self.image_dir, names)]

    def find_missing_images(self, image_paths: list[str]) -> list[Missing]:
        """Returns what is missing in train2014/ and val2014/: a few images as single files, many as the archive."""
        result = []
        for part in self.parts:
            archive = COCO_ARCHIVES[part.folder]
            wanted = [image_path for image_path in image_paths if image_path.startswith(f"{part.folder}/")]
            missing = self.find_missing(wanted)
            num_bytes = len(missing) * COCO_IMAGE_BYTES
            is_here = (self.image_dir / archive.name).exists()
            if missing and (is_here or num_bytes >= ARCHIVE_SHARE * (archive.num_bytes or 0)):
                found = _missing_archive(archive, self.image_dir, (".jpg",), set(missing) if is_here else None)
                if not is_here:  # all images are unpacked, since it is deleted then
                    num_here = len(list((self.image_dir / part.folder).glob("*.jpg")))
                    num_bytes = (COCO_IMAGES[part.folder] - num_here) * COCO_IMAGE_BYTES
                fetch = functools.partial(self._fetch_archive, found, num_bytes, missing)
                result.append(found._replace(disk_bytes=num_bytes, fetch=fetch))
            elif missing:
                name = f"{len(missing):,} of {len(wanted):,} images, one by one"
                fetch = functools.partial(self._fetch_few, missing, len(wanted), num_bytes)
                result.append(Missing(name, self.image_dir, num_bytes, num_bytes, fetch))
        return result

    def _fetch_archive(self, archive: Missing, num_bytes: float, image_paths: list[str]) -> None:
        """Downloads the archive of images, about so many bytes, and as single files those that it lacks."""
        num_bytes += archive.archive_bytes
        advice = "free some" + advise(f"{SMALLER}; 30,000 captions take about 1 GB")
        check_disk_space(self.image_dir, num_bytes, f"unpacking {archive.name}", advice)
        archive.fetch()
        if missing := self.find_missing(image_paths):
            self._fetch_single_images(missing)

    def _fetch_few(self, missing: list[str], num_images: int, num_bytes: float) -> None:
        """Downloads the images that are missing of `num_images`, about so many bytes, as single files."""
        check_disk_space(self.image_dir, num_bytes, "these images of COCO", "free some" + advise(SMALLER))
        log(
            f"COCO: {num_images - len(missing):,} of {num_images:,} images are in {self.image_dir}/, downloading "
            f"{len(missing):,} one by one (about {format_bytes(num_bytes)})"
        )
        self._fetch_single_images(missing)

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
        part = AnnotationPart(folder / "Flickr8k.token.txt")
        super().__init__("flickr8k", folder / "Flicker8k_Dataset", [part], {"": 8000})
        self.folder = folder

    def find_missing_annotations(self) -> list[Missing]:
        """Returns the archive of the captions and the split lists, if some are missing."""
        names = (self.parts[0].path.name, *FLICKR8K_SPLIT_FILES.values())
        if all((self.folder / name).exists() for name in names):
            return []
        return [_missing_archive(FLICKR8K_TEXT, self.folder, (".token.txt", "Images.txt"))]

    def find_missing_images(self, image_paths: list[str]) -> list[Missing]:
        """Returns the archive of all images, if some of these are missing."""
        missing = self.find_missing(image_paths)
        return [_missing_archive(FLICKR8K_IMAGES, self.folder, (".jpg",))] if missing else []


class Flickr30k(DatasetSource):
    """Flickr30k: 31,000 images with five captions each, in Karpathy's split; the images cannot be downloaded freely."""

    annotation_names = ("dataset_flickr30k.json", "results_20130124.token", "results.csv", "captions.txt")
    image_folders = ("flickr30k-images", "flickr30k_images", "Images", "images")

    def __init__(self, folder: Path):
        annotations = [folder / name for name in self.annotation_names]
        image_dirs = [folder / name for name in self.image_folders]
        part = AnnotationPart(next((path for path in annotations if path.exists()), annotations[0]))
        super().__init__("flickr30k", next((path for path in image_dirs if path.is_dir()), image_dirs[0]), [part])

    def find_missing_annotations(self) -> list[Missing]:
        """Returns the archive of Karpathy's captions and split, unless a file of captions is there."""
        path = self.parts[0].path
        return [] if path.exists() else [_missing_archive(KARPATHY_SPLITS, path.parent, (path.name,))]

    def find_missing_images(self, image_paths: list[str]) -> list[Missing]:
        """Raises InputError if no image is there; it says where to get them."""
        if image_paths and len(self.find_missing(image_paths)) == len(image_paths):
            raise InputError(
                f"Flickr30k's images are given out on request only: fill in the form at "
                f"https://shannon.cs.illinois.edu/DenotationGraph/, and unpack them into {self.image_dir}/"
            )
        return []


class Shapes(DatasetSource):
    """The toy dataset, which is drawn instead of downloaded."""

    def __init__(self, folder: Path):
        super().__init__("shapes", folder, [AnnotationPart(folder / shapes.ANNOTATIONS)], {"images": shapes.NUM_IMAGES})

    def find_missing_annotations(self) -> list[Missing]:
        """Returns the drawings, unless they are there; raises InputError if they are others."""
        draw = functools.partial(shapes.draw_dataset, self.image_dir)
        if self.parts[0].path.exists():
            draw()  # which only compares the settings
            return []
        num_bytes = shapes.NUM_IMAGES * SHAPES_IMAGE_BYTES
        name = f"{shapes.NUM_IMAGES:,} images of shapes, which are drawn"
        return [Missing(name, self.image_dir, num_bytes, num_bytes, draw)]


class UserFiles(DatasetSource):
    """The user's own annotations, one or one for each split, and their image folders."""

    def __init__(self, config: DataConfig, with_images: bool):
        """Raises InputError if annotations or an image folder do not exist, or do not fit together."""
        self.with_images = with_images
        paths: dict[str, Path] = {}
        folders: dict[str, Path] = {}
        for split, annotations, images in (
            ("train" if config.val_annotations else "", config.annotations, config.images),
            ("val", config.val_annotations, config.val_images),
            ("test", config.test_annotations, config.test_images),
        ):
            if not annotations:
                if images:
                    raise InputError(f"--{split}-images needs --{split}-annotations, the captions of these images")
                continue
            path = paths[split] = Path(annotations)
            if not path.exists():
                raise InputError(f"{path}: no such annotation file")
            beside = path if path.is_dir() else path.parent
            folders[split] = Path(images or config.images or beside)
            if not folders[split].is_dir():
                raise InputError(f"{folders[split]}: no such image folder")
        image_dir = _common_folder(folders.values())
        parts = [  # without links: names of one folder must not lead out of the folder of the features
            AnnotationPart(path, folders[split].resolve().relative_to(image_dir.resolve()).as_posix(), split)
            for split, path in paths.items()
        ]
        super().__init__(next(iter(folders.values())).resolve().name or "images", image_dir, parts)

    def find_image_paths(self, part: AnnotationPart, examples: list[Example]) -> list[Example]:
        """Finds the files that the names mean; names of one file become one image."""
        folder = self.image_dir / part.folder
        paths, missing = find_images(folder, [example.image_path for example in examples])
        if len(missing) == len(paths):
            if not self.with_images:  # only the captions are needed
                return examples
            raise InputError(
                f"{folder}: none of the {len(paths):,} images of {part.path} is in it, such as {missing[0]!r}"
                + advise("; name the folder of the images with --images")
            )
        if missing:
            first = ", ".join(map(repr, missing[:NUM_NAMED]))
            log(f"{folder}: {len(missing):,} of {len(paths):,} images are not in it, such as {first}")
        if renamed := [name for name, path in paths.items() if path != name]:
            first = renamed[0]
            log(f"{folder}: {len(renamed):,} images have other names there, such as {paths[first]!r} for {first!r}")
        if clash := find_clash(paths):
            raise InputError(
                f"{folder}: {clash[0]!r} and {clash[1]!r} of {part.path} would be one file, {paths[clash[0]]!r}; put "
                "the images into folders as the names have them"
            )
        merged = rename_images(examples, lambda name: paths[name])
        if num_twice := len(examples) - len(merged):
            log(f"{part.path}: {num_twice:,} images are named in two ways; their captions are put together")
        return merged


def _common_folder(folders: Iterable[Path]) -> Path:
    """Returns the folder that all of some folders are in; the folder itself if there is only one."""
    different = {folder.resolve(): folder for folder in folders}
    if len(different) == 1:
        return next(iter(different.values()))
    try:
        return Path(os.path.relpath(os.path.commonpath(list(different))))
    except ValueError:
        names = ", ".join(map(str, different.values()))
        raise InputError(f"expected all images on the drive of the current folder, found {names}") from None


DATASETS: dict[str, Callable[[Path], DatasetSource]] = {
    "flickr8k": Flickr8k,
    "flickr30k": Flickr30k,
    "shapes": Shapes,
}
COCO_YEARS = {"coco": 2014, "coco2017": 2017}
USER_SETTINGS = ("images", "val_annotations", "val_images", "test_annotations", "test_images")


def find_source(config: DataConfig, with_images: bool) -> DatasetSource:
    """Returns the source that the settings name; raises InputError if they do not fit together."""
    if config.official_val and (config.annotations or config.dataset not in COCO_YEARS):
        raise InputError("--official-val is for --dataset coco and coco2017; your own files: --val-annotations FILE")
    if config.annotations:
        return UserFiles(config, with_images)
    if given := next((name for name in USER_SETTINGS if getattr(config, name)), None):
        raise InputError(f"--{given.replace('_', '-')} needs --annotations, the captions for training")
    if config.dataset is None:
        raise InputError("expected --dataset or --annotations, found neither")
    folder = Path(config.data_dir or "data") / config.dataset
    if config.dataset in COCO_YEARS:
        return Coco(folder, COCO_YEARS[config.dataset], config.official_val)
    return DATASETS[config.dataset](folder)
