import csv

import pytest

from captioning.base.cli import InputError
from captioning.data.annotations import Example
from captioning.scores.score_table import check_table_path, write_score_table

EXAMPLES = [
    Example("a.jpg", ("a dog", 'a "brown" dog, running'), 1, "val"),
    Example("b.jpg", ("a cat\non a bed",), 2, "val"),
    Example("caf\udce9.jpg", ("a hat",), 3, "val"),
]
CAPTIONS = ["a dog", "a cat, a hat", "=1+1"]
BY_IMAGE = {
    "BLEU-1": [1.0, 2.0, 3.0],
    "BLEU-4": [10.0, 0.0, 5.0],
    "ROUGE-L": [50.0, 40.0, 30.123],
    "SPICE": [20.0, 30.0, 40.0],
    "CIDEr": [99.0, 1.5, 2],
}


def test_write_score_table_begins_with_the_worst(tmp_path):
    path = tmp_path / "folder/scores.csv"
    write_score_table(path, EXAMPLES, CAPTIONS, BY_IMAGE)
    with open(path, encoding="utf-8", errors="surrogateescape", newline="") as file:
        rows = list(csv.reader(file))
    assert rows == [
        ["image", "caption", "CIDEr", "BLEU-4", "ROUGE-L", "SPICE", "reference 1", "reference 2"],
        ["b.jpg", "a cat, a hat", "1.50", "0.00", "40.00", "30.00", "a cat\non a bed"],
        ["caf\udce9.jpg", "=1+1", "2.00", "5.00", "30.12", "40.00", "a hat"],
        ["a.jpg", "a dog", "99.00", "10.00", "50.00", "20.00", "a dog", 'a "brown" dog, running'],
    ]


def test_check_table_path(tmp_path):
    path = tmp_path / "new/scores.CSV"
    check_table_path(path, [])
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        check_table_path(tmp_path / "file/scores.csv", [])
    with pytest.raises(InputError, match=r"scores\.json: expected a name that ends in \.csv"):
        check_table_path(tmp_path / "scores.json", [])
    write_score_table(path, EXAMPLES, CAPTIONS, BY_IMAGE)
    check_table_path(path, ["captions.csv"])  # it is replaced
    with pytest.raises(InputError, match="is read by this command"):
        check_table_path(path, [str(path)])
    path.write_text("image,caption\na.jpg,a dog\n")
    with pytest.raises(InputError, match="found something else"):
        check_table_path(path, [])
