"""Trains in child processes that are killed at random moments, until the last one is left alone.

    python tests/helpers/train_and_kill.py FOLDER

FOLDER holds shapes/. Trains without a kill in FOLDER/uninterrupted, and with kills in FOLDER/killed. Prints in which
stage each kill fell. TensorFlow is imported once: the children are forks.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import features
import train
from captioning.base.quiet_tensorflow import tf

DATA_ARGS = ["--annotations", "../shapes/dataset_shapes.json", "--images", "../shapes", "--cnn-weights", "../cnn.h5"]
MODEL_ARGS = ["--units", "16", "--embedding-dim", "8", "--dropout", "0.2"]
TRAIN_ARGS = ["--run", "run", "--epochs", "3", "--batch-size", "8", "--patience", "0", "--ema-decay", "0.9"]
SPEED_ARGS = ["--cnn-batch-size", "4", "--checkpoint-minutes", "0.002", "--no-fused"]
# In each stage these files are written. A child that is to be killed in a stage has written at least one of them.
STAGE_FILES = {"features": "features/**/*.npy", "training": "run/checkpoints/*/ckpt-*.index"}
STAGES = ("start", "features", "training", "training")  # of the kills


def build_small_cnn(cnn_weights: str, cnn=None):
    """Stands for InceptionV3: an image's mean colours on an 8x8 grid, repeated."""

    def extract(pixels, training):
        colours = tf.image.resize(tf.cast(pixels, tf.float32) / 255, (8, 8), method="area")
        return tf.repeat(tf.reshape(colours, (-1, 64, 3)), 683, axis=2)[:, :, :2048]

    return extract


def build_slow_cnn(cnn_weights: str, cnn=None):
    """The same, with time to be killed in."""
    small_cnn = build_small_cnn(cnn_weights)

    def extract(pixels, training):
        tf.numpy_function(lambda: time.sleep(0.1), [], [])
        return small_cnn(pixels, training)

    return extract


def start_child() -> int:
    """Forks a child that trains in the current folder; returns its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        log = os.open("log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        features.build_feature_extractor = build_slow_cnn
        train.main([*DATA_ARGS, *MODEL_ARGS, *TRAIN_ARGS, *SPEED_ARGS])
        status = 0
    finally:
        os._exit(status)


def has_ended(child: int) -> bool:
    """Tells whether a child has ended; raises RuntimeError if it failed."""
    pid, status = os.waitpid(child, os.WNOHANG)
    if pid and status:
        raise RuntimeError("a child failed by itself; see the log")
    return bool(pid)


def kill_in_stage(stage: str, rng: random.Random) -> str:
    """Starts a child and kills it at a random moment of a stage; returns `end` if it ended before."""
    before = set(Path().glob(STAGE_FILES[stage])) if stage in STAGE_FILES else set()
    child = start_child()
    while stage in STAGE_FILES and set(Path().glob(STAGE_FILES[stage])) <= before:
        if has_ended(child):
            return "end"
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.3 if stage in STAGE_FILES else 1.0))
    if has_ended(child):
        return "end"
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return stage


def main() -> None:
    """Trains without kills, and with them."""
    root = Path(sys.argv[1])
    (root / "cnn.h5").write_text("stands for weights")
    rng = random.Random(7)
    for name, stages in (("uninterrupted", ()), ("killed", STAGES)):
        (root / name).mkdir()
        os.chdir(root / name)
        for stage in stages:
            print(kill_in_stage(stage, rng))
        _, status = os.waitpid(start_child(), 0)
        if status:
            sys.exit(1)


if __name__ == "__main__":
    main()
