"""`kill -9` at any moment of caching or training loses nothing but the work since the last checkpoint."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.runs import assert_same_checkpoint, read_checkpoint, read_history

from captioning.data import shapes

TESTS = Path(__file__).parents[1]
NUM_IMAGES = 48

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")]


def feature_files(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.npy"))


def test_killed_caching_and_training_end_with_the_same_files(tmp_path):
    shapes.draw_dataset(tmp_path / "shapes", num_images=NUM_IMAGES)
    script = TESTS / "helpers/train_and_kill.py"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))}
    done = subprocess.run(
        [sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300, env=environment
    )
    logs = "".join(path.read_text() for path in sorted(tmp_path.glob("*/log")))
    assert done.returncode == 0, done.stderr + logs
    stages = done.stdout.split()
    assert "features" in stages and stages.count("training") >= 2, f"the kills missed a stage: {stages}"

    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    assert len(feature_files(uninterrupted)) == NUM_IMAGES
    assert feature_files(uninterrupted) == feature_files(killed)
    for name in feature_files(uninterrupted):
        assert (uninterrupted / name).read_bytes() == (killed / name).read_bytes(), f"{name} differs"
    for name in ("last", "best"):
        assert_same_checkpoint(read_checkpoint(killed / "run", name), read_checkpoint(uninterrupted / "run", name))
    assert len(read_history(uninterrupted / "run")) == 3
    assert read_history(uninterrupted / "run") == read_history(killed / "run")
    partial = [path.name for path in killed.rglob("*") if path.name.endswith(".part")]
    assert len(partial) <= len(stages), "a kill may leave at most what was being written"
