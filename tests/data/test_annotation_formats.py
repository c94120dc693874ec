"""Every format of annotations, written and read again; and what in them is left out, repaired or refused."""

import json
import random
import re
from pathlib import Path

import pytest
from helpers.annotation_files import WRITERS, coco, karpathy, objects

from captioning.base.cli import InputError
from captioning.base.text import normalize_text
from captioning.data.annotation_formats import FORMATS, parse_annotations
from captioning.data.annotations import read_annotations
from captioning.data.caption_table import ReadOptions

CAPTIONS = {
    "a.jpg": ["a dog runs", "the dog , which is brown , runs"],
    "b.jpg": ["a cat"],
    "c d.jpg": ['a "big" horse; it stands', "a sign: 1/2 | stop"],
    "e.jpg": ["ein Mädchen läuft über die Straße", "一只狗 在跑步"],
}
# What the formats of UNQUOTED cannot hold is left out.
PLAIN = {name: [" ".join(re.sub('["|;]', "", text).split()) for text in texts] for name, texts in CAPTIONS.items()}
UNQUOTED = ("results.csv", "rows", "Flickr8k.token.txt", "Flickr8k-CN", "text files")


def write(description, captions, tmp_path):
    """Writes captions in a format; returns its name and the path."""
    name, writer = WRITERS[description]
    path = tmp_path / "annotations"
    writer(captions, path)
    return name, path


def captions_of(examples):
    return {example.image_path.rpartition("/")[2]: list(example.captions) for example in examples}


@pytest.mark.parametrize("description", WRITERS)
def test_every_format_is_read_as_it_was_written(description, tmp_path, capsys):
    captions = PLAIN if description in UNQUOTED else CAPTIONS
    if description == "Flickr8k-CN":  # which has no spaces in its names
        captions = {name.replace(" ", ""): texts for name, texts in captions.items()}
    name, path = write(description, captions, tmp_path)
    assert captions_of(read_annotations(path)) == captions
    logged = capsys.readouterr().err
    assert f"{path}: {name}" in logged and "7 captions of 4 images" in logged and "skipped" not in logged


@pytest.mark.parametrize("description", WRITERS)
def test_random_captions_are_read_as_they_were_written(description, tmp_path):
    rng = random.Random(description)
    letters = "abc äß" + ("" if description in UNQUOTED else "\",;|'\\#{}[]:") + "犬é01"
    captions = {
        f"{number}.jpg": ["a" + "".join(rng.choices(letters, k=rng.randint(1, 30))) for _ in range(rng.randint(1, 5))]
        for number in range(20)
    }
    _, path = write(description, captions, tmp_path)
    expected = {name: [normalize_text(text) for text in texts] for name, texts in captions.items()}
    assert captions_of(read_annotations(path)) == expected


def documented_examples():
    """Yields the name and the example of every format that docs/data.md shows."""
    text = (Path(__file__).parents[2] / "docs/data.md").read_text(encoding="utf-8")
    yield from re.findall(r"^### ([^\n]*)\n\n```\n(.*?)```", text, re.MULTILINE | re.DOTALL)


def test_every_format_is_documented_in_three_lines():
    examples = dict(documented_examples())
    assert sorted(examples) == sorted(annotation_format.name for annotation_format in FORMATS)
    assert {len(example.splitlines()) for example in examples.values()} == {3}


@pytest.mark.parametrize(("name", "example"), [e for e in documented_examples() if "folder" not in e[0]])
def test_documented_examples_are_read(tmp_path, name, example):
    (tmp_path / "file").write_text(example.replace("<TAB>", "\t"), encoding="utf-8")
    found, parsed = parse_annotations(tmp_path / "file", ReadOptions())
    assert found == name and len(parsed.rows) >= 2 and not any(row.problem for row in parsed.rows)


# COCO and its relatives.


@pytest.fixture
def read(tmp_path):
    """Reads JSON, or text; returns what the reader found."""

    def read(content, options=None):
        path = tmp_path / "annotations"
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return parse_annotations(path, options or ReadOptions())[1]

    return read


def test_coco_ids_may_be_text_and_annotations_of_other_images_are_marked(read):
    content = coco({"a.jpg": ["a dog"], "b.jpg": ["a cat"]})
    content["annotations"][1]["image_id"] = "10"
    content["annotations"].append({"image_id": 99, "caption": "a ghost"})
    rows = read(content).rows
    assert [(row.image_path, row.image_id, row.problem) for row in rows] == [
        ("a.jpg", 0, ""),
        ("b.jpg", 10, ""),
        ("image_id 99", 99, "an annotation of an image that is not listed"),
    ]


def test_vizwiz_sentences_that_are_no_captions_are_marked(read):
    content = coco({"a.jpg": ["Quality issues are too severe to recognize visual content.", "spam", "a dog"]})
    for annotation, (is_precanned, is_rejected) in zip(
        content["annotations"], [(True, False), (False, True), (False, False)], strict=True
    ):
        annotation |= {"is_precanned": is_precanned, "is_rejected": is_rejected}
    assert [bool(row.problem) for row in read(content).rows] == [True, True, False]


def test_stair_gives_its_tokenized_captions(read):
    content = coco({"a.jpg": ["犬が走る"]})
    content["annotations"][0]["tokenized_caption"] = "犬 が 走る"
    parsed = read(content)
    assert [row.caption for row in parsed.rows] == ["犬 が 走る"] and "tokenized_caption" in parsed.details


def test_karpathy_names_the_split_in_other_words(read):
    content = karpathy({name: ["a dog"] for name in "abcd"})
    for image, split in zip(content["images"], ("restval", "dev", "test", "train"), strict=True):
        image["split"] = split
    assert [row.split for row in read(content).rows] == ["train", "val", "test", "train"]


def test_one_odd_item_does_not_end_the_reading(read):
    content = coco({"a.jpg": ["a dog"], "b.jpg": ["a cat"]})
    del content["images"][1]["id"], content["annotations"][1]["image_id"]
    content["images"].append(7)
    assert [row.image_path for row in read(content).rows if not row.problem] == ["a.jpg"]
    content = karpathy({name: ["a dog"] for name in "ab"})
    del content["images"][0]["split"], content["images"][1]["sentences"][0]["raw"]
    content["images"].append(content["images"][1] | {"sentences": [{"raw": "a cat"}]})
    assert [(row.image_path, bool(row.problem)) for row in read(content).rows] == [
        ("a", True),
        ("b", False),
        ("b", False),
    ]


# Objects.


def test_json_lines_mark_broken_lines(read):
    lines = [json.dumps(row) for row in objects({"a.jpg": ["a dog"], "b.jpg": ["a cat"]}, "file_name", "text")]
    rows = read("\n".join([lines[0], '{"file_name": "x.jpg", "te', lines[1], '{"file_name": "y.jpg"}'])).rows
    assert [row.image_path for row in rows if not row.problem] == ["a.jpg", "b.jpg"]
    assert [row.problem for row in rows if row.problem] == [
        "object 2 is not JSON with file_name and text",
        "object 4 is not JSON with file_name and text",
    ]


def test_one_line_of_json_lines_is_read(read):
    assert read('{"file_name": "a.jpg", "text": "a dog"}\n').rows[0][:2] == ("a.jpg", "a dog")


def test_fields_of_objects_can_be_named(read):
    content = [{"photo": "a.jpg", "says": ["a dog", "the dog"]}]
    with pytest.raises(InputError, match="the fields of the first are photo, says"):
        read(content)
    rows = read(content, ReadOptions(image_column="photo", caption_column="says")).rows
    assert [row[:2] for row in rows] == [("a.jpg", "a dog"), ("a.jpg", "the dog")]


# Folders.


def test_folder_of_text_files_names_images_without_one(tmp_path):
    for name in ("a.jpg", "b.jpg", "bad.jpg", "._a.jpg", "Thumbs.db", "val/c.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "a.txt").write_text("a dog\n\nthe dog\n")
    (tmp_path / "val/c.caption").write_text("a cat")
    (tmp_path / "notes.txt").write_text("not of an image")
    (tmp_path / "bad.txt").write_bytes("caf\xe9".encode("latin-1"))
    rows = parse_annotations(tmp_path, ReadOptions())[1].rows
    assert [(row.image_path, row.caption, row.split) for row in rows if not row.problem] == [
        ("a.jpg", "a dog", ""),
        ("a.jpg", "the dog", ""),
        ("val/c.png", "a cat", "val"),
    ]
    missing, unreadable = (f"{row.image_path}: {row.problem}" for row in rows if row.problem)
    assert missing == "b.jpg: an image without a .txt file beside it"
    assert unreadable.startswith("bad.jpg: a text that cannot be read (") and "bad.txt" in unreadable


def test_folder_of_text_files_follows_links_once(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere/a.jpg").touch()
    (tmp_path / "elsewhere/a.txt").write_text("a dog")
    folder = tmp_path / "photos"
    folder.mkdir()
    (folder / "train").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/loop").symlink_to(folder)
    rows = parse_annotations(folder, ReadOptions())[1].rows
    assert [row[:2] for row in rows] == [("train/a.jpg", "a dog")]


def test_image_folder_with_both_kinds_of_metadata_is_read_once(tmp_path):
    (tmp_path / "metadata.csv").write_text("file_name,text\na.jpg,a dog\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.jpg", "text": "a dog"}\n')
    assert len(parse_annotations(tmp_path, ReadOptions())[1].rows) == 1


def test_image_folder_has_splits_by_folder(tmp_path):
    _, path = write("ImageFolder", CAPTIONS, tmp_path)
    examples = {example.image_path: example.split for example in read_annotations(path)}
    assert examples == {
        "train/a.jpg": "train",
        "train/c d.jpg": "train",
        "validation/b.jpg": "val",
        "validation/e.jpg": "val",
    }


def test_folder_without_captions_is_refused(tmp_path):
    (tmp_path / "a.jpg").touch()
    with pytest.raises(InputError, match=r"expected a folder with metadata\.csv or metadata\.jsonl, or with a \.txt"):
        parse_annotations(tmp_path, ReadOptions())


# What is no format.


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "empty; expected captions"),
        ("hello\nworld", "not a known annotation format"),
        (
            "picture,words\na.jpg,a dog\n",
            "name others with --image-column and --caption-column, and an unusual --separator; its first line is 'pi",
        ),
        ("a dog\thttp://example.com/a.jpg\n", "img2dataset"),
        ("url,caption\nhttp://example.com/a.jpg,a dog\n", "img2dataset"),
        ("image,caption\nhttp://example.com/a.jpg,a dog\n", "its images are addresses"),
        ("{", "expected JSON"),
        ("[]", "JSON without captions"),
        ("[1, 2]", "JSON without captions"),
        ({"images": []}, "JSON without captions"),
        ({"images": "../images", "cnn": "InceptionV3"}, "JSON without captions"),
        ({"train": [{"id": "a", "report": "normal", "image_path": ["a.png"]}]}, "JSON without captions"),
        ([{"id": 5, "caption": "a dog"}], "the fields of the first are id, caption"),
        ({"annotations": [{"id": 1}], "images": 5}, "expected COCO captions JSON .*; a field is missing or wrong"),
        ({"images": [{"sentences": [{"raw": "a dog"}]}]}, "expected Karpathy's JSON .*'filename'"),
    ],
)
@pytest.mark.usefixtures("all_options")
def test_other_content_is_refused_in_one_line(read, content, message):
    with pytest.raises(InputError, match=message) as error:
        read(content)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            "image,caption\na.jpg,café\n".encode("cp1252"),
            r"text in UTF-8 \(.* at byte 23\); .* --encoding, such as win",
        ),
        ("image,caption\na.jpg,a dog\n".encode("utf-16-le"), "found zeros; save it as UTF-8, or name its --encoding"),
        (b"\xff\xfea", "expected text in UTF-16"),
        (b"PAR1" + bytes(20), "expected text, found a binary file"),
        (b"PK\x03\x04" + bytes(20), "expected text, found a binary file"),
        (bytes(257) + b"ustar", "expected text, found a binary file"),
    ],
    ids=["cp1252", "utf-16-le", "utf-16", "Parquet", "zip", "tar"],
)
@pytest.mark.usefixtures("all_options")
def test_other_encodings_and_binary_files_are_refused_in_one_line(tmp_path, content, message):
    (tmp_path / "file").write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        parse_annotations(tmp_path / "file", ReadOptions())
    assert "\n" not in str(error.value)


def test_encoding_can_be_named(tmp_path):
    (tmp_path / "file").write_bytes("image,caption\na.jpg,café\n".encode("cp1252"))
    rows = parse_annotations(tmp_path / "file", ReadOptions(encoding="windows-1252"))[1].rows
    assert rows[0].caption == "café"
    for name in ("klingon", "undefined", "base64"):
        with pytest.raises(InputError, match=f"--encoding {name}: no such encoding"):
            parse_annotations(tmp_path / "file", ReadOptions(encoding=name))
    with pytest.raises(InputError, match="no such annotation file"):
        parse_annotations(tmp_path / "none", ReadOptions())
