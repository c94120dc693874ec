"""Features of all training images in the memory of the device that trains: a step gathers those of its batch there."""

import os
from collections.abc import Callable

import numpy as np

from captioning.base import devices
from captioning.base.cli import InputError, format_bytes, log, progress_bar
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.images.feature_cache import map_prefetch

MAX_SHARE = 0.5  # of the free memory of a GPU: training needs some, too
CHUNK = 64  # images that are read and copied at once


def load_features(
    feature_paths: np.ndarray,
    read_features: Callable[[tf.Tensor], tf.Tensor],
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
) -> tf.Variable | None:
    """Reads the features of all images onto the device that trains, if they fit and one device trains.

    Args:
        feature_paths: (images,) of str, the files.
        read_features: maps paths (images,) to the features of files, (images, L, C), inside a tf.data pipeline.
        config: the settings of the training.
        strategy: the devices that train.

    Returns:
        The features (images, L, C), as they are stored; None if batches bring them, see `TrainConfig.features_on_gpu`.

    Raises:
        InputError: they are asked for, and several devices train.
    """
    is_single = devices.is_single(strategy)
    if config.features_on_gpu == "on" and not is_single:
        raise InputError(f"--features-on-gpu on: expected --strategy none, found {config.strategy}")
    if config.features_on_gpu == "off" or (config.features_on_gpu == "auto" and not (devices.has_gpu() and is_single)):
        return None
    paths = tf.constant([os.fsencode(path) for path in feature_paths])  # which may be no Unicode
    chunks = map_prefetch(tf.data.Dataset.from_tensor_slices(paths).batch(CHUNK), read_features)
    spec = chunks.element_spec
    shape = (len(paths), *spec.shape[1:])
    num_bytes = np.prod(shape, dtype=np.int64) * spec.dtype.size
    if config.features_on_gpu == "auto" and num_bytes > MAX_SHARE * (free := devices.free_gpu_memory()):
        log(
            f"the features of {len(paths):,} images stay on the disk: they take {format_bytes(num_bytes)}, and "
            f"{format_bytes(free)} of the GPU's memory are free; --features-on-gpu on loads them nevertheless"
        )
        return None
    with tf.device("GPU:0" if devices.has_gpu() else "CPU:0"):
        # A variable is written in parts: a tensor made of parts would take twice its memory. Not by scatter_update,
        # which copies all of it to the host and back for integers, such as pixels, and where it must be deterministic.
        features = tf.Variable(tf.zeros(shape, spec.dtype), trainable=False)
        with progress_bar(total=len(paths), desc="loading features", unit="image") as bar:
            done = np.zeros(1, np.int64)  # not the bar's count, which stays 0 if it is hidden
            for part in chunks:
                end = done + len(part)
                tf.raw_ops.ResourceStridedSliceAssign(
                    ref=features.handle, begin=done, end=end, strides=np.ones(1, np.int64), value=part
                )
                done = end
                bar.update(len(part))
    return features
