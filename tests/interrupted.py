"""Trains in a child process that is killed at random moments, again and again, and at last left alone.

    python tests/interrupted.py FOLDER KILLS

FOLDER holds shapes/. Prints in which stages the kills fell. TensorFlow is imported once: the children are forks.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import features
import tensorflow as tf
import train

ARGUMENTS = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--weights", "cnn.h5", "--run", "run"]
ARGUMENTS += ["--epochs", "4", "--batch-size", "8", "--units", "16", "--embedding-dim", "8", "--patience", "0"]
ARGUMENTS += ["--dropout", "0.2", "--average-decay", "0.9", "--cnn-batch-size", "4", "--save-minutes", "0.001"]


def small_cnn(weights: str):
    """Stands for InceptionV3: a picture's mean colours on an 8x8 grid, repeated."""

    def cnn(pixels, training):
        tf.numpy_function(lambda: time.sleep(0.1), [], [])  # so that there is time to be killed in
        colours = tf.image.resize(tf.cast(pixels, tf.float32) / 255, (8, 8), method="area")
        return tf.repeat(tf.reshape(colours, (-1, 64, 3)), 683, axis=2)[:, :, :2048]

    return cnn


def start() -> int:
    """Forks a child that trains; returns its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        log = os.open("log", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        features.build_cnn = small_cnn
        train.main(ARGUMENTS)
        status = 0
    finally:
        os._exit(status)


def main() -> None:
    """Kills so many children, then waits for the last."""
    os.chdir(sys.argv[1])
    Path("cnn.h5").write_text("stands for weights")
    dice, stages = random.Random(7), []
    for _ in range(int(sys.argv[2])):
        child = start()
        time.sleep(dice.uniform(0.1, 2.5))
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            assert status == 0, "a child failed by itself; see the log"
            stages.append("after the end")
            continue
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        stages.append("training" if Path("run/config.json").exists() else "features")
    _, status = os.waitpid(start(), 0)
    print(*stages, sep="\n")
    sys.exit(bool(status))


if __name__ == "__main__":
    main()
