"""`kill -9` at any moment of caching or training loses nothing but what was under way."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import shapes

SCRIPT = Path(__file__).with_name("interrupted.py")


def run(folder, kills):
    shapes.draw_dataset(folder / "shapes", pictures=120)
    done = subprocess.run([sys.executable, SCRIPT, folder, str(kills)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr + (folder / "log").read_text()
    return done.stdout.splitlines()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_twenty_kills_change_nothing(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(whole, 0)
    stages = run(killed, 20)
    assert {"features", "training"} <= set(stages), f"the kills missed a stage: {stages}"
    names = lambda folder: sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))
    assert len(names(whole)) == 120 and names(whole) == names(killed)
    for name in names(whole):
        assert (whole / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    readers = [
        tf.train.load_checkpoint(tf.train.latest_checkpoint(folder / "run/checkpoints" / kind))
        for kind in ("last", "best")
        for folder in (whole, killed)
    ]
    for expected, found in (readers[:2], readers[2:]):
        shapes_of = expected.get_variable_to_shape_map()
        assert shapes_of == found.get_variable_to_shape_map()
        for key in shapes_of:
            if not any(word in key for word in ("seconds", "save_counter", "_CHECKPOINTABLE_OBJECT_GRAPH")):
                np.testing.assert_array_equal(expected.get_tensor(key), found.get_tensor(key), err_msg=key)
    history = lambda folder: [
        {key: value for key, value in row.items() if key != "train_seconds"}
        for row in csv.DictReader((folder / "run/history.csv").read_text().splitlines())
    ]
    assert len(history(whole)) == 4 and history(whole) == history(killed)
    left = [path.name for path in killed.rglob("*") if path.name.endswith(".part")]
    assert len(left) <= 20, "a kill may leave at most what was under way"
