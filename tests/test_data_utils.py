import dataclasses
import json

import pytest

import data_utils
from common import InputError
from data_utils import DataOptions, Example, assign_splits, choose, read_annotations

COCO = {
    "images": [{"id": 7, "file_name": "b.jpg"}, {"id": 3, "file_name": "a.jpg"}],
    "annotations": [
        {"image_id": 3, "id": 1, "caption": "A dog , running ."},
        {"image_id": 7, "id": 2, "caption": "a cat\n"},
        {"image_id": 3, "id": 4, "caption": "the dog"},
    ],
}
KARPATHY = {
    "images": [
        {
            "filename": "a.jpg",
            "filepath": "train2014",
            "split": "restval",
            "cocoid": 3,
            "sentences": [{"raw": "a dog"}],
        },
        {
            "filename": "b.jpg",
            "filepath": "val2014",
            "split": "test",
            "cocoid": 7,
            "sentences": [{"raw": "a cat"}, {"raw": " "}],
        },
    ]
}


def written(tmp_path, content):
    path = tmp_path / "annotations"
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def test_reads_coco(tmp_path):
    found = read_annotations(written(tmp_path, COCO))
    assert found == [Example("a.jpg", ("A dog , running .", "the dog"), 3), Example("b.jpg", ("a cat",), 7)]


def test_reads_karpathy(tmp_path):
    found = read_annotations(written(tmp_path, KARPATHY))
    assert found == [
        Example("train2014/a.jpg", ("a dog",), 3, "train"),
        Example("val2014/b.jpg", ("a cat",), 7, "test"),
    ]


def test_reads_csv_with_quoted_and_unquoted_commas(tmp_path):
    text = '\ufeffimage,caption\na.jpg,"a dog, running"\na.jpg,a ""big"" dog , running\nb.jpg,\nc.jpg,a cat\n'
    found = read_annotations(written(tmp_path, text))
    assert [(e.image, len(e.captions)) for e in found] == [("a.jpg", 2), ("c.jpg", 1)], "an empty caption is dropped"
    assert found[0].captions[0] == "a dog, running"
    assert found[0].captions[1].endswith("dog , running")


def test_reads_flickr8k_tokens(tmp_path):
    found = read_annotations(written(tmp_path, "a.jpg#0\ta dog\na.jpg#1\tthe # dog\nb.jpg#0\ta cat\n"))
    assert found == [Example("a.jpg", ("a dog", "the # dog"), 0), Example("b.jpg", ("a cat",), 1)]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a known annotation format"),
        ("hello\nworld", "not a known annotation format"),
        ("{", "expected JSON"),
        ("[]", "neither COCO"),
        ({"images": []}, "neither COCO"),
        ({"annotations": [{"image_id": 1}], "images": []}, "neither COCO"),
        ("image,caption\na.jpg, .\n", "no usable caption"),
        ("image,caption\n../../etc/passwd,a dog\n", "leads out of the image folder"),
        ("image,caption\n/etc/passwd,a dog\n", "leads out of the image folder"),
        ({"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "caption": "a"}]}, "expected text"),
    ],
)
def test_bad_annotations_get_one_line(tmp_path, content, message):
    with pytest.raises(InputError, match=message) as error:
        read_annotations(written(tmp_path, content))
    assert "\n" not in str(error.value)


def test_wrong_encoding_and_missing_file(tmp_path):
    (tmp_path / "latin").write_bytes("image,caption\na.jpg,caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_annotations(tmp_path / "latin")
    with pytest.raises(InputError, match="no such annotation file"):
        read_annotations(tmp_path / "none")


EXAMPLES = [Example(f"{i}.jpg", ("a", "b"), i) for i in range(50)]


def test_seeded_split_is_by_picture():
    split = assign_splits(EXAMPLES, DataOptions(), {})
    assert [sum(e.split == name for e in split) for name in ("train", "val", "test")] == [40, 5, 5]
    assert split == assign_splits(EXAMPLES, DataOptions(), {}), "the same seed must give the same split"
    assert split != assign_splits(EXAMPLES, DataOptions(split_seed=1), {})


def test_lists_decide(tmp_path):
    for name, rows in (("train", "0.jpg\n1.jpg\n"), ("val", "2.jpg\n")):
        (tmp_path / name).write_text(rows)
    split = assign_splits(EXAMPLES, DataOptions(), {"train": tmp_path / "train", "val": tmp_path / "val"})
    assert [(e.image, e.split) for e in split] == [("0.jpg", "train"), ("1.jpg", "train"), ("2.jpg", "val")]
    (tmp_path / "val").write_text("1.jpg\n")
    with pytest.raises(InputError, match=r"1\.jpg is in the val list and in the train list"):
        assign_splits(EXAMPLES, DataOptions(), {"train": tmp_path / "train", "val": tmp_path / "val"})
    with pytest.raises(InputError, match="missing: val"):
        assign_splits(EXAMPLES, DataOptions(), {"train": tmp_path / "train"})


def test_own_split_is_kept():
    own = [dataclasses.replace(e, split="train" if e.image_id % 2 else "val") for e in EXAMPLES]
    assert assign_splits(own, DataOptions(), {}) == own


@pytest.mark.parametrize("fractions", [{"val_fraction": 0.6, "test_fraction": 0.5}, {"val_fraction": -0.1}])
def test_impossible_fractions(fractions):
    with pytest.raises(InputError, match="fractions"):
        assign_splits(EXAMPLES, DataOptions(**fractions), {})


def test_choose_takes_whole_pictures():
    chosen = choose(EXAMPLES, 21, seed=0)
    assert len(chosen) == 11
    assert chosen == choose(EXAMPLES, 21, seed=0) != choose(EXAMPLES, 21, seed=1)


def test_load_own_data(tmp_path):
    (tmp_path / "images").mkdir()
    rows = "".join(f"{i}.jpg,a dog\n" for i in range(10))
    annotations = written(tmp_path, "image,caption\n" + rows)
    options = DataOptions(annotations=str(annotations), images=str(tmp_path / "images"))
    dataset = data_utils.load_dataset(options)
    assert (dataset.name, len(dataset.split("train")), len(dataset.split("val"))) == ("images", 8, 1)
    without_test = data_utils.load_dataset(dataclasses.replace(options, test_fraction=0))
    with pytest.raises(InputError, match="the test split has no picture"):
        without_test.split("test")
    assert dataset.fingerprint != without_test.fingerprint
    with pytest.raises(InputError, match="needs --images"):
        data_utils.load_dataset(dataclasses.replace(options, images=None))
    with pytest.raises(InputError, match="no such image folder"):
        data_utils.load_dataset(dataclasses.replace(options, images=str(tmp_path / "none")))


def test_flickr8k_lists_beside_the_annotations_are_used(tmp_path):
    (tmp_path / "images").mkdir()
    annotations = written(tmp_path, "image,caption\na.jpg,a\nb.jpg,b\nc.jpg,c\n")
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("c.jpg\n")
    (tmp_path / "Flickr_8k.devImages.txt").write_text("a.jpg\n")
    dataset = data_utils.load_dataset(DataOptions(annotations=str(annotations), images=str(tmp_path / "images")))
    assert [(e.image, e.split) for e in dataset.examples] == [("a.jpg", "val"), ("c.jpg", "train")]


def test_karpathys_pictures_in_one_folder(tmp_path):
    (tmp_path / "flat").mkdir()
    options = DataOptions(annotations=str(written(tmp_path, KARPATHY)), images=str(tmp_path / "flat"))
    assert [e.image for e in data_utils.load_dataset(options).examples] == ["a.jpg", "b.jpg"]
    (tmp_path / "flat/train2014").mkdir()
    assert data_utils.load_dataset(options).examples[0].image == "train2014/a.jpg"
