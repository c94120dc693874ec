"""Imports TensorFlow without the lines that its libraries write while they load, and sets how it uses a GPU.

from captioning.base.quiet_tensorflow import tf
"""

import json
import os
import sys
from pathlib import Path

from captioning.base.cli import command_name, log, suppress_stderr


def check_keras_backend() -> None:
    """Ends the program with a line if Keras is set to compute with something else than TensorFlow."""
    setting, backend = "KERAS_BACKEND", os.environ.get("KERAS_BACKEND")
    if not backend:
        path = Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "keras.json"
        try:
            setting, backend = str(path), json.loads(path.read_text())["backend"]
        except (OSError, ValueError, LookupError, TypeError):  # Keras ignores it, too
            return
    if backend != "tensorflow":
        log(
            f"{command_name()}: {setting}: expected tensorflow, found {backend}; set KERAS_BACKEND=tensorflow",
            error=True,
        )
        sys.exit(2)  # no InputError: this is imported before a script's `main` could report one


check_keras_backend()

# TensorFlow would reserve all memory of all GPUs, so that a second process, such as inference.py beside a notebook or
# a training, would find none. It reads this when it first uses a GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

# Keras imports scikit-learn for wrappers that nothing here uses, which is a sixth of the time of this import.
is_hidden = sys.modules.setdefault("sklearn", None) is None  # type: ignore[arg-type]
with suppress_stderr():
    import tensorflow as tf
if is_hidden:
    del sys.modules["sklearn"]

# TF32 rounds the factors of float32 products to 10 bits on GPUs. Without it the features of a GPU are those of a CPU,
# and a run that is trained on one captions the same on the other (docs/devices.md has what it would gain).
tf.config.experimental.enable_tensor_float_32_execution(False)

__all__ = ["tf"]
