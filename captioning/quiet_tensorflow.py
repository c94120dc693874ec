"""Imports TensorFlow without the lines that its libraries write while they load.

from captioning.quiet_tensorflow import tf
"""

from captioning.cli import suppress_stderr

with suppress_stderr():
    import tensorflow as tf

__all__ = ["tf"]
