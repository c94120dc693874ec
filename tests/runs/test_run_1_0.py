"""A run of version 1.0, kept in run_1_0/: every later 1.x reads it, and captions with it as 1.0 did."""

import json
import shutil
from pathlib import Path

import numpy as np

from captioning.runs.run_folder import read_config, write_config
from inference import decode_captions, load_run

RUN = Path(__file__).parent / "run_1_0"
CAPTIONS = [
    "a red dog runs",
    "a green bird sits on the grass",
    "the blue cat",
    "a dog sits on the grass",
    "the red bird runs",
    "a cat runs on the green grass",
]  # which the model was taught of these very features


def test_run_of_1_0_has_the_same_captions():
    model, tokenizer, _ = load_run(RUN)
    features = np.random.default_rng(0).random((6, 64, 2048), np.float32) - np.float32(0.5)
    captions = decode_captions(model, tokenizer, features)
    assert [caption.text for caption in captions] == CAPTIONS
    assert min(caption.confidence for caption in captions) > 0.9


def test_config_of_1_0_is_written_as_it_was_read(tmp_path):
    """A later version may add settings, with their defaults; every one of 1.0 keeps its name and its value."""
    run = shutil.copytree(RUN, tmp_path / "run")
    write_config(run, read_config(run))
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (RUN, run))
    assert before["data"]["images"] == "../images" and before["features"]["folder"] == "../features/small"
    for section, values in before.items():
        expected = after[section] | values if isinstance(values, dict) else values
        assert after[section] == expected, section
