import json
from types import SimpleNamespace

import numpy as np
import pytest

import demo
from captioning.data.annotations import Example
from data_utils import CaptionDataset
from inference import Caption


def test_attention_on_object_matches_hand_computed_values():
    attention = np.zeros((3, 64))
    attention[2, 0] = 0.75  # the location in the upper left corner
    attention[2, 63] = 0.25
    shapes = [
        {"colour": "red", "noun": "circle", "box": [0, 0, 299 / 8, 299 / 16]},  # the upper half of that location
        {"colour": "blue", "noun": "circle", "box": [0, 0, 299, 299]},
    ]
    caption = Caption("a red circle", ("a", "red", "circle"), (1.0,) * 3, attention, True)
    assert demo.attention_on_object(caption, shapes) == [(pytest.approx(0.75 / 2), pytest.approx(0.5 / 64))]


def test_evaluate_demo_measures_exact_matches_and_attention(tmp_path, monkeypatch):
    box = [0, 0, 299 / 2, 299 / 2]  # a quarter of the image
    rows = [
        {"filepath": "images", "filename": f"{i}.png", "shapes": [{"colour": "red", "noun": "circle", "box": box}]}
        for i in range(2)
    ]
    (tmp_path / demo.shapes.ANNOTATIONS).write_text(json.dumps({"images": rows}))
    examples = [Example(f"images/{i}.png", ("a red circle", "one red circle"), i, "test") for i in range(2)]
    others = [Example(f"images/{i}.png", ("a red square",), i, "train") for i in (2, 3)]
    attention = np.zeros((3, 64))
    attention[2, 0] = 0.8  # inside the box
    attention[2, 63] = 0.2
    captions = [
        Caption("one red circle", ("one", "red", "circle"), (1.0,) * 3, attention, True),
        Caption("a blue circle", ("a", "blue", "circle"), (1.0,) * 3, attention, True),
    ]
    captioner = SimpleNamespace(model="model", tokenizer="tokenizer", config=SimpleNamespace(features="manifest"))
    monkeypatch.setattr(demo.inference.Captioner, "load", lambda run: captioner)
    dataset = CaptionDataset("shapes", tmp_path, (*examples, *others))
    monkeypatch.setattr(demo.data_utils, "load_run_dataset", lambda config: dataset)
    monkeypatch.setattr(demo, "open_run_cache", lambda manifest: f"cache of {manifest}")

    def generate_captions(*args):
        assert args == ("model", "tokenizer", "cache of manifest", examples)
        return captions

    monkeypatch.setattr(demo.evaluate, "generate_captions", generate_captions)
    expected = {
        "images": 2,
        "exact match": 50,  # only the first; it equals the second of its reference captions
        "attention on the named object": pytest.approx(80),
        "uniform attention": pytest.approx(25),
    }
    assert demo.evaluate_demo(tmp_path) == expected
    captions[:] = captions[1:] * 2  # no noun names a shape
    assert demo.evaluate_demo(tmp_path) == expected | {
        "exact match": 0,
        "attention on the named object": 0,
        "uniform attention": 0,
    }
