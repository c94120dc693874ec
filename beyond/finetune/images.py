"""Images instead of cached features, and their augmentation. I is the number of images of a batch."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.images.feature_cache import CNN_FILE
from captioning.training.input_pipeline import Batch
from features import load_image

# Augmentation: small.
MIN_CROP = 0.9  # share of a side that is kept
MAX_BRIGHTNESS = 0.1 * 255  # added to all channels alike, or subtracted
MAX_CONTRAST = 0.1  # of 1, more or less


class ImageReader:
    """Reads images where a training with a fixed CNN reads their cached features, whose manifest is given."""

    def __init__(self, image_dir: Path, manifest: dict[str, Any]):
        self.image_dir, self.manifest = image_dir, manifest
        self.folder = Path(manifest["folder"])
        self.cnn_weights = str(self.folder.with_name(CNN_FILE))  # in the run folder, after the first best epoch
        self.failure: InputError | None = None

    def path(self, image_path: str) -> Path:
        """Returns the file of an image."""
        return self.image_dir / image_path

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Reads the images of files (I,) inside a tf.data pipeline: (I, size, size, 3) uint8, as inference reads them.

        An image that cannot be read is an error of the pipeline; see `feature_cache.explain_failure`.
        """
        size = self.manifest["image_size"]

        def load(paths: np.ndarray) -> np.ndarray:
            try:
                return np.stack([load_image(os.fsdecode(path), size) for path in paths])
            except (InputError, OSError) as error:
                self.failure = InputError(str(error))
                raise

        return tf.ensure_shape(tf.numpy_function(load, [paths], tf.uint8), (None, size, size, 3))


def find_images_with(words: tf.Tensor, batch: Batch) -> tf.Tensor:
    """Tells of which images of a batch a caption has one of some words, whose ids are given: (I,) bool."""
    has_word = tf.reduce_any(batch.tokens[:, :, tf.newaxis] == words, axis=[1, 2])  # (B,)
    return tf.math.unsorted_segment_max(tf.cast(has_word, tf.int32), batch.image_index, tf.size(batch.images)) > 0


def mirror(pixels: tf.Tensor, is_allowed: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Mirrors half of the images (I, size, size, 3) for which it is allowed (I,), at random."""
    chosen = tf.random.stateless_uniform(tf.shape(is_allowed), seed) < 0.5
    return tf.where((is_allowed & chosen)[:, tf.newaxis, tf.newaxis, tf.newaxis], pixels[:, :, ::-1], pixels)


def augment(pixels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Crops images (I, size, size, 3) uint8 at random, and changes their brightness and contrast a little."""
    num_images, size = tf.shape(pixels)[0], pixels.shape[1]
    numbers = tf.random.stateless_uniform((6, num_images), seed)  # (6, I)
    height, width = (1 - (1 - MIN_CROP) * number for number in (numbers[0], numbers[1]))  # (I,)
    top, left = numbers[2] * (1 - height), numbers[3] * (1 - width)  # (I,)
    boxes = tf.stack([top, left, top + height, left + width], axis=1)  # (I, 4)
    # (I, size, size, 3), bilinear
    images = tf.image.crop_and_resize(tf.cast(pixels, tf.float32), boxes, tf.range(num_images), (size, size))
    numbers = numbers[:, :, tf.newaxis, tf.newaxis, tf.newaxis]  # (6, I, 1, 1, 1)
    contrast = 1 + MAX_CONTRAST * (2 * numbers[4] - 1)  # (I, 1, 1, 1)
    brightness = MAX_BRIGHTNESS * (2 * numbers[5] - 1)
    mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)  # (I, 1, 1, 1)
    images = (images - mean) * contrast + mean + brightness
    return tf.cast(tf.clip_by_value(tf.round(images), 0, 255), tf.uint8)
