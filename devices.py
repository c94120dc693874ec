"""Which devices train, after tf.distribute: one, all of a machine, or those of several; and whether XLA compiles."""

import json
import os
from pathlib import Path

import tensorflow as tf

from common import InputError, say

STRATEGIES = ("none", "mirrored", "multiworker")
JIT = ("auto", "on", "off")


NVIDIA = Path("/proc/driver/nvidia/version")  # where Linux says that a driver is loaded


def say_if_idle() -> None:
    """Says so if there is a GPU that TensorFlow cannot use: it would train on the CPU without a word."""
    if NVIDIA.exists() and not tf.config.list_physical_devices("GPU"):
        say(
            "there is an NVIDIA GPU here, but TensorFlow cannot use it and takes the CPU; `pip install -r "
            "requirements-gpu.txt` installs the CUDA libraries it needs"
        )


def make_strategy(name: str) -> tf.distribute.Strategy:
    """The strategy of this name; before anything else of TensorFlow runs, which `multiworker` needs.

    Raises:
        InputError: TF_CONFIG does not say which machines there are.
    """
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multiworker":
        found = os.environ.get("TF_CONFIG", "")
        try:
            config = json.loads(found)
            task = config["task"]
            _ = config["cluster"][task["type"]][task["index"]]
        except (ValueError, TypeError, LookupError):
            raise InputError(
                "--strategy multiworker: expected TF_CONFIG to be set on every machine, as "
                '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}, found '
                f"{found or 'nothing'}"
            ) from None
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Whether this process writes the run: the first worker, or the only process."""
    cluster = strategy.cluster_resolver
    if cluster is None or not cluster.task_type:
        return True
    first = "chief" if "chief" in cluster.cluster_spec().jobs else "worker"
    return (cluster.task_type, cluster.task_id) == (first, 0)


def from_chief(strategy: tf.distribute.Strategy, value: float) -> float:
    """The chief's number, on every machine; all must ask at the same time."""
    if strategy.cluster_resolver is None or not strategy.cluster_resolver.task_type:
        return value
    here = len(strategy.extended.worker_devices)
    share = tf.constant(value / here if is_chief(strategy) else 0.0, tf.float64)

    @tf.function
    def total() -> tf.Tensor:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, share))

    return float(strategy.experimental_local_results(total())[0])


def wants_jit(choice: str) -> bool:
    """Whether to compile with XLA; `auto`: on a GPU, if XLA can be used there, and not on a CPU, where it is slower."""
    if choice != "auto":
        return choice == "on"
    if not tf.config.list_physical_devices("GPU"):
        return False
    try:
        tf.function(lambda x: tf.tanh(x) + 1.0, jit_compile=True)(tf.zeros(8))
    except tf.errors.OpError as error:
        say(f"XLA cannot be used on this GPU ({str(error).splitlines()[0][:100]}): training without it")
        return False
    return True
