import json

import pytest

from captioning.base.cli import InputError
from captioning.data.annotations import Example, read_annotations
from captioning.scores.coco_results import ImageIndex, read_results, result_ids

EXAMPLES = [Example(f"{i}.jpg", ("a dog",), 100 + i, "val") for i in range(3)]
RESULTS = [
    {"image_id": 102, "caption": "two men"},
    {"image_id": 100, "caption": "a dog runs on the grass"},
    {"image_id": 101, "caption": "a cat sleeps"},
]
TEXTS = ["a dog runs on the grass", "a cat sleeps", "two men"]
FOLDERS = [
    Example("val/COCO_val2014_000000000391.jpg", ("a dog",), 391),
    Example("val/b.jpg", ("a cat",), 7),
    Example("c.jpg.png", ("a hat",), "x7"),
    Example("other/b.jpg", ("a car",), 50),
    Example("c.jpg", ("a bus",), 51),
    Example("50.jpg", ("a pen",), 0),
]


@pytest.mark.parametrize(
    ("image_id", "expected"),
    [
        (391, 0),
        ("000000000391", 0),
        ("val/COCO_val2014_000000000391.jpg", 0),
        ("COCO_val2014_000000000391.jpg", 0),
        ("COCO_val2014_000000000391", 0),
        ("other/b.jpg", 3),
        ("x7", 2),
        ("/data/photos/other/b.jpg", 3),
        ("photos/50.jpg", 5),
        ("photos\\50", 5),
        ("photos/other.jpg", None),
        ("third/b.jpg", None),  # a folder that the data do not have
        ("c.jpg", 4),  # a name comes before a stem
        ("0000", 5),
        (50, 3),  # a number is an id
        (8, None),
        ("", None),
    ],
)
def test_image_index_finds_images_by_id_path_name_and_stem(image_id, expected):
    found = ImageIndex(FOLDERS).find(image_id)
    assert found == (None if expected is None else FOLDERS[expected])


@pytest.mark.parametrize(
    ("image_id", "first", "second"),
    [
        ("b.jpg", r"other/b\.jpg \(id 50\)", r"val/b\.jpg \(id 7\)"),
        ("50", r"50\.jpg \(id 0\)", r"other/b\.jpg \(id 50\)"),
    ],
)
def test_image_index_refuses_what_means_two_images(image_id, first, second):
    with pytest.raises(InputError, match=f"image_id '{image_id}' means 2 images, such as {first} and {second}"):
        ImageIndex(FOLDERS).find(image_id)


def test_read_results_finds_the_caption_of_each_image(tmp_path, capsys):
    path = tmp_path / "results.json"
    rows = [{"image_id": "102", "caption": "two\r\nmen"}, *RESULTS[1:], {"image_id": 7, "caption": "of another split"}]
    path.write_text(json.dumps([*rows, {"image_id": "8.jpg", "caption": "of nothing"}]), encoding="utf-8-sig")
    captions = read_results(path, EXAMPLES, [*EXAMPLES, Example("7.jpg", ("a hat",), 7, "test")])
    assert [" ".join(caption.split()) for caption in captions] == TEXTS
    log = capsys.readouterr().err
    assert f"{path}: 1 captions of images of other splits are left out" in log
    no_image = "1 of its 5 captions belong to no image of the data, the first with image_id '8.jpg'; left out"
    assert f"{path}: {no_image}" in log


def test_numbers_are_names_where_the_annotations_have_no_ids(tmp_path):
    names = sorted(f"{number}.jpg" for number in range(12))  # 0, 1, 10, 11, 2
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a dog\n" for name in names))
    (tmp_path / "r.json").write_text(json.dumps([{"image_id": i, "caption": f"caption {i}"} for i in range(12)]))
    examples = read_annotations(tmp_path / "captions.csv")
    texts = read_results(tmp_path / "r.json", examples)
    assert texts == [f"caption {example.image_path.removesuffix('.jpg')}" for example in examples]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps([{**row, "caption": [row["caption"]]} for row in RESULTS]),
        "\n".join(json.dumps(row) for row in RESULTS),
        "\n".join(json.dumps({"image": f"{i}.jpg", "caption": text, "plot": None}) for i, text in enumerate(TEXTS)),
        json.dumps({str(row["image_id"]): row["caption"] for row in RESULTS}),
        json.dumps({f"{i}.jpg": [text] for i, text in enumerate(TEXTS)}),
        "image_id,caption\n" + "".join(f'{row["image_id"]},"{row["caption"]}"\n' for row in RESULTS),
        "image_id\tcaption\n" + "".join(f"{row['image_id']}\t{row['caption']}\n" for row in RESULTS),
        "Image; Sentence\n" + "".join(f"{i}.jpg; {text}\n" for i, text in enumerate(TEXTS)),
        "\n".join(json.dumps({"file_name": f"{i}.jpg", "text": text}) for i, text in enumerate(TEXTS)),
        "image,rank,caption\n" + "".join(f"in/{i}.jpg,1,{text}\nin/{i}.jpg,2,no\n" for i, text in enumerate(TEXTS)),
    ],
    ids=[
        "lists of one",
        "lines",
        "lines of inference",
        "ids",
        "names",
        "table",
        "tabs",
        "columns",
        "fields",
        "inference",
    ],
)
def test_read_results_in_other_forms(tmp_path, capsys, text):
    path = tmp_path / "results"
    path.write_text(text)
    assert read_results(path, EXAMPLES) == TEXTS
    assert ("3 captions that are not the first of their image are left out" in capsys.readouterr().err) == (
        "rank" in text
    )


def test_ids_of_another_split_may_be_the_same(tmp_path, capsys):
    others = [Example(f"test/{i}.jpg", ("a hat",), 100 + i, "test") for i in range(3)]
    path = tmp_path / "results.json"
    path.write_text(json.dumps(RESULTS))
    assert read_results(path, EXAMPLES, [*EXAMPLES, *others]) == TEXTS
    with pytest.raises(InputError, match="image_id 102 means 2 images"):
        read_results(path, [*EXAMPLES, *others])
    assert result_ids(EXAMPLES) == [100, 101, 102]
    rows = [{"image_id": i, "caption": "a dog"} for i in result_ids([*EXAMPLES, *others])]
    assert "written with their paths instead" in capsys.readouterr().err
    path.write_text(json.dumps(rows))
    assert read_results(path, [*EXAMPLES, *others]) == ["a dog"] * 6


def test_read_results_takes_off_marks_around_captions(tmp_path, capsys):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**row, "caption": f"startseq {row['caption']} endseq"} for row in RESULTS]))
    assert read_results(path, EXAMPLES) == TEXTS
    assert f"{path}: marks around 3 captions are taken off: startseq and endseq" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (RESULTS[:2], "no caption of 1 of the 3 images, the first with image_id 101"),
        (
            [*RESULTS[:2], {"image_id": "a.jpg", "caption": "a dog"}],
            "1 of its 3 captions belong to no image of the data",
        ),
        ([*RESULTS, {"image_id": "2", "caption": "men"}], r"found two of image_id 102 \(2\.jpg\), the second as '2'"),
        ([{"image_id": 100, "caption": "half a \ud800"}], "not COCO results"),
        ({"annotations": RESULTS}, "not COCO results"),
        ([{"image_id": [1], "caption": "a dog"}], "not COCO results"),
        ([{"image_id": True, "caption": "a dog"}], "not COCO results"),
        ([{"image_id": 100, "caption": ["a dog", "the dog"]}], "not COCO results; .* found \"{'image_id': 100"),
        ("image,caption\n0.jpg,a dog, running\n", r"expected 2 columns in each row, found more in 1, .*0\.jpg"),
        ('image,caption\n0.jpg,"a dog\n1.jpg,men"\n2.jpg,a cat\n', "expected a row on each line"),
        ('image,caption\n0.jpg,"a dog\n', "expected quotes in pairs"),
        ("a text", "not COCO results"),
        ('{"100": "a dog", "100": "a cat"}', "the key '100' is twice in an object"),
    ],
)
def test_read_results_refuses_bad_files(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(InputError, match=message):
        read_results(path, EXAMPLES)
