"""Trains on several CPU devices, or in several processes that stand for machines.

    python tests/helpers/train_on_devices.py GROUPS.json

GROUPS.json is a list of groups of jobs; the jobs of a group run at the same time. A job has these fields:

    name         of its files: NAME.log, and NAME.npz with the loss of every step, the weights at the end, and random
                 numbers that each device then draws as dropout does, one row each
    run          the run folder
    num_devices  CPU devices of its process
    args         more arguments of train.py
    tf_config    TF_CONFIG, or null
    copies       folders to copy the run to when its second epoch begins

TensorFlow is imported once: the jobs are forks.
"""

import json
import os
import shutil
import sys
import traceback
from typing import Any

import numpy as np
from helpers.runs import LossRecorder
from helpers.train_and_kill import build_small_cnn

import features
import train
from captioning.base.quiet_tensorflow import tf


def draw(cell: tf.keras.layers.Layer) -> list[tf.Tensor]:
    """Draws numbers on every device."""
    strategy = getattr(cell.seed_generator.state.value, "distribute_strategy", tf.distribute.get_strategy())
    numbers = strategy.run(tf.function(lambda: tf.keras.random.uniform((8,), seed=cell.seed_generator)))
    return strategy.experimental_local_results(numbers)


def run_job(job: dict[str, Any]) -> None:
    """Sets up the devices, before anything else uses TensorFlow, and trains."""
    if job["tf_config"]:
        os.environ["TF_CONFIG"] = json.dumps(job["tf_config"])
    cpus = [tf.config.LogicalDeviceConfiguration()] * job["num_devices"]
    tf.config.set_logical_device_configuration(tf.config.list_physical_devices("CPU")[0], cpus)
    features.build_feature_extractor = build_small_cnn
    recorder, states = LossRecorder(), []

    def on_step(state: train.TrainState) -> None:
        recorder(state)
        states[:] = [state]
        if state.progress.get("epoch") == 1:
            while job["copies"]:
                shutil.copytree(job["run"], job["copies"].pop())

    train.main(["--run", job["run"], *job["args"]], on_step=on_step)
    weights = [variable.numpy() for variable in states[0].model.trainable_variables]
    np.savez(f"{job['name']}.npz", *weights, losses=recorder.losses, draws=draw(states[0].model.decoder.gru))


def start_job(job: dict[str, Any]) -> int:
    """Forks a child that runs a job; returns its process id."""
    if child := os.fork():
        return child
    status = 1
    try:
        log = os.open(f"{job['name']}.log", os.O_CREAT | os.O_WRONLY)
        os.dup2(log, 1)
        os.dup2(log, 2)
        run_job(job)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Runs the groups, one after the other."""
    with open(sys.argv[1], encoding="utf-8") as file:
        groups = json.load(file)
    for jobs in groups:
        children = [start_job(job) for job in jobs]
        statuses = [os.waitpid(child, 0)[1] for child in children]
        if any(statuses):
            sys.exit(1)


if __name__ == "__main__":
    main()
