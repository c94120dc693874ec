"""Downloads images and captions, reads them and splits them into train, val and test.

Tutorial sections: "Download and prepare the MS-COCO dataset", "Optional: limit the size of the training set",
"Split the data into training and testing".

    python data_utils.py                                               # MS-COCO 2014, a subset of 30,000 captions
    python data_utils.py --annotations captions.csv --images photos/   # your own images and captions

The result is a `CaptionDataset`: images, each with its reference captions and its split. The steps are those of
`load_dataset`: download the captions, read them, split the images, choose a subset, download its images.
"""

import argparse
import dataclasses
import functools
import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from captioning.base.cli import InputError, add_quiet_option, advise, log, make_parser, print_results, run_main
from captioning.base.text import describe_unspaced
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import DATA_PATHS, DataConfig
from captioning.data.annotation_formats import read_text
from captioning.data.annotations import SPLITS, Example
from captioning.data.caption_rows import ReadOptions
from captioning.data.datasets import FLICKR8K_SPLIT_FILES, find_source
from captioning.images.image_names import NameIndex, clean_name, parse_names
from captioning.images.image_records import find_copies

# Options for the format of captions; `python data_utils.py --help` explains them.
FORMAT_SETTINGS = ("image_column", "caption_column", "separator", "encoding", "words")


@dataclasses.dataclass(frozen=True)
class CaptionDataset:
    """Images with their reference captions, in the splits train, val and test."""

    name: str  # of the folders for its features and runs
    image_dir: Path  # the folder that `Example.image_path` begins in
    examples: tuple[Example, ...]  # of all splits; an example is one image with all its captions
    drawn_splits: tuple[str, ...] = ()  # those that chance decided, not lists or annotations

    def split(self, name: str) -> list[Example]:
        """Returns the examples of one split; raises InputError if there are none."""
        examples = [example for example in self.examples if example.split == name]
        # An empty split would only show much later, as a loss or a score of nothing.
        if not examples:
            sizes = ", ".join(f"{split} {sum(e.split == split for e in self.examples)}" for split in SPLITS)
            raise InputError(
                f"the {name} split has no images (found: {sizes}); change the fractions or the split lists"
            )
        return examples

    def exclude(self, image_paths: set[str]) -> "CaptionDataset":
        """Returns the same dataset without some images, given by `Example.image_path`."""
        # For images that turn out to be unreadable when their features are computed.
        examples = tuple(example for example in self.examples if example.image_path not in image_paths)
        return dataclasses.replace(self, examples=examples)

    def move(self, split_of: Mapping[str, str]) -> "CaptionDataset":
        """Returns the same dataset with some images in another split, given by `Example.image_path`."""
        examples = (dataclasses.replace(e, split=split_of.get(e.image_path, e.split)) for e in self.examples)
        return dataclasses.replace(self, examples=tuple(examples))

    @functools.cached_property
    def fingerprint(self) -> str:
        """A short hash of every image's path, split and captions: datasets with the same fingerprint are the same."""
        # A run keeps the fingerprint. If the data have changed when it is resumed or evaluated, the split may have
        # changed with them, and the model may have been trained on what is now a test image.
        rows = json.dumps([[example.image_path, example.split, example.captions] for example in self.examples])
        return hashlib.sha256(rows.encode()).hexdigest()[:16]


def load_dataset(config: DataConfig, with_images: bool = True) -> CaptionDataset:
    """Downloads a dataset if necessary, reads it and splits it.

    Args:
        config: which images and captions.
        with_images: whether the images are needed, or only their captions.

    Raises:
        InputError: the data do not exist, cannot be read, or cannot be split as the settings ask for.
    """
    # 1. The captions. They come first: they are small (COCO's: 250 MB), and tell which images are needed.
    source = find_source(config, with_images)
    for missing in source.find_missing_annotations():
        missing.fetch()
    options = ReadOptions(config.image_column, config.caption_column, config.separator, config.encoding)
    examples = source.read_examples(options)

    # 2. The split and the subset. The tutorial uses 6,000 of COCO's images, which have 30,000 captions, "to speed up
    # training". So does this script unless --num-captions asks for more. The split is made before the subset is
    # chosen: a larger subset then only adds images to each split, and a test image never becomes a training image.
    num_captions = source.default_num_captions if config.num_captions is None else config.num_captions
    split_files = find_split_files(config, source.parts[0].path)
    drawn_splits: tuple[str, ...] = ()
    if config.official_val:
        examples, drawn_splits = split_official(examples, config, num_captions), ("val", "test")
    else:
        drawn_splits = find_drawn_splits(examples, config, split_files)
        examples = subsample(assign_splits(examples, config, split_files), num_captions, config.split_seed)
    if not examples:
        raise InputError(f"{source.parts[0].path}: none of its images is in the split lists")

    # 3. The images, and only those of the subset: 1 GB for the 30,000 captions instead of 13.5 GB for all of COCO.
    if with_images:
        for missing in source.find_missing_images([example.image_path for example in examples]):
            missing.fetch()

    # The tokenizer splits captions at spaces. Chinese or Japanese has none: a whole caption would be a single word.
    if config.words == "spaces" and (hint := describe_unspaced(text for e in examples for text in e.captions)):
        log(hint)
    return CaptionDataset(source.name, source.image_dir, tuple(examples), drawn_splits)


# Optional: limit the size of the training set.


def subsample(examples: Sequence[Example], num_captions: int, seed: int) -> list[Example]:
    """Returns random images, in the order of `examples`, until they have at least `num_captions` captions; 0: all."""
    if not num_captions:
        return list(examples)
    # A generator of its own with a fixed seed: every run, and every script, chooses the same images. The tutorial's
    # `random.shuffle` chooses others each time.
    order = random.Random(seed).sample(range(len(examples)), len(examples))
    chosen: list[int] = []
    count = 0
    for index in order:
        if count >= num_captions:
            break
        chosen.append(index)  # a whole image: its captions stay together
        count += len(examples[index].captions)
    return [examples[index] for index in sorted(chosen)]


# Split the data into training, validation and testing.


def assign_splits(examples: Sequence[Example], config: DataConfig, split_files: dict[str, Path]) -> list[Example]:
    """Assigns every image to a split: by the lists, else as the annotations have it, else at random.

    Images that no list names are left out, if there are lists.

    Raises:
        InputError: an image is in two lists, the fractions are not valid, or the images are too few.
    """
    if split_files:
        return _split_by_lists(examples, split_files, config.encoding)
    drawn_splits = find_drawn_splits(examples, config, split_files)
    examples = _decide_undecided(examples, with_log=not config.test_annotations)
    if drawn_splits == SPLITS:
        if splits := {example.split for example in examples if example.split}:
            log(f"split: annotations contain only the {splits.pop()} split; splitting at random")
        return _split_at_random(examples, config)
    if drawn_splits:
        # The best epoch is chosen by validation images. Test images must not do that: their score would be too good.
        log("split: annotations contain no validation images; taking some of the training images")
        test = [example for example in examples if example.split == "test"]
        rest = [example for example in examples if example.split != "test"]
        return _split_at_random(rest, dataclasses.replace(config, test_fraction=0.0)) + test
    log("split: from the annotations")
    return examples


def _decide_undecided(examples: Sequence[Example], with_log: bool) -> list[Example]:
    """Returns the images with those that have no split in train, or without them if others are marked for training.

    If no image has a split, all stay as they are. How many are concerned is logged, unless files of their own have the
    others.
    """
    decided = [example for example in examples if example.split]
    if not decided or len(decided) == len(examples):
        return list(examples)
    count = f"split: {len(examples) - len(decided):,} images without a split"
    if any(example.split == "train" for example in decided):
        log(f"{count}, left out")
        return decided
    if with_log:
        log(f"{count} are for training, since none is marked for it")
    return [example if example.split else dataclasses.replace(example, split="train") for example in examples]


def find_drawn_splits(examples: Sequence[Example], config: DataConfig, split_files: dict[str, Path]) -> tuple[str, ...]:
    """Returns the splits that are drawn at random, since neither lists nor annotations have them."""
    # From the most to the least explicit: lists of names, the annotations' own split, chance.
    splits = {example.split or "train" for example in examples}
    if split_files:
        return ()
    # Karpathy's JSON and tables with a column "split" decide it. One split alone does not split the data: the file is
    # then only the training part of a dataset, say.
    if len(splits) < 2 and not config.test_annotations:
        return SPLITS
    return () if "val" in splits else ("train", "val")


def _split_at_random(examples: Sequence[Example], config: DataConfig) -> list[Example]:
    """Splits images by the fractions and the seed of the settings; every split that is wanted gets at least one."""
    from sklearn.model_selection import train_test_split  # slow to import, and often not needed

    val_fraction, test_fraction = _check_fractions(config)
    num_val = max(1, round(val_fraction * len(examples))) if val_fraction else 0
    num_test = max(1, round(test_fraction * len(examples))) if test_fraction else 0
    if len(examples) == 2 and num_test:
        log("split: 2 images are too few to keep one for testing: there is no test image")
        num_test = 0
    if num_val + num_test >= len(examples):
        raise InputError(f"found {len(examples)} images, expected more: training and validation need at least one each")
    # What is split are images, each with all its captions. If the captions were split instead, other captions of nearly
    # every validation image would be in the training set, and the validation score would not tell how well the model
    # captions images that it has not seen.
    image_paths = [example.image_path for example in examples]
    split_of = dict.fromkeys(image_paths, "train")
    # Test images are taken first, then validation images from the rest; what remains is for training. The tutorial has
    # two parts only (80 % and 20 %), and no images to choose the best epoch by.
    for split, size in (("test", num_test), ("val", num_val)):
        if size:
            # random_state makes the split the same every time. Without it, resuming a training would mix the splits.
            image_paths, held_out = train_test_split(image_paths, test_size=size, random_state=config.split_seed)
            split_of.update(dict.fromkeys(held_out, split))
    if len(examples) > 2:
        log(f"split: at random, with {val_fraction:g} for validation and {test_fraction:g} for testing")
    return [dataclasses.replace(example, split=split_of[example.image_path]) for example in examples]


def _check_fractions(config: DataConfig) -> tuple[float, float]:
    """Returns the fractions for validation and testing; raises InputError if they leave nothing for training."""
    val, test = config.val_fraction, config.test_fraction
    if min(val, test) < 0 or val + test >= 1:
        raise InputError(f"expected fractions of at least 0 that sum to less than 1, found {val:g} and {test:g}")
    return val, test


def split_official(examples: Sequence[Example], config: DataConfig, num_captions: int) -> list[Example]:
    """Splits COCO's official validation images into validation and testing, in the ratio of their fractions.

    Args:
        examples: the official training images, and the official validation images as val.
        config: the fractions, and the seed.
        num_captions: captions to use in all; 0: all. Of a subset, the splits have the sizes that a random split of so
            many captions would have.
    """
    val_fraction, test_fraction = _check_fractions(config)
    # COCO's own test images have no public captions. So the validation images serve for both validation and testing,
    # as in the split of Karpathy and Fei-Fei (2015) that papers report scores on.
    held_out = [example.image_path for example in examples if example.split == "val"]
    num_test = round(len(held_out) * test_fraction / (val_fraction + test_fraction)) if test_fraction else 0
    # Which of them are for testing is random, but the same with the same seed.
    test = set(random.Random(config.split_seed).sample(held_out, num_test))
    examples = [dataclasses.replace(e, split="test") if e.image_path in test else e for e in examples]
    # A subset has its share of the captions of each split.
    shares = {"train": 1 - val_fraction - test_fraction, "val": val_fraction, "test": test_fraction}
    result = []
    for split, share in shares.items():
        part = [example for example in examples if example.split == split]
        size = max(1, round(num_captions * share)) if num_captions else 0
        result += subsample(part, size, config.split_seed)
    return result


def find_split_files(config: DataConfig, annotations: Path) -> dict[str, Path]:
    """Returns the lists of image names that define the split: the user's, else Flickr8k's beside the annotations."""
    # Flickr8k and others publish lists of names, so that everyone trains and tests on the same images.
    given = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    split_files = {split: Path(path) for split, path in given.items() if path}
    if config.val_annotations or config.test_annotations or config.official_val:
        if split_files:
            raise InputError("expected lists of names or annotations for each split, found both")
        return {}
    if split_files:
        return split_files
    folder = annotations if annotations.is_dir() else annotations.parent
    found = {split: folder / name for split, name in FLICKR8K_SPLIT_FILES.items() if (folder / name).exists()}
    if not {"train", "val"} <= set(found):
        return {}
    log(f"split: the dataset's own lists, {', '.join(path.name for path in found.values())}")
    return found


def _split_by_lists(examples: Sequence[Example], split_files: dict[str, Path], encoding: str | None) -> list[Example]:
    """Splits by lists of image names, one a line, which need not be exact, see `NameIndex.find`."""
    # Lists are often written for other folders: "a.jpg" or "images/A.jpg" mean the same image if there is only one.
    index = NameIndex(example.image_path for example in examples)
    split_of: dict[str, str] = {}
    for split, path in split_files.items():
        lines = parse_names(
            str(path), _read_list(path, encoding), lambda line: index.find(clean_name(line)) is not None
        )
        names = list(map(clean_name, lines))
        # A list may name images that have no captions here, such as those of a subset: they are logged, not refused.
        unknown = [name for name in names if index.find(name) is None]
        if unknown:
            log(f"{path}: {len(unknown):,} images without captions are left out, the first: {unknown[0]!r}")
        # An image in two lists would be trained on and tested on. That is an error, whichever list is right.
        for name in names:
            image_path = index.find(name)
            if image_path and split_of.setdefault(image_path, split) != split:
                raise InputError(f"{path}: {name} is in the {split} list and in the {split_of[image_path]} list")
    result = [dataclasses.replace(e, split=split_of[e.image_path]) for e in examples if e.image_path in split_of]
    if num_unlisted := len(examples) - len(result):
        log(f"split: {num_unlisted:,} images in none of the lists, left out")
    return result


def _read_list(path: Path, encoding: str | None) -> str:
    """Reads a list in UTF-8, or, if it is not, in the encoding of the annotations."""
    try:
        return read_text(path)
    except InputError:
        if not encoding:
            raise
        return read_text(path, encoding)


# Copies of images.


def find_moved_copies(dataset: CaptionDataset) -> dict[str, str]:
    """Finds images with the content of another one that are to be moved into its split, and logs how many there are.

    Where chance decided the splits, all images of one content go into one of theirs, so that each split keeps about
    its size. Splits of lists or annotations stay as they are.

    Returns:
        The new split of each image that is moved, by `Example.image_path`.
    """
    # Scrapers save one picture under several names. The model would be scored on images that it was trained on.
    split_of = {example.image_path: example.split for example in dataset.examples}
    sizes, gains = Counter(split_of.values()), Counter[str]()
    moved: dict[str, str] = {}
    num_copies = num_left = 0
    for group in find_copies(dataset.image_dir, split_of):
        drawn = [image_path for image_path in group if split_of[image_path] in dataset.drawn_splits]
        # A split that has one image left keeps it; else the one that has lost most so far gets them, or the smallest.
        splits = [split_of[image_path] for image_path in drawn]
        target = min(splits, key=lambda split: (sizes[split] > 1, gains[split], sizes[split]), default="")
        for image_path in drawn:
            if (split := split_of[image_path]) != target:
                moved[image_path] = target
                for changed in (sizes, gains):
                    changed.update({split: -1, target: 1})
        num_copies += len(group) - 1
        splits = [moved.get(image_path, split_of[image_path]) for image_path in group]
        num_left += sum(split != splits[0] for split in splits)
    changes = [f"{len(moved):,} moved into the split of another"] if moved else []
    changes += [f"{num_left:,} in another split, as lists or annotations have it"] if num_left else []
    if changes:
        log(f"split: of {num_copies:,} images that are copies of others, {' and '.join(changes)}")
    return moved


# The data of a run, and the options of the scripts.


def load_run_dataset(
    config: RunConfig, with_images: bool = True, locations: Mapping[str, Any] = MappingProxyType({})
) -> CaptionDataset:
    """Loads the dataset that a run was trained on, from its config.json or `locations`; see `load_dataset`.

    Raises:
        InputError: it is not there, or has changed: the model may have been trained on its test images.
    """
    # The settings of the run, not those of this command line: the same subset and the same split as in training.
    try:
        data_config = dataclasses.replace(config.data, **locations)
        dataset = load_dataset(data_config, with_images).exclude(set(config.unreadable_images))
        dataset = dataset.move(config.moved_copies)
    except InputError as error:
        advice = advise("; if the data were moved, name them with --annotations, --images or --data-dir")
        raise InputError(f"the data of the run's config.json: {error}{'' if locations else advice}") from None
    if dataset.fingerprint != config.data_fingerprint:
        raise InputError(
            "the data have changed since this run was trained: their fingerprint is not that of its config.json, and "
            "the split may be another; restore them, or train again"
        )
    return dataset


def add_data_options(parser: argparse.ArgumentParser, title: str = "data", full: bool = False, **defaults: Any) -> None:
    """Adds the options of every script that reads a dataset, in a group for the data and one for their format.

    Args:
        parser: the parser of the script.
        title: of the group for the data.
        full: whether `--help` lists the options for the format, too; they are accepted in any case.
        defaults: other defaults than those of the settings.
    """
    add_options(parser.add_argument_group(title), DataConfig, defaults, skip=FORMAT_SETTINGS)
    description = "python data_utils.py --help lists the options for the format of your captions, which work here, too"
    group = parser.add_argument_group("format of your own data", None if full else description)
    add_options(group, DataConfig, defaults, only=FORMAT_SETTINGS, unlisted=() if full else FORMAT_SETTINGS)


def add_location_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options for where the data of a run are now."""
    # A run remembers where its data are. On another machine they are elsewhere, and may be: the fingerprint depends on
    # the content alone.
    group = parser.add_argument_group("the data of the run, if they were moved")
    add_options(group, DataConfig, only=DATA_PATHS)


def locations_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Returns where the command line says that the data of a run are, by the name of the setting."""
    return {name: path for name in DATA_PATHS if (path := getattr(args, name)) is not None}


def describe_split(split: str, examples: Sequence[Example]) -> str:
    """Describes how large a split is, given its examples."""
    return f"{split:5} {len(examples):7,} images {sum(len(e.captions) for e in examples):8,} captions"


def main(argv: list[str] | None = None) -> None:
    """Downloads and reads a dataset, and prints the sizes of its splits and an example."""
    parser = make_parser(__doc__)
    add_data_options(parser, full=True)
    add_quiet_option(parser)
    dataset = load_dataset(DataConfig.from_args(parser.parse_args(argv)))
    dataset = dataset.move(find_moved_copies(dataset))  # as train.py does
    # A look at the result: are the sizes right, and does the caption belong to the image?
    for split in SPLITS:
        examples = [example for example in dataset.examples if example.split == split]
        print_results(describe_split(split, examples))
    example = random.Random(0).choice(dataset.examples)
    print_results(f"{dataset.image_dir / example.image_path}:", *example.captions, sep="\n  ")


if __name__ == "__main__":
    run_main(main)
