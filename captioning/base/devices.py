"""Devices that train: one, all of a machine, or those of several machines (tf.distribute); and XLA."""

import contextlib
import ctypes
import functools
import importlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from captioning.base.cli import InputError, log
from captioning.base.quiet_tensorflow import NVIDIA_DRIVER_FILES, tf

BUILT_FOR = ("sm_60", "sm_70", "sm_80", "sm_89", "compute_90")  # the wheels of TensorFlow 2.19 to 2.21
TRY_SECONDS = 120  # a GPU that takes longer for a product compiles its kernels


def has_gpu() -> bool:
    """Tells whether TensorFlow computes on a GPU."""
    return bool(tf.config.get_visible_devices("GPU"))


def is_single(strategy: tf.distribute.Strategy) -> bool:
    """Tells whether one device trains, and nothing is exchanged."""
    return strategy is tf.distribute.get_strategy()


def free_gpu_memory() -> int:
    """Returns how many bytes of the first GPU no process has taken; 0 if the driver does not tell.

    TensorFlow knows only its own part, and nvidia-smi lists GPUs in another order.
    """
    number = int(tf.config.get_visible_devices("GPU")[0].name.rpartition(":")[2])
    device, context, free, total = ctypes.c_int(), ctypes.c_void_p(), ctypes.c_size_t(), ctypes.c_size_t()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
        calls = (
            lambda: cuda.cuInit(0),
            lambda: cuda.cuDeviceGet(ctypes.byref(device), number),
            lambda: cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), device),  # TensorFlow's context of the device
            lambda: cuda.cuCtxPushCurrent_v2(context),
            lambda: cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total)),
            lambda: cuda.cuCtxPopCurrent_v2(None),
        )
        return 0 if any(call() for call in calls) else free.value  # each returns 0, or the number of an error
    except (OSError, AttributeError):  # no such library, or no such function
        return 0


@functools.cache  # all scripts ask, some of them often
def check_gpus() -> None:
    """Prints a line where a GPU cannot be used, and hides it where TensorFlow has no kernels for it.

    A GPU that is newer than the kernels is not tried: it would compile them for half an hour, or fail at the first
    operation, as GPUs of compute capability 12.0 do with the wheels of TensorFlow 2.19 to 2.21.
    """
    gpus = tf.config.list_physical_devices("GPU")
    if not gpus:
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1")
        if not is_hidden and any(path.exists() for path in NVIDIA_DRIVER_FILES):
            log(
                "there is an NVIDIA GPU here, but TensorFlow cannot use it and takes the CPU; `pip install -r "
                "requirements-gpu.txt` installs the CUDA libraries it needs; TF_CPP_MIN_LOG_LEVEL=0 shows its reason"
            )
        return
    built_for = tf.sysconfig.get_build_info().get("cuda_compute_capabilities")  # None from 2.22 on
    usable = []
    for number, gpu in enumerate(gpus):
        details = tf.config.experimental.get_device_details(gpu)
        if has_kernels(details, built_for or BUILT_FOR) or (not built_for and can_compute(number)):
            usable.append(gpu)
            continue
        known = f", only for {', '.join(built_for)}" if built_for else ""
        log(
            f"TensorFlow {tf.__version__} has no kernels for {details.get('device_name', gpu)}, of compute capability "
            f"{'.'.join(map(str, details['compute_capability']))}{known}: it is not used; a TensorFlow that is built "
            "for it can use it (on Colab choose another runtime than G4, which has a GPU of 12.0)"
        )
    if len(usable) < len(gpus):
        with contextlib.suppress(RuntimeError):  # it computes already, so that it is too late to hide any
            tf.config.set_visible_devices(usable, "GPU")


def has_kernels(details: dict[str, Any], built_for: Sequence[str]) -> bool:
    """Tells whether a TensorFlow that is built for `sm_80`, `compute_90` ... has kernels for a GPU.

    Kernels for 8.0 run on 8.6, those for 9.0 do not. If nothing is known, the answer is yes.
    """
    if "compute_capability" not in details or not built_for:
        return True
    major, minor = details["compute_capability"]
    versions = [divmod(int(number), 10) for number in re.findall(r"\d+", " ".join(built_for))]
    return any(kernel_major == major and kernel_minor <= minor for kernel_major, kernel_minor in versions)


def can_compute(number: int) -> bool:
    """Tries a product on a GPU, in a process of its own: once a GPU is tried, it cannot be hidden any more."""
    code = (
        "import tensorflow as tf\n"
        "tf.config.set_soft_device_placement(False)  # which would take the CPU\n"
        f"with tf.device('GPU:{number}'): (tf.ones((64, 64)) @ tf.ones((64, 64))).numpy()"
    )
    try:
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=TRY_SECONDS)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


def make_strategy(name: str) -> tf.distribute.Strategy:
    """Makes the strategy `none`, `mirrored` or `multiworker`; the last must be made before TensorFlow does anything."""
    if name == "mirrored":
        devices = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
        return tf.distribute.MirroredStrategy([device.name for device in devices])
    if name == "multiworker":
        text = os.environ.get("TF_CONFIG", "")
        try:
            config = json.loads(text)
            task = config["task"]
            _ = config["cluster"][task["type"]][task["index"]]  # an evaluator is not in it: the first worker validates
        except (ValueError, TypeError, LookupError):
            raise InputError(
                "--strategy multiworker: expected TF_CONFIG to be set on every machine, each a worker, as "
                '{"cluster": {"worker": ["host1:2222", "host2:2222"]}, "task": {"type": "worker", "index": 0}}, found '
                f"{text or 'nothing'}"
            ) from None
        # Without asking, gradients would go through the hosts also where there are GPUs.
        kind = tf.distribute.experimental.CommunicationImplementation
        implementation = kind.NCCL if tf.config.list_physical_devices("GPU") else kind.AUTO
        return tf.distribute.MultiWorkerMirroredStrategy(
            communication_options=tf.distribute.experimental.CommunicationOptions(implementation=implementation)
        )
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
        # Each replica needs a tensor of its own: one that all have is summed over the machines only.
        return strategy.run(
            lambda: tf.distribute.get_replica_context().all_reduce(tf.distribute.ReduceOp.SUM, tf.identity(share))
        )

    return strategy.experimental_local_results(total())[0].numpy().tolist()


def sum_over_replicas(gradients: list[tf.Tensor], sums: Any) -> tuple[list[tf.Tensor], Any]:
    """Weighs each replica's gradients by its words and sums them, for the mean over all words; called on every replica.

    Args:
        gradients: of the mean over the words of the replica's part.
        sums: a tuple of scalars with `num_tokens`, the number of words; their totals are returned too.
    """
    replica = tf.distribute.get_replica_context()
    if replica.num_replicas_in_sync == 1:
        return gradients, sums
    totals = replica.all_reduce(tf.distribute.ReduceOp.SUM, sums)
    share = sums.num_tokens / totals.num_tokens
    gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [share * gradient for gradient in gradients])
    return gradients, totals


def check_xla() -> None:
    """Tries XLA on a small function; raises InputError if it fails, as on a GPU without the libraries it needs."""
    try:
        tf.function(lambda x: tf.tanh(x) + 1.0, jit_compile=True)(tf.zeros(8))
    except tf.errors.OpError as error:
        reason = str(error).splitlines()[0][:100]
        raise InputError(f"--jit on: XLA cannot be used here ({reason}); train with --jit off") from None


def number_functions_anew() -> None:
    """Lets the numbers in the names of TensorFlow's next functions begin at a multiple of 100,000.

    What XLA keeps of a function is found by that name. The number counts all that came before, such as the functions
    that compute features, so that a resumed run would find nothing of the first one.
    """
    with contextlib.suppress(ImportError, AttributeError):  # no public function has the counter
        uid = importlib.import_module("tensorflow.python.framework.ops").uid
        while uid() % 100_000:
            pass


def check_batch_size(batch_size: int, strategy: tf.distribute.Strategy) -> None:
    """Raises InputError unless every device gets a part of a batch."""
    num_devices = strategy.num_replicas_in_sync
    if batch_size < num_devices:
        raise InputError(f"--batch-size: expected at least {num_devices}, the number of devices, found {batch_size}")


def separate_random_states(model: tf.keras.Model, strategy: tf.distribute.Strategy) -> None:
    """Gives every replica random numbers of its own, by folding its number into its copy of the model's seeds.

    Keras gives all replicas the same dropout and the same noise. The first one keeps its numbers, which are those of a
    single device. A checkpoint holds only the first one's states, so this is done after it is restored.
    """

    def fold() -> None:
        replica = tf.cast(tf.distribute.get_replica_context().replica_id_in_sync_group, tf.int64)  # as the states
        for state in model.non_trainable_variables:  # those of seed generators
            seed, counter = tf.unstack(tf.convert_to_tensor(state))
            folded = tf.random.experimental.stateless_fold_in([seed, 0], replica)[0]  # a resumed run folds the same
            state.assign([tf.where(replica == 0, seed, folded), counter])

    if strategy.num_replicas_in_sync > 1:
        strategy.run(tf.function(fold))
