"""Imports TensorFlow without the lines that its libraries write while they load, and sets how it uses a GPU.

from captioning.base.quiet_tensorflow import tf
"""

import os

from captioning.base.cli import suppress_stderr

# TensorFlow would reserve all memory of all GPUs, so that a second process, such as inference.py beside a notebook or
# a training, would find none. It reads this when it first uses a GPU.
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")

with suppress_stderr():
    import tensorflow as tf

# TF32 rounds the factors of float32 products to 10 bits on GPUs. Without it the features of a GPU are those of a CPU,
# and a run that is trained on one captions the same on the other (docs/devices.md has what it would gain).
tf.config.experimental.enable_tensor_float_32_execution(False)

__all__ = ["tf"]
