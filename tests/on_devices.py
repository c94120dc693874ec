"""Trains on so many CPU devices, and stores the loss of every step and the weights at the end.

python tests/on_devices.py DEVICES FILE.npz ARGUMENTS...    # the arguments are train.py's
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import common  # before TensorFlow
import features
import numpy as np
import tensorflow as tf
import train
from interrupted import small_cnn


def main() -> None:
    """Sets up the devices, which nothing may have touched before, and trains."""
    devices, file, *arguments = sys.argv[1:]
    cpus = [tf.config.LogicalDeviceConfiguration()] * int(devices)
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    features.build_cnn = small_cnn
    losses, captioners = [], []
    make_train_step = train.make_train_step

    def watched(captioner, optimizer, average, progress, *rest):
        step = make_train_step(captioner, optimizer, average, progress, *rest)
        captioners.append(captioner)

        def run(batch):
            before = progress.now("loss"), progress.now("words")
            step(batch)
            losses.append((progress.now("loss") - before[0]) / (progress.now("words") - before[1]))

        return run

    train.make_train_step = watched
    train.main(arguments)
    np.savez(file, *(weight.numpy() for weight in captioners[0].trainable_variables), losses=losses)


if __name__ == "__main__":
    common.run_command(main)
