"""Trains in a child process that is killed at random moments, again and again, and at last left alone.

    python tests/helpers/train_and_kill.py FOLDER NUM_KILLS

FOLDER holds shapes/. Prints in which stages the kills fell. TensorFlow is imported once: the children are forks.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import features
import train
from captioning.quiet_tensorflow import tf

DATA_ARGS = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--cnn-weights", "cnn.h5"]
MODEL_ARGS = ["--units", "16", "--embedding-dim", "8", "--dropout", "0.2"]
TRAIN_ARGS = ["--run", "run", "--epochs", "4", "--batch-size", "8", "--patience", "0", "--ema-decay", "0.9"]
ARGS = [*DATA_ARGS, *MODEL_ARGS, *TRAIN_ARGS, "--cnn-batch-size", "4", "--checkpoint-minutes", "0.001"]


def build_small_cnn(cnn_weights: str):
    """Stands for InceptionV3: an image's mean colours on an 8x8 grid, repeated."""

    def cnn(pixels, training):
        tf.numpy_function(lambda: time.sleep(0.1), [], [])  # so that there is time to be killed in
        colours = tf.image.resize(tf.cast(pixels, tf.float32) / 255, (8, 8), method="area")
        return tf.repeat(tf.reshape(colours, (-1, 64, 3)), 683, axis=2)[:, :, :2048]

    return cnn


def start_child() -> int:
    """Forks a child that trains; returns its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        log = os.open("log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        features.build_feature_extractor = build_small_cnn
        train.main(ARGS)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """Kills the children one after the other, then waits for the last."""
    folder, num_kills = sys.argv[1:]
    os.chdir(folder)
    Path("cnn.h5").write_text("stands for weights")
    rng, stages = random.Random(7), []
    for _ in range(int(num_kills)):
        child = start_child()
        time.sleep(rng.uniform(0.1, 2.5))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "a child failed by itself; see the log"
            stages.append("after the end")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stages.append("training" if Path("run/config.json").exists() else "features")
    _, status = os.waitpid(start_child(), 0)
    print(*stages, sep="\n")
    sys.exit(bool(status))


if __name__ == "__main__":
    main()
