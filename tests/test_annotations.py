"""Annotation files in all formats, good ones and bad ones."""

import json

import pytest

from captioning.annotations import FORMATS, Example, read_annotations
from captioning.cli import InputError

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
CSV = "image,caption\na.jpg,a dog\n"
TOKENS = "a.jpg#0\ta dog\na.jpg#1\tthe # dog\nb.jpg#0\ta cat\n"


@pytest.fixture
def read(tmp_path):
    """A function that reads annotations from a file with some text, or some JSON."""

    def read(content):
        path = tmp_path / "annotations"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return read_annotations(path)

    return read


def test_read_annotations_of_coco(read):
    assert read(COCO) == [Example("a.jpg", ("A dog , running .", "the dog"), 3), Example("b.jpg", ("a cat",), 7)]


def test_read_annotations_of_karpathy(read):
    assert read(KARPATHY) == [
        Example("train2014/a.jpg", ("a dog",), 3, "train"),
        Example("val2014/b.jpg", ("a cat",), 7, "test"),
    ]


def test_read_annotations_of_csv_with_quoted_and_unquoted_commas(read):
    examples = read('\ufeffimage,caption\na.jpg,"a dog, running"\na.jpg,a ""big"" dog , running\nb.jpg,\nc.jpg,a cat\n')
    lengths = [(example.image_path, len(example.captions)) for example in examples]
    assert lengths == [("a.jpg", 2), ("c.jpg", 1)], "an empty caption is dropped"
    assert examples[0].captions[0] == "a dog, running"
    assert examples[0].captions[1].endswith("dog , running")


def test_read_annotations_of_flickr8k_tokens(read):
    assert read(TOKENS) == [Example("a.jpg", ("a dog", "the # dog"), 0), Example("b.jpg", ("a cat",), 1)]


@pytest.mark.parametrize("content", [COCO, KARPATHY, CSV, TOKENS, ["annotations"], {}, "hello"])
def test_formats_match_at_most_one(content):
    assert sum(matches(content) for matches, _ in FORMATS) == (content not in (["annotations"], {}, "hello"))


def test_read_annotations_logs_captions_without_a_word(read, tmp_path, capsys):
    assert [example.image_path for example in read("image,caption\na.jpg,a dog\na.jpg,?!\nb.jpg,___\n")] == ["a.jpg"]
    assert capsys.readouterr().err.splitlines() == [
        f"skipped {tmp_path}/annotations: a caption without a word: '{name}' '{caption}'"
        for name, caption in (("a.jpg", "?!"), ("b.jpg", "___"))
    ]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "not a known annotation format"),
        ("hello\nworld", "not a known annotation format"),
        ("{", "expected JSON"),
        ("[]", "neither COCO"),
        ({"images": []}, "neither COCO"),
        ({"images": "../images", "cnn": "InceptionV3"}, "JSON without captions"),
        ({"annotations": [{"image_id": 1}], "images": []}, "neither COCO"),
        ({"images": [{"sentences": [{"raw": "a dog"}]}]}, "neither COCO.*'filename'"),
        ("image,caption\na.jpg, .\n", "no usable caption"),
        ("image,caption\n../../etc/passwd,a dog\n", "leads out of the image folder"),
        ("image,caption\n/etc/passwd,a dog\n", "leads out of the image folder"),
        ("image,caption\nimages\\a.jpg,a dog\n", "leads out of the image folder"),
        ('image,caption\na.jpg,"a dog\nb.jpg,a cat\n', "'a.jpg' runs over other lines; close its quote"),
        ('image,caption\na.jpg,"' + "a dog " * 30_000 + '"\n', "not a CSV that can be read"),
        ({"images": [{"id": 1, "file_name": 5}], "annotations": [{"image_id": 1, "caption": "a"}]}, "expected text"),
        ({"images": [{"id": 0.5, "file_name": "a"}], "annotations": [{"image_id": 0.5, "caption": "a"}]}, "the id 0.5"),
        ({"images": [KARPATHY["images"][0] | {"split": "dev"}]}, "found the id 3 and the split 'dev'"),
        ({"images": [KARPATHY["images"][0] | {"split": ""}]}, "found the id 3 and the split None"),
        ({"images": [image | {"cocoid": 1} for image in KARPATHY["images"]]}, "have the same id, 1"),
        ({"images": [KARPATHY["images"][0] | {"sentences": [{"raw": "half \ud800"}]}]}, "not Unicode text"),
    ],
)
def test_read_annotations_refuses_bad_files_in_one_line(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


def test_read_annotations_refuses_wrong_encoding_and_missing_file(tmp_path):
    (tmp_path / "latin").write_bytes("image,caption\na.jpg,caf\xe9".encode("latin-1"))
    with pytest.raises(InputError, match="UTF-8"):
        read_annotations(tmp_path / "latin")
    with pytest.raises(InputError, match="no such annotation file"):
        read_annotations(tmp_path / "none")
