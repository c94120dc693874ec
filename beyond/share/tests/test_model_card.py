"""The model card says what a run is, in the words of its files."""

import dataclasses

import pytest

from beyond.share.model_card import PackedFile, make_card
from captioning.base.cli import InputError
from captioning.config.run_config import RunConfig
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=1234, attention="hard"),
    train=TrainConfig(epochs=7),
    data=DataConfig(dataset="flickr8k"),
    features={"cnn": "InceptionV3", "weights": "imagenet", "image_size": 299, "dtype": "float16"},
    unreadable_images=("bad.jpg",),
    data_fingerprint="0123abcd",
    vocabulary_sha256="4567",
)
SCORES = {
    "split": "test",
    "images": 1000,
    "tokenizer": "PTB",
    "beam_size": 5,
    "length_penalty": 0.7,
    "max_words": 50,
    "min_words": 3,
    "no_repeat": True,
    "scores": {"BLEU-4": 19.64, "CIDEr": 47.1},
}
GREEDY = {"split": "val", "images": 20, "tokenizer": "characters", "scores": {"BLEU-4": 1.0, "METEOR": 2.0}}


def card(metrics=None, **changes):
    config = dataclasses.replace(CONFIG, **changes)
    files = [PackedFile("weights.npz", 1_234_567, "89ab")]
    return make_card("photos", config, metrics or {}, "float16", 2_500_000, files, {"Python": "3.11", "numpy": "2.0"})


def test_make_card_has_every_section():
    text = card({"metrics_test.json": SCORES})
    titles = [line.removeprefix("## ") for line in text.splitlines() if line.startswith("## ")]
    assert titles == [
        *("How to use it", "Data", "Settings", "Scores", "Limits and biases", "Licence", "Files", "Versions")
    ]
    assert text.startswith("# photos\n") and "a GRU with hard attention" in text
    assert "python inference.py --run photos.zip photo.jpg" in text
    assert "TO FILL IN: the licence" in text.split("## Licence")[1].split("##")[0]
    assert "| `weights.npz` | 1,234,567 | `89ab` |" in text and "Packed with Python 3.11, numpy 2.0." in text


def test_make_card_names_the_cell():
    assert "an LSTM with soft attention" in card(model=ModelConfig(decoder="paper", cell="lstm"))


def test_make_card_describes_data_and_settings():
    text = card({"a": SCORES, "b": GREEDY})
    assert "the dataset flickr8k" in text and "1,000 of test, 20 of val" in text and "1,234 entries" in text
    assert "cannot be read: 1." in text and "`0123abcd`" in text
    assert "2,500,000 weights, stored as float16" in text and "its ImageNet weights" in text
    assert "differs from the defaults: epochs 7." in text
    assert "differs from the defaults: nothing." in card(train=TrainConfig())


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (DataConfig(), "at random (seed 0, 0.1 for validation, 0.1 for testing)"),
        (DataConfig(official_val=True), "the official validation images"),
        (DataConfig(annotations="a.csv", val_list="val.txt", train_list="t.txt"), "Split: by lists of image names"),
        (DataConfig(annotations="a.csv", val_annotations="v.csv"), "Split: by a file for each split"),
        (DataConfig(annotations="a.csv"), "the annotations `a.csv`"),
        (DataConfig(words="characters"), "every character of scripts without spaces"),
        (DataConfig(num_captions=300), "captions used: 300."),
    ],
)
def test_make_card_describes_kinds_of_data(data, expected):
    assert expected in card(data=data)


@pytest.mark.parametrize(
    ("weights", "expected"), [("random", "random weights"), ("mine.h5", "weights of the author's")]
)
def test_make_card_describes_the_cnn(weights, expected):
    assert f"InceptionV3 with {expected}, SHA-256 `cd`" in card(
        features={**CONFIG.features, "weights": weights, "sha256": "cd"}
    )


def test_make_card_has_a_table_of_scores():
    rows = [
        line for line in card({"b": GREEDY, "a": SCORES}).split("## Scores")[1].splitlines() if line.startswith("|")
    ]
    assert rows[0] == "| split | images | search | tokenizer | BLEU-4 | CIDEr | METEOR |"
    assert rows[2] == (
        "| test | 1,000 | beam search, 5 wide, length penalty 0.7, cut after 50 words, no end before 3 words, "
        "no repetitions | PTB | 19.6 | 47.1 |  |"
    )
    assert rows[3] == "| val | 20 | greedy search | characters | 1.0 |  | 2.0 |"
    assert "TO FILL IN: none were measured" in card()


@pytest.mark.parametrize("change", [{"scores": 5}, {"scores": {"CIDEr": "much"}}, {"images": None}])
def test_make_card_refuses_other_scores(change):
    with pytest.raises(InputError, match=r"metrics_x\.json: expected what evaluate\.py writes"):
        card({"metrics_x.json": {**SCORES, **change}})
