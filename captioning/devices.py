"""Devices that train: one, all of a machine, or those of several machines (tf.distribute); and XLA."""

import functools
import json
import os
from collections.abc import Sequence
from pathlib import Path

from captioning.cli import InputError, log
from captioning.quiet_tensorflow import tf

NVIDIA_DRIVER_FILE = Path("/proc/driver/nvidia/version")  # exists on Linux where a driver is loaded


def warn_if_gpu_unused() -> None:
    """Prints a line if there is a GPU that TensorFlow cannot use, since training would take the CPU silently."""
    if NVIDIA_DRIVER_FILE.exists() and not tf.config.list_physical_devices("GPU"):
        log(
            "there is an NVIDIA GPU here, but TensorFlow cannot use it and takes the CPU; `pip install -r "
            "requirements-gpu.txt` installs the CUDA libraries it needs"
        )


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Makes the strategy `none`, `mirrored` or `multiworker`; the last must be made before TensorFlow does anything.

    Raises:
        InputError: TF_CONFIG does not describe the cluster.
    """
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multiworker":
        text = os.environ.get("TF_CONFIG", "")
        try:
            config = json.loads(text)
            task = config["task"]
            _ = config["cluster"][task["type"]][task["index"]]
        except (ValueError, TypeError, LookupError):
            raise InputError(
                "--strategy multiworker: expected TF_CONFIG to be set on every machine, as "
                '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}, found '
                f"{text or 'nothing'}"
            ) from None
        return tf.distribute.MultiWorkerMirroredStrategy()
    return tf.distribute.get_strategy()


def is_chief(strategy: tf.distribute.Strategy) -> bool:
    """Tells whether this process writes the run: it is the first worker, or the only process."""
    cluster = strategy.cluster_resolver
    if cluster is None or not cluster.task_type:
        return True
    chief_type = "chief" if "chief" in cluster.cluster_spec().jobs else "worker"
    return (cluster.task_type, cluster.task_id) == (chief_type, 0)


def broadcast_from_chief(strategy: tf.distribute.Strategy, values: Sequence[float]) -> list[float]:
    """Returns the chief's numbers on every machine; all must call this at the same time, with as many numbers."""
    if strategy.cluster_resolver is None or not strategy.cluster_resolver.task_type:
        return list(values)
    num_local_devices = len(strategy.extended.worker_devices)
    shares = [value / num_local_devices if is_chief(strategy) else 0.0 for value in values]
    share = tf.constant(shares, tf.float64)

    @tf.function
    def total() -> tf.Tensor:
        return strategy.run(lambda: tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, share))

    return strategy.experimental_local_results(total())[0].numpy().tolist()


def resolve_jit(choice: str) -> bool:
    """Decides whether XLA compiles; `auto`: on a GPU where XLA works, and not on a CPU, where it is slower."""
    if choice != "auto":
        return choice == "on"
    return bool(tf.config.list_physical_devices("GPU")) and xla_works()


@functools.cache  # train.py asks in every epoch, and the trial compiles a function
def xla_works() -> bool:
    """Tries XLA on a small function; prints a line if it fails."""
    try:
        tf.function(lambda x: tf.tanh(x) + 1.0, jit_compile=True)(tf.zeros(8))
    except tf.errors.OpError as error:
        log(f"XLA cannot be used on this GPU ({str(error).splitlines()[0][:100]}): training without it")
        return False
    return True


def check_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> None:
    """Checks that every device gets a part of a batch; raises InputError if not."""
    num_devices = strategy.num_replicas_in_sync
    if batch_size < num_devices:
        raise InputError(f"--batch-size: expected at least {num_devices}, the number of devices, found {batch_size}")
