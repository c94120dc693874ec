"""Trains on a number of CPU devices, and saves the loss of every step and the weights at the end.

python tests/helpers/train_on_devices.py NUM_DEVICES FILE.npz ARGS...    # the arguments are train.py's
"""

import sys

import numpy as np
from helpers.runs import LossRecorder
from helpers.train_and_kill import build_small_cnn

import features
import train
from captioning.cli import run_main
from captioning.quiet_tensorflow import tf


def main() -> None:
    """Sets up the devices, before anything else uses TensorFlow, and trains."""
    num_devices, file, *args = sys.argv[1:]
    cpus = [tf.config.LogicalDeviceConfiguration()] * int(num_devices)
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    features.build_feature_extractor = build_small_cnn
    recorder, states = LossRecorder(), []

    def on_step(state: train.TrainState) -> None:
        recorder(state)
        states[:] = [state]

    train.main(args, on_step=on_step)
    weights = [variable.numpy() for variable in states[0].model.trainable_variables]
    np.savez(file, *weights, losses=recorder.losses)


if __name__ == "__main__":
    run_main(main)
