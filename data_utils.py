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
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from captioning.base.cli import InputError, add_quiet_option, advise, log, make_parser, run_main
from captioning.base.text import describe_unspaced
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import DATA_PATHS, DataConfig
from captioning.data.annotation_formats import ReadOptions, read_text
from captioning.data.annotations import SPLITS, Example
from captioning.data.datasets import FLICKR8K_SPLIT_FILES, find_source
from captioning.images.image_names import NameIndex, clean_name

# Options for the format of captions; `python data_utils.py --help` explains them.
FORMAT_SETTINGS = ("image_column", "caption_column", "separator", "encoding", "words")


@dataclasses.dataclass(frozen=True)
class CaptionDataset:
    """Images with their reference captions, in the splits train, val and test."""

    name: str  # of the folders for its features and runs
    image_dir: Path  # the folder that `Example.image_path` begins in
    examples: tuple[Example, ...]  # of all splits; an example is one image with all its captions

    def split(self, name: str) -> list[Example]:
        """Returns the examples of one split.

        Raises:
            InputError: the split has no images.
        """
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
        InputError: see `read_annotations`, `assign_splits` and `download`.
    """
    # The captions come first. They are small (COCO's: 250 MB), and say which images are needed.
    source = find_source(config, with_images)
    source.fetch_annotations()
    first_file = source.parts[0].path
    split_files = find_split_files(config, first_file if first_file.is_dir() else first_file.parent)
    options = ReadOptions(config.image_column, config.caption_column, config.separator, config.encoding)
    examples = source.read_examples(options)

    # The tutorial uses 6,000 of COCO's images, which have 30,000 captions, "to speed up training". So does this script
    # unless --num-captions says more. The split is made before the subset is chosen: a larger subset then only adds
    # images to each split, and no test image of the smaller one becomes a training image.
    num_captions = source.default_num_captions if config.num_captions is None else config.num_captions
    if config.official_val:
        examples = split_official(examples, config, num_captions)
    else:
        examples = assign_splits(examples, config, split_files)
        if num_captions:
            examples = subsample(examples, num_captions, config.split_seed)
    if not examples:
        raise InputError(f"{first_file}: none of its images is in the split lists")
    if config.words == "spaces" and (hint := describe_unspaced(text for e in examples for text in e.captions)):
        log(hint)  # Chinese or Japanese: without spaces a whole caption would be a single word

    # Only the images of the subset are downloaded: 1 GB for the 30,000 captions instead of 13.5 GB for all of COCO.
    if with_images:
        source.fetch_images(examples)
    return CaptionDataset(source.name, source.image_dir, tuple(examples))


def load_run_dataset(
    config: RunConfig, with_images: bool = True, locations: Mapping[str, Any] = MappingProxyType({})
) -> CaptionDataset:
    """Loads the dataset that a run was trained on, from where its config.json says; see `load_dataset`.

    Args:
        config: the settings of the run.
        with_images: whether the images are needed, or only their captions.
        locations: where the data are instead, see `locations_from_args`.

    Raises:
        InputError: it is not there, or has changed: the model may have been trained on its test images.
    """
    # The settings of the run, not those of this command line: the same subset and the same split as in training.
    try:
        data_config = dataclasses.replace(config.data, **locations)
        dataset = load_dataset(data_config, with_images).exclude(set(config.unreadable_images))
    except InputError as error:
        advice = advise("; if the data were moved, name them with --annotations, --images or --data-dir")
        raise InputError(f"the data of the run's config.json: {error}{'' if locations else advice}") from None
    if dataset.fingerprint != config.data_fingerprint:
        raise InputError(
            "the data have changed since this run was trained: their fingerprint is not that of its config.json, and "
            "the split may be another; restore them, or train again"
        )
    return dataset


# Limiting and splitting.


def subsample(examples: Sequence[Example], num_captions: int, seed: int) -> list[Example]:
    """Returns random images, in the order of `examples`, until they have at least `num_captions` captions."""
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


def find_split_files(config: DataConfig, folder: Path) -> dict[str, Path]:
    """Returns the lists of image names that define the split: those of the settings, else Flickr8k's in a folder."""
    # Flickr8k and others publish lists of names, so that everyone trains and tests on the same images. They win over a
    # split at random.
    given = {"train": config.train_list, "val": config.val_list, "test": config.test_list}
    split_files = {split: Path(path) for split, path in given.items() if path}
    has_split_annotations = bool(config.val_annotations or config.test_annotations or config.official_val)
    if split_files and has_split_annotations:
        raise InputError("expected lists of names or annotations for each split, found both")
    if split_files or has_split_annotations:
        return split_files
    default_files = {split: folder / name for split, name in FLICKR8K_SPLIT_FILES.items()}
    if not (default_files["train"].exists() and default_files["val"].exists()):
        return {}
    split_files = {split: path for split, path in default_files.items() if path.exists()}
    log(f"split: the dataset's own lists, {', '.join(path.name for path in split_files.values())}")
    return split_files


def assign_splits(examples: Sequence[Example], config: DataConfig, split_files: dict[str, Path]) -> list[Example]:
    """Assigns every image to a split: by the lists, else as the annotations have it, else at random.

    Images that no list names are left out. Annotations that have a file for testing but none for validation are split
    at random into training and validation. `split_files` has the lists by split, and is empty without lists.

    Raises:
        InputError: a list is missing, unreadable or empty, or names an image of another list; the fractions are not
            valid; or the images are too few.
    """
    # From the most to the least explicit: lists of names, the annotations' own split, chance.
    if split_files:
        return _split_by_lists(examples, split_files)
    # Karpathy's JSON and tables with a column "split" decide it. One split alone is no split of the data: the file
    # is then only the training part of a dataset, say.
    splits = {example.split for example in examples if example.split in SPLITS}
    if len(splits) < 2 and not config.test_annotations:
        if splits:
            log(f"split: annotations contain only the {splits.pop()} split; splitting at random")
        return _split_at_random(examples, config)
    if "val" not in splits:
        # The best epoch is chosen by validation images. Test images must not do that: their score would be too good.
        log("split: annotations contain no validation images; taking some of the training images")
        test = [example for example in examples if example.split == "test"]
        rest = [example for example in examples if example.split != "test"]
        return _split_at_random(rest, dataclasses.replace(config, test_fraction=0.0)) + test
    log("split: from the annotations")
    decided = [example for example in examples if example.split in SPLITS]
    if num_undecided := len(examples) - len(decided):
        log(f"split: {num_undecided:,} images without a split, left out")
    return decided


def split_official(examples: Sequence[Example], config: DataConfig, num_captions: int) -> list[Example]:
    """Splits COCO's official validation images into validation and testing, in the ratio of their fractions.

    Args:
        examples: the official training images, and the official validation images as val.
        config: the fractions, and the seed.
        num_captions: captions to use in all; 0: all. Of a subset, the splits have the sizes that a random split of so
            many captions would have.

    Raises:
        InputError: the fractions are not valid, or leave nothing for validation.
    """
    # COCO's own test images have no public captions. So the validation images serve for both validation and testing,
    # as in the split of Karpathy and Fei-Fei (2015) that papers report scores on.
    shares = {"val": config.val_fraction, "test": config.test_fraction}
    if not (shares["val"] > 0 and shares["test"] >= 0 and sum(shares.values()) < 1):
        raise InputError(f"expected a --val-fraction above 0, and fractions that sum to less than 1, found {shares}")
    # Which of them are for testing is random, but the same with the same seed.
    held_out = [example for example in examples if example.split == "val"]
    num_test = round(len(held_out) * shares["test"] / sum(shares.values()))
    test = set(random.Random(config.split_seed).sample([example.image_path for example in held_out], num_test))
    examples = [dataclasses.replace(e, split="test") if e.image_path in test else e for e in examples]
    if not num_captions:
        return examples
    # A subset: of each split its share of the captions.
    shares = {"train": 1 - sum(shares.values())} | shares
    parts = {split: [example for example in examples if example.split == split] for split in SPLITS}
    return [
        example
        for split, share in shares.items()
        for example in subsample(parts[split], round(num_captions * share), config.split_seed)
    ]


def _split_at_random(examples: Sequence[Example], config: DataConfig) -> list[Example]:
    """Splits by the fractions and the seed of the settings; two images are split into training and validation.

    What is split are images, each with all its captions. If the captions were split instead, other captions of nearly
    every validation image would be in the training set, and the validation score would not tell how well the model
    captions images that it has not seen.
    """
    from sklearn.model_selection import train_test_split  # slow to import, and often not needed

    fractions = {"test": config.test_fraction, "val": config.val_fraction}
    if not (min(fractions.values()) >= 0 and sum(fractions.values()) < 1):
        raise InputError(f"the fractions of val and test must be at least 0 and sum to less than 1, found {fractions}")
    if len(examples) < 2 and any(fractions.values()):
        raise InputError(f"expected at least 2 images (training and validation need one each), found {len(examples)}")
    # At least one image for each split that is wanted, even of a handful of images.
    sizes = {split: max(1, round(fraction * len(examples))) if fraction else 0 for split, fraction in fractions.items()}
    if len(examples) == 2:
        if sizes["test"]:
            log("split: 2 images are too few to keep one for testing: there is no test image")
        sizes = {"test": 0, "val": min(1, sizes["val"])}
    # Test images are taken first, then validation images from the rest; what remains is for training. The tutorial has
    # two parts only (80 % and 20 %), and no images to choose the best epoch by.
    split_of: dict[str, str] = {}
    rest = [example.image_path for example in examples]
    for split, size in sizes.items():
        if size >= len(rest):
            raise InputError(f"{len(examples)} images are too few to split into train, val and test")
        if size:
            # random_state makes the split the same every time. Without it, resuming a training would mix the splits.
            rest, held_out = train_test_split(rest, test_size=size, random_state=config.split_seed)
            split_of.update(dict.fromkeys(held_out, split))
    if len(examples) > 2:
        log(f"split: at random, with {config.val_fraction:g} for validation and {config.test_fraction:g} for testing")
    return [dataclasses.replace(example, split=split_of.get(example.image_path, "train")) for example in examples]


def _split_by_lists(examples: Sequence[Example], split_files: dict[str, Path]) -> list[Example]:
    """Splits by lists of image names, which need not be exact, see `NameIndex.find`."""
    missing = {"train", "val"} - set(split_files)
    if missing:
        raise InputError(f"split lists need at least train and val, missing: {', '.join(sorted(missing))}")
    # Lists are often written for other folders: "a.jpg" or "images/A.jpg" mean the same image if there is only one.
    index = NameIndex(example.image_path for example in examples)
    split_of: dict[str, str] = {}
    for split, path in split_files.items():
        # A list may name images that have no captions here, such as those of a subset: they are logged, not refused.
        image_paths = {name: index.find(name) for name in _read_split_file(path, split)}
        unknown = [name for name, image_path in image_paths.items() if image_path is None]
        if unknown:
            log(f"{path}: {len(unknown):,} images without captions are left out, the first: {unknown[0]!r}")
        # An image in two lists would be trained on and tested on. That is an error, whichever list is right.
        for name, image_path in image_paths.items():
            if image_path and split_of.setdefault(image_path, split) != split:
                raise InputError(f"{path}: {name} is in the {split} list and in the {split_of[image_path]} list")
    result = [dataclasses.replace(e, split=split_of[e.image_path]) for e in examples if e.image_path in split_of]
    if num_unlisted := len(examples) - len(result):
        log(f"split: {num_unlisted:,} images in none of the lists, left out")
    return result


def _read_split_file(path: Path, split: str) -> list[str]:
    """Returns the image names of a list, one a line; raises InputError if it is unreadable or empty."""
    try:
        text = read_text(path)
    except InputError as error:  # which names the file, but not that it is a list
        raise InputError(f"cannot read the {split} list: {error}") from None
    names = [clean_name(line) for line in text.split("\n") if line.strip()]
    if not names:
        raise InputError(f"{path}: the {split} list is empty; expected names of images, one a line")
    return names


def add_data_options(parser: argparse.ArgumentParser, title: str = "data", full: bool = False, **defaults: Any) -> None:
    """Adds the options of every script that reads a dataset, in a group for the data and one for their format.

    Args:
        parser: the script's parser.
        title: the title of the group for the data.
        full: whether `--help` lists the options for the format, too; they are accepted in any case.
        defaults: values that take the place of the settings' own defaults.
    """
    add_options(parser.add_argument_group(title), DataConfig, defaults, skip=FORMAT_SETTINGS)
    description = "python data_utils.py --help lists the options for the format of your captions, which work here, too"
    group = parser.add_argument_group("format of your own data", None if full else description)
    add_options(group, DataConfig, defaults, only=FORMAT_SETTINGS, unlisted=() if full else FORMAT_SETTINGS)


def add_location_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the data of a run are now."""
    # A run remembers where its data are. On another machine they are elsewhere, and may be: the fingerprint is of what
    # they hold.
    group = parser.add_argument_group("the data of the run, if they were moved")
    add_options(group, DataConfig, only=DATA_PATHS)


def locations_from_args(args: argparse.Namespace) -> dict[str, Any]:
    """Returns where the command line says that the data of a run are, by the name of the setting."""
    return {name: path for name in DATA_PATHS if (path := getattr(args, name)) is not None}


def main(argv: list[str] | None = None) -> None:
    """Downloads and reads a dataset, and prints the sizes of its splits and an example."""
    parser = make_parser(__doc__)
    add_data_options(parser, full=True)
    add_quiet_option(parser)
    dataset = load_dataset(DataConfig.from_args(parser.parse_args(argv)))
    # A look at the result: are the sizes right, and does the caption belong to the image?
    for split in SPLITS:
        examples = [example for example in dataset.examples if example.split == split]
        print(f"{split:5} {len(examples):7,} images {sum(len(e.captions) for e in examples):8,} captions")
    example = random.Random(0).choice(dataset.examples)
    print(f"{dataset.image_dir / example.image_path}:", *example.captions, sep="\n  ")


if __name__ == "__main__":
    run_main(main)
