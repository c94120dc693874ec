"""Imports TensorFlow without the lines that its libraries write while they load, and sets how it uses a GPU.

from captioning.base.quiet_tensorflow import tf
"""

import os
import platform
import re
import sys
from pathlib import Path

from captioning.base.cli import command_name, log, suppress_stderr
from captioning.base.files import user_cache

# One of them exists where there is a driver: on Linux, and in Linux on Windows (WSL2).
NVIDIA_DRIVER_FILES = (Path("/proc/driver/nvidia/version"), Path("/dev/dxg"))
NVIDIA_GPUS = Path("/proc/driver/nvidia/gpus")  # a folder for each, unless on Windows

# A flag that TensorFlow does not know ends the process: those below were tried with these versions.
XLA_VERSIONS = ("2.19", "2.20", "2.21")
# The loop over words becomes one CUDA graph, so that a step starts few kernels; and products are not tried out, which
# would take longer than they gain.
XLA_FLAGS = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,CONDITIONAL,WHILE,DYNAMIC_SLICE_FUSION",
    "xla_gpu_graph_min_graph_size": "1",
    "xla_gpu_autotune_level": "0",
}


def check_keras_backend() -> None:
    """Ends the program with a line if KERAS_BACKEND asks for something else than TensorFlow."""
    backend = os.environ.get("KERAS_BACKEND") or "tensorflow"
    os.environ["KERAS_BACKEND"] = backend  # which counts more than Keras's file of settings
    if backend != "tensorflow":
        log(f"{command_name()}: KERAS_BACKEND: expected tensorflow, found {backend}", error=True)
        sys.exit(2)  # no InputError: this is imported before a script's `main` could report one


def add_flags(variable: str, flags: dict[str, str]) -> None:
    """Adds flags to an environment variable; one that it names stays, and so does a file of flags."""
    text = os.environ.get(variable, "").strip()
    if not text or text.startswith("-"):
        added = [f"--{name}={value}" for name, value in flags.items() if name not in text]
        os.environ[variable] = " ".join(filter(None, (text, *added)))


def make_xla_cache(tf_version: str) -> Path | None:
    """Makes the folder of what XLA has compiled for the GPUs of this machine; None if it cannot be made."""
    texts = [path.read_text() for path in sorted(NVIDIA_GPUS.glob("*/information"))]
    models = re.findall(r"Model:\s*(.+)", "".join(texts))
    name = re.sub(r"[^\w.]+", "_", "-".join((tf_version, *sorted(set(models)))))
    folder = user_cache() / "xla" / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) and "'" not in str(folder) else None


def set_xla_flags(tf_version: str) -> None:
    """Sets how XLA compiles for a GPU, and where it keeps that, if there is one and the version is known.

    XLA reads the flags when it compiles for the first time.
    """
    if tf_version.rpartition(".")[0] not in XLA_VERSIONS or not any(path.exists() for path in NVIDIA_DRIVER_FILES):
        return
    add_flags("XLA_FLAGS", XLA_FLAGS)
    if folder := make_xla_cache(tf_version):
        flags = {"directory": f"'{folder.absolute()}'", "device_types": "GPU"}
        add_flags("TF_XLA_FLAGS", {f"tf_xla_persistent_cache_{name}": value for name, value in flags.items()})


def xla_cache() -> str | None:
    """Returns the folder in which XLA keeps what it has compiled, the user's or that of `make_xla_cache`."""
    found = re.search(r"tf_xla_persistent_cache_directory=(?:'([^']+)'|(\S+))", os.environ.get("TF_XLA_FLAGS", ""))
    return (found[1] or found[2]) if found else None


check_keras_backend()

# TensorFlow would reserve all memory of all GPUs, so that a second process, such as inference.py beside a notebook or
# a training, would find none. It reads this when it first uses a GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# TensorFlow uses oneDNN unasked only on CPUs with AVX512_VNNI or newer; one with AVX2 alone trains faster with it, too
# (docs/performance.md).
if sys.platform == "linux" and platform.machine() == "x86_64":
    os.environ.setdefault("TF_ENABLE_ONEDNN_OPTS", "1")

# Keras imports scikit-learn for wrappers that nothing here uses, which is a sixth of the time of this import.
is_hidden = sys.modules.setdefault("sklearn", None) is None  # type: ignore[arg-type]
with suppress_stderr():
    import tensorflow as tf
if is_hidden:
    del sys.modules["sklearn"]

set_xla_flags(tf.__version__)

# TF32 rounds the factors of float32 products to 10 bits on GPUs. Without it the features of a GPU are those of a CPU,
# and a run that is trained on one captions the same on the other (docs/devices.md has what it would gain).
tf.config.experimental.enable_tensor_float_32_execution(False)

__all__ = ["tf"]
