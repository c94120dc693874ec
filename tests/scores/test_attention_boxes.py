import json
import math

import numpy as np
import pytest
from PIL import Image

from captioning.base.cli import InputError
from captioning.data.annotations import Example
from captioning.output.captions import Caption
from captioning.scores.attention_boxes import cover_grid, measure_attention, measure_captions, read_boxes, words_named

EXAMPLES = [Example(f"val/{name}.jpg", ("a dog",), number) for number, name in enumerate("abc")]
COCO = {
    "images": [
        {"id": 7, "file_name": "a.jpg", "width": 40, "height": 20},
        {"id": 8, "file_name": "b.jpg", "width": 10, "height": 10},
        {"id": 9, "file_name": "other.jpg", "width": 10, "height": 10},
    ],
    "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "fire hydrant"}],
    "annotations": [
        {"image_id": 7, "category_id": 1, "bbox": [10, 0, 20, 10]},
        {"image_id": 7, "category_id": 1, "bbox": [0.0, 10.0, 40.5, 10.5]},  # rounded
        {"image_id": 8, "category_id": 2, "bbox": [5, 5, 10, 5]},  # reaches out
        {"image_id": 8, "category_id": 2, "bbox": [5, 5, 0, 5]},
        {"image_id": 9, "category_id": 1, "bbox": [0, 0, 5, 5]},
    ],
}
TABLE = r"""Word;image;left;top;right;bottom;annotator
dog;a.jpg;10;0;30;10;me
Dog;.\VAL\a.JPG;0;10;40.5;20.5;me
fire hydrant;b;5;5;15;10;me
hydrant;b.jpg;5;5;5;10;me
dog;other.jpg;0;0;5;5;me
;;;;;;
"""
BOXES = [{"dog": [(0.25, 0, 0.75, 0.5), (0, 0.5, 1, 1)]}, {"hydrant": [(0.5, 0.5, 1, 1)]}, {}]


@pytest.fixture
def image_dir(tmp_path):
    """a.jpg is 40 pixels wide and 20 high, after it has been turned upright."""
    (tmp_path / "val").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 40)).save(tmp_path / "val/a.jpg", exif=exif)
    Image.new("RGB", (10, 10)).save(tmp_path / "val/b.jpg")
    return tmp_path


def make_caption(text, attention):
    words = tuple(text.split())
    return Caption(text, words, (1.0,) * len(words), np.array(attention))


# Reading.


@pytest.mark.parametrize("content", [json.dumps(COCO), TABLE, TABLE.replace(";", ",")])
def test_read_boxes_reads_coco_and_tables(tmp_path, image_dir, capsys, content):
    path = tmp_path / "boxes"
    path.write_text(content, encoding="utf-8-sig")
    assert read_boxes(path, EXAMPLES, image_dir) == BOXES
    found, *notes = capsys.readouterr().err.strip().split("; ")
    assert found == f"{path}: 3 boxes of 2 of the 3 images"
    assert sorted(note[:14] for note in notes) == ["1 of other ima", "1 reach out of", "1 without an a"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (json.dumps({"images": [], "annotations": [{"caption": "a dog"}]}), r"wrong: KeyError\('categories'\)"),
        (json.dumps(COCO | {"images": []}), r"wrong: KeyError\(7\)"),
        (json.dumps(COCO | {"categories": [{"id": 1, "name": " "}]}), "wrong: IndexError"),
        ("[1]", "expected COCO's instances JSON, or a CSV"),
        ("{", "expected JSON"),
        ("", "columns image, word, left"),
        ("image,left,top,right,bottom\n", "the first line is 'image,left,top,right,bottom'"),
        (TABLE.replace("30", "x"), r"line 2: expected a word and four numbers, found \['dog', '10', '0', 'x', '10'\]"),
        (TABLE.replace("Dog", ""), "line 3: expected a word and four numbers"),
        (TABLE.replace("a.jpg", "c.jpg"), r"c\.jpg: no such image"),
        ("image,word,left,top,right,bottom\nx.jpg,dog,0,0,1,1\n", "found none; 1 of other images are left out$"),
        ("image,word,left,top,right,bottom\n", "expected boxes of the 3 images, such as val/a.jpg, found none$"),
    ],
)
def test_read_boxes_refuses_bad_files(tmp_path, image_dir, content, message):
    path = tmp_path / "boxes"
    path.write_text(content)
    with pytest.raises(InputError, match=message):
        read_boxes(path, EXAMPLES, image_dir)


# Measuring.


@pytest.mark.parametrize(
    ("word", "box_word"),
    [("dog", "dog"), ("dogs", "dog"), ("buses", "bus"), ("puppies", "puppy"), ("skis", "skis"), ("glass", "glass")]
    + [(word, "person") for word in ("people", "women", "boys", "babies", "ladies", "player")]
    + [("bikes", "bicycle"), ("bike", "motorcycle")],
)
def test_words_named(word, box_word):
    assert box_word in words_named(word)
    assert not words_named("a") & {"dog", "person"}


def test_cover_grid_counts_overlaps_once():
    boxes = [(0, 0, 0.5, 1), (0, 0, 1, 0.25), (0.25, 0.125, 0.75, 0.75)]
    assert cover_grid(boxes, 2).tolist() == [[1, 0.5 + 0.25], [1, 0.25]]


E3 = math.exp(-8 / 9)  # of a Gaussian of 1/4 of the side, 1/3 away from its centre


@pytest.mark.parametrize(
    ("weights", "box", "inside", "pointing"),
    [
        ([0.4, 0.3, 0.2, 0.1], (0, 0, 0.5, 1), (0.6, 0.5, 0.5), (1, 0.5, 0.5)),
        ([0.4, 0.3, 0.2, 0.1], (0, 0, 0.7, 0.5), (0.4 + 0.4 * 0.3, 0.35, 0.35), (1, 0.25, 0.25)),
        ([0.5, 0, 0.5, 0], (0, 0, 1, 0.5), (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),  # two locations have the most
        ([1, *[0] * 8], (1 / 3, 1 / 3, 2 / 3, 2 / 3), (0, 1 / 9, 1 / (1 + 2 * E3) ** 2), (0, 1 / 9, 1)),
        ([*[0] * 8, 1], (0.5, 0, 1, 1), (1, 0.5, 0.5), (1, 2 / 3, 1)),  # centres on the edge of a box are inside
    ],
)
def test_measure_attention_matches_hand_computed_values(weights, box, inside, pointing):
    measured = measure_attention(np.array(weights), [box])
    names = ("", ", even", ", centred")
    assert [measured[f"inside{name}"] for name in names] == pytest.approx(inside)
    assert [measured[f"pointing{name}"] for name in names] == pytest.approx(pointing)


def test_measure_captions_measures_words_that_name_a_box_of_their_image(capsys):
    boxes = [
        {"person": [(0, 0, 0.5, 0.5)], "dog": [(0.5, 0, 1, 0.5)], "cat": [(0, 0, 1, 1)]},
        {"dog": [(0, 0, 1, 0.5)]},
    ]
    captions = [
        make_caption("a man dogs hat", [[0, 0, 0, 1], [0.7, 0.1, 0.1, 0.1], [0.5, 0.3, 0.2, 0], [0, 0, 0, 1]]),
        make_caption("man", [[0, 0, 0, 1]]),  # this image has no box of a man
    ]
    assert measure_captions(captions, boxes) == {
        "words": 2,
        "inside": 50.0,
        "inside, even": 25.0,
        "inside, centred": 25.0,
        "pointing": 50.0,
        "pointing, even": 25.0,
        "pointing, centred": 25.0,
    }
    assert "no caption names 1 of the words that they are of, such as 'cat'" in capsys.readouterr().err
    assert measure_captions(captions[1:], boxes[1:]) == {"words": 0}
