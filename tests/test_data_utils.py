"""Datasets: the user's own, and the known ones from a server on this machine."""

import dataclasses
import json
import re
from collections import Counter
from pathlib import Path

import pytest

import data_utils
from captioning.base.cli import InputError, Verbosity, make_parser
from captioning.config.settings import DataConfig
from captioning.data.annotations import SPLITS, Example
from data_utils import CaptionDataset, assign_splits, find_moved_copies, load_dataset, subsample

EXAMPLES = [Example(f"{i}.jpg", ("a", "b"), i) for i in range(50)]
KARPATHY = [
    {"filepath": "train2014", "filename": "a.jpg", "split": "train", "cocoid": 3, "sentences": [{"raw": "a dog"}]},
    {"filepath": "val2014", "filename": "b.jpg", "split": "test", "cocoid": 7, "sentences": [{"raw": "a cat"}]},
    {"filepath": "val2014", "filename": "c.jpg", "split": "val", "cocoid": 9, "sentences": [{"raw": "a cow"}]},
]


# Limiting and splitting.


def test_subsample_takes_images_with_all_their_captions():
    chosen = subsample(EXAMPLES, 21, seed=0)
    assert len(chosen) == 11
    assert chosen == subsample(EXAMPLES, 21, seed=0) != subsample(EXAMPLES, 21, seed=1)
    assert chosen == sorted(chosen, key=EXAMPLES.index), "in the order of the file"


def test_split_and_subsample_do_not_change_between_versions():
    assert [example.image_id for example in subsample(EXAMPLES, 8, seed=3)] == [8, 15, 34, 37]
    split = assign_splits(EXAMPLES, DataConfig(), {})
    assert [example.image_id for example in split if example.split == "val"] == [4, 7, 12, 19, 40]
    assert [example.image_id for example in split if example.split == "test"] == [2, 10, 11, 28, 41]
    assert [example.split for example in split].count("train") == 40
    assert split != assign_splits(EXAMPLES, DataConfig(split_seed=1), {})


@pytest.fixture
def split_lists(tmp_path):
    """A function that writes lists of names, by split, and returns their paths."""

    def split_lists(**contents):
        for split, content in contents.items():
            (tmp_path / split).write_bytes(content.encode() if isinstance(content, str) else content)
        return {split: tmp_path / split for split in contents}

    return split_lists


def splits_of(examples):
    return [(example.image_path, example.split) for example in examples]


def test_assign_splits_refuses_bad_lists(split_lists):
    lists = split_lists(train="0.jpg\n1.jpg\n", val="1.jpg\n")
    with pytest.raises(InputError, match=r"1\.jpg is in the val list and in the train list"):
        assign_splits(EXAMPLES, DataConfig(), lists)
    with pytest.raises(InputError, match="val: expected text in UTF-8"):
        assign_splits(EXAMPLES, DataConfig(), split_lists(train="0.jpg", val=b"\xff"))


def test_split_lists_may_have_the_encoding_of_the_annotations(split_lists):
    examples = [Example("ärmel.jpg", ("a",), 0), Example("ä2.jpg", ("a",), 1)]
    lists = split_lists(train="ärmel.jpg".encode("cp1252"), val="ä2.jpg".encode())
    split = assign_splits(examples, DataConfig(encoding="cp1252"), lists)
    assert splits_of(split) == [("ärmel.jpg", "train"), ("ä2.jpg", "val")]


def test_assign_splits_by_lists_finds_names_as_people_write_them(split_lists, capsys):
    names = ("a.jpg", "sub/B.jpg", "c.jpg", "x/d.jpg", "y/d.jpg")
    examples = [Example(name, ("a",), i) for i, name in enumerate(names)]
    lists = split_lists(train="\ufeff# list\n'photos\\A.JPG'\n./b.jpg # second\n", val="c\nd.jpg\nother/B.jpg\n")
    split = assign_splits(examples, DataConfig(), lists)
    assert splits_of(split) == [("a.jpg", "train"), ("sub/B.jpg", "train"), ("c.jpg", "val")]
    logged = capsys.readouterr().err
    assert "val: 2 images without captions are left out, the first: 'd.jpg'" in logged
    assert "split: 2 images in none of the lists, left out" in logged
    examples = [Example(name, ("a",), 0) for name in ("beach.jpg", "beach #2.jpg")]
    lists = split_lists(train="beach #2.jpg\n", val="beach.jpg # first\n")
    assert splits_of(assign_splits(examples, DataConfig(), lists)) == [("beach.jpg", "val"), ("beach #2.jpg", "train")]


def test_assign_splits_leaves_out_what_has_no_split_where_others_have_one(capsys):
    examples = [Example(f"{i}.jpg", ("a",), i, split) for i, split in enumerate(["train"] * 8 + ["test", "", ""])]
    split = [split for _, split in splits_of(assign_splits(examples, DataConfig(), {}))]
    assert sorted(set(split)) == ["test", "train", "val"] and len(split) == 9
    assert "split: 2 images without a split, left out" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("held_out", "splits"), [("test", {"train": 8, "val": 1, "test": 3}), ("val", {"train": 9, "val": 3})]
)
def test_assign_splits_trains_with_what_has_no_split_where_no_image_is_said_to_be_for_it(held_out, splits, capsys):
    examples = [Example(f"{i}.jpg", ("a",), i, held_out if i % 4 == 0 else "") for i in range(12)]
    found = dict(splits_of(assign_splits(examples, DataConfig(), {})))
    assert Counter(found.values()) == splits and {found[f"{i}.jpg"] for i in (0, 4, 8)} == {held_out}
    assert "split: 9 images without a split are for training, since none is marked for it" in capsys.readouterr().err


@pytest.mark.parametrize("fractions", [{"val_fraction": 0.6, "test_fraction": 0.5}, {"val_fraction": -0.1}])
def test_assign_splits_refuses_impossible_fractions(fractions):
    with pytest.raises(InputError, match="fractions"):
        assign_splits(EXAMPLES, DataConfig(**fractions), {})


def test_caption_dataset_exclude_and_fingerprint():
    dataset = CaptionDataset("small", Path("images"), tuple(EXAMPLES))
    smaller = dataset.exclude({"0.jpg", "9.jpg"})
    assert {e.image_path for e in dataset.examples} - {e.image_path for e in smaller.examples} == {"0.jpg", "9.jpg"}
    assert smaller.fingerprint != dataset.fingerprint
    assert dataset.fingerprint == "b1cf05f40c449c74", "it must not change between versions"
    elsewhere = dataclasses.replace(dataset, name="other", image_dir=Path("elsewhere"))
    assert elsewhere.fingerprint == dataset.fingerprint, "where the images are does not matter"


# Copies.


@pytest.fixture
def with_copies(tmp_path):
    """A function that makes a dataset, of given splits, where image 3 is a copy of 0, 4 of 1, and 5 of 2."""

    def with_copies(splits, drawn_splits):
        for number in range(7):
            (tmp_path / f"{number}.jpg").write_text(str(number % 3 if number < 6 else number))
        examples = [Example(f"{i}.jpg", ("a",), i, split) for i, split in enumerate(splits)]
        return CaptionDataset("small", tmp_path, tuple(examples), drawn_splits)

    return with_copies


@pytest.mark.parametrize(
    ("drawn_splits", "moved", "message"),
    [
        (SPLITS, {"3.jpg": "test", "5.jpg": "val"}, "2 moved into the split of another"),
        (
            ("train", "val"),
            {"5.jpg": "val"},
            "1 moved into the split of another and 1 in another split, as lists or annotations have it",
        ),
        ((), {}, "2 in another split, as lists or annotations have it"),
    ],
)
def test_copies_of_images_are_moved_into_one_split_if_chance_decided(with_copies, capsys, drawn_splits, moved, message):
    splits = ("test", "train", "val", "train", "train", "train", "train")
    assert find_moved_copies(with_copies(splits, drawn_splits)) == moved
    assert capsys.readouterr().err == f"split: of 3 images that are copies of others, {message}\n"


def test_copies_that_are_moved_leave_the_splits_about_their_size(with_copies):
    dataset = with_copies(("train", "train", "train", "val", "val", "val", "train"), SPLITS)
    assert find_moved_copies(dataset) == {"0.jpg": "val", "4.jpg": "train", "2.jpg": "val"}


def test_copies_of_one_split_are_not_mentioned(with_copies, capsys):
    assert find_moved_copies(with_copies(["train"] * 7, SPLITS)) == {}
    assert capsys.readouterr().err == ""


# The user's own data.


@pytest.fixture
def user_config(tmp_path):
    """A function that writes an annotation file, and a folder of empty images, and returns their settings."""

    def user_config(content, image_dir="images", names=()):
        for name in names or [f"{i}.jpg" for i in range(10)]:
            (tmp_path / image_dir / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / image_dir / name).touch()
        annotations = tmp_path / "annotations"
        annotations.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return DataConfig(annotations=str(annotations), images=str(tmp_path / image_dir))

    return user_config


@pytest.mark.usefixtures("all_options")
def test_load_dataset_of_the_user(user_config, tmp_path):
    config = user_config("image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10)))
    dataset = load_dataset(config)
    assert (dataset.name, len(dataset.split("train")), len(dataset.split("val"))) == ("images", 8, 1)
    assert dataset.drawn_splits == SPLITS
    without_test = load_dataset(dataclasses.replace(config, test_fraction=0))
    with pytest.raises(InputError, match=r"the test split has no images \(found: train 9, val 1, test 0\)"):
        without_test.split("test")
    assert dataset.fingerprint != without_test.fingerprint
    (tmp_path / "images").rename(tmp_path.parent / f"{tmp_path.name}_images")
    config = dataclasses.replace(config, images=None)
    with pytest.raises(InputError, match=r"none of the 10 images of .*; name the folder of the images with --images"):
        load_dataset(config)
    assert load_dataset(config, with_images=False).examples == dataset.examples, "only their captions are needed"


def test_load_dataset_refuses_lists_of_other_images(user_config, split_lists):
    config = user_config("image,caption\na.jpg,a\n", names=("a.jpg",))
    lists = {f"{split}_list": str(path) for split, path in split_lists(train="x.jpg", val="y.jpg").items()}
    with pytest.raises(InputError, match="none of its images is in the split lists"):
        load_dataset(dataclasses.replace(config, **lists))


def test_load_dataset_refuses_names_that_clash_without_their_folders(user_config):
    same_name = [image | {"filename": "a.jpg"} for image in KARPATHY]
    with pytest.raises(InputError, match=r"'train2014/a\.jpg' and 'val2014/a\.jpg' of .* would be one file"):
        load_dataset(user_config({"images": same_name}, names=("a.jpg",)))


def test_main_prints_the_splits_and_an_example(user_config, capsys, monkeypatch):
    monkeypatch.setattr(Verbosity, "quiet", False)  # which --quiet changes
    config = user_config("image,caption\n" + "".join(f"{i}.jpg,a dog\n" for i in range(10)))
    data_utils.main(["--annotations", config.annotations, "--images", config.images, "--quiet"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split() for line in lines[:3]] == [
        [split, size, "images", size, "captions"] for split, size in (("train", "8"), ("val", "1"), ("test", "1"))
    ]
    assert re.fullmatch(re.escape(config.images) + r"/\d\.jpg:", lines[3]) and lines[4:] == ["  a dog"]


def test_options_for_the_format_are_listed_by_data_utils_only():
    parsers = [make_parser("") for _ in range(2)]
    data_utils.add_data_options(parsers[0], full=True)
    data_utils.add_data_options(parsers[1], words="characters")
    assert "--caption-column NAME" in parsers[0].format_help()
    assert "--caption-column" not in parsers[1].format_help()
    assert "data_utils.py --help lists the options for the format of your captions" in parsers[1].format_help()
    args = parsers[1].parse_args(["--caption-column", "says"])
    assert (args.caption_column, args.words, args.separator) == ("says", "characters", None)
