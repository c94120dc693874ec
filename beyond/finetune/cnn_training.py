"""Training of the CNN together with the decoder: its blocks, images instead of cached features, and what a run keeps.

Xu et al. 2015 leave the CNN as it is. Vinyals et al. 2016, "Show and Tell: Lessons learned from the 2015 MSCOCO Image
Captioning Challenge", train it once the decoder has converged, since the gradients of an untrained one would spoil it.
In the comments I is the number of images of a batch, L that of the CNN's locations and C that of its channels.
"""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from captioning.base.cli import InputError
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN
from captioning.config.run_config import RunConfig
from captioning.config.settings import FeatureConfig
from captioning.images.cnn_loader import find_cnn
from captioning.images.feature_cache import CNN_FILE, FeatureSource, check_cnn_weights, find_cnn_weights, min_jpeg_side
from captioning.images.reading import set_max_megapixels
from captioning.runs.run_folder import CONFIG_FILE, read_config, settings_to_continue, write_config
from captioning.training.checkpoints import Checkpoints
from captioning.training.input_pipeline import Batch

# What such a training sets instead of the defaults of TrainConfig: few epochs, since every image goes through the CNN,
# and a decoder that moves slowly, since it has converged. An image goes through the CNN once for its captions.
CNN_RECIPE: dict[str, Any] = {"epochs": 5, "learning_rate": 1e-4, "shuffle_by": "image"}
KEPT_SETTINGS = ("batch_size", "clip_norm", "ema_decay", "label_smoothing", "doubly_stochastic")

# Augmentation. Small, and never a mirror image: captions say left and right.
MIN_CROP = 0.9  # share of a side that is kept
MAX_BRIGHTNESS = 0.1 * 255  # added to all channels alike, or subtracted
MAX_CONTRAST = 0.1  # of 1, more or less


# The blocks of a CNN.


def find_blocks(cnn: tf.keras.Model) -> list[list[tf.keras.layers.Layer]]:
    """Divides the layers of a CNN into blocks: a block begins wherever layers with strides make the grid smaller.

    They are the blocks 1 to 5 of VGG19 and of ResNet50 (`block5_conv1`, `conv5_block1_out`). Those of InceptionV3 begin
    with its first layers and with `mixed0` (block 3), the strided layers of `mixed3` (4), and those of `mixed8` (5).

    Args:
        cnn: a model of `captioning.images.cnn_loader.load_cnn`.

    Returns:
        The layers of each block that has weights, in the order in which an image passes the blocks.
    """
    levels = {id(x): 0 for x in tf.nest.flatten(cnn.inputs)}  # strided layers before a tensor
    blocks: dict[int, list[tf.keras.layers.Layer]] = {}
    for operation in cnn.operations:
        outputs = tf.nest.flatten(operation.output)
        if id(outputs[0]) in levels:  # the input
            continue
        layers = getattr(operation, "layers", [operation])  # a layer of ConvNeXt holds others
        level = max(levels[id(x)] for x in tf.nest.flatten(operation.input)) + any(map(_is_strided, layers))
        levels |= {id(x): level for x in outputs}
        blocks.setdefault(level, []).extend(layers)
    has_weights = {level for level, layers in blocks.items() if any(map(_has_weights, layers))}
    return [blocks[level] for level in sorted(has_weights)]


def _is_strided(layer: Any) -> bool:
    """Tells whether a layer makes the grid smaller."""
    return max(tf.nest.flatten(getattr(layer, "strides", 1))) > 1


def _has_weights(layer: Any) -> bool:
    """Tells whether a layer has weights, other than the scale of the pixels."""
    return bool(getattr(layer, "weights", ())) and not isinstance(layer, tf.keras.layers.Normalization)


def trainable_from(cnn: tf.keras.Model, block: int) -> None:
    """Makes the layers of a CNN trainable from a block on, and no others.

    Batch normalisation stays as it is, its scale and offset too: a batch of captioning has few images.

    Args:
        cnn: a model of `captioning.images.cnn_loader.load_cnn`, all of whose layers are trainable.
        block: the number of the first block that is trained, from 1.

    Raises:
        InputError: the CNN has no such block.
    """
    blocks = find_blocks(cnn)
    if not 1 <= block <= len(blocks):
        raise InputError(f"--train-cnn {block}: expected 1 to {len(blocks)}, the blocks of {cnn.name}")
    for number, layers in enumerate(blocks, start=1):
        for layer in layers:
            layer.trainable = number >= block and not isinstance(layer, tf.keras.layers.BatchNormalization)


class TrainedCNN(tf.keras.layers.Layer):
    """The CNN in front of a caption model, which then takes pixels where it otherwise takes features.

    Args:
        extractor: a model of `features.build_feature_extractor`.
        stored_dtype: float16 or float32, to which captioning rounds features.
    """

    def __init__(self, extractor: tf.keras.Model, stored_dtype: np.dtype | str):
        super().__init__(dtype="float32", name="cnn")
        self.extractor, self.stored_dtype = extractor, stored_dtype

    def call(self, pixels: tf.Tensor) -> tf.Tensor:
        """Computes the features (I, L, C) float32 of pixels (I, size, size, 3) uint8, with inference's statistics."""
        features = self.extractor(pixels, training=False)  # (I, L, C)
        rounded = tf.cast(tf.cast(features, self.stored_dtype), tf.float32)
        return features + tf.stop_gradient(rounded - features)  # rounded, with the gradient of what is not


# Images instead of features.


class ImageReader:
    """Reads images where a training with a fixed CNN reads their cached features.

    Args:
        image_dir: the folder of the images.
        manifest: that of the features, with their `folder`.
        load_image: `features.load_image`.
        trained_cnn: turns what is read into features.
    """

    def __init__(
        self, image_dir: Path, manifest: dict[str, Any], load_image: Callable[..., np.ndarray], trained_cnn: TrainedCNN
    ):
        self.folder, self.manifest = Path(manifest["folder"]), manifest
        self.image_dir, self.load_image, self.trained_cnn = image_dir, load_image, trained_cnn
        self.failure: InputError | None = None  # an image that could not be read

    @property
    def cnn_weights(self) -> str:
        """The CNN's file in the run folder, which there is once an epoch is the best."""
        return str(self.folder.with_name(CNN_FILE))

    def path(self, image_path: str) -> Path:
        """Returns the file of an image."""
        return self.image_dir / image_path

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Reads the images of files (I,) inside a tf.data pipeline: (I, size, size, 3) uint8, as inference reads them.

        An image that cannot be read is an error of the pipeline; see `explain_failure`.
        """
        size, min_side = self.manifest["image_size"], min_jpeg_side(self.manifest)

        def load(paths: np.ndarray) -> np.ndarray:
            try:
                images = [self.load_image(os.fsdecode(path), min_side, size) for path in paths]
                return np.stack(images)  # (I, size, size, 3)
            except InputError as error:
                self.failure = error
                raise

        return tf.ensure_shape(tf.numpy_function(load, [paths], tf.uint8), (None, size, size, 3))


@contextlib.contextmanager
def explain_failure(cache: FeatureSource) -> Iterator[None]:
    """Turns the error of a tf.data pipeline into the `InputError` behind it, if an image could not be read."""
    try:
        yield
    except tf.errors.OpError:
        if isinstance(cache, ImageReader) and cache.failure:
            raise cache.failure from None
        raise


def augment(pixels: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
    """Crops images at random, by at most a tenth of each side, and changes their brightness and contrast a little.

    Args:
        pixels: (I, size, size, 3) uint8.
        seed: (2,), of the random numbers.

    Returns:
        (I, size, size, 3) uint8.
    """
    num_images, size = tf.shape(pixels)[0], pixels.shape[1]
    numbers = tf.random.stateless_uniform((6, num_images), seed)  # (6, I)
    height, width = (1 - (1 - MIN_CROP) * number for number in (numbers[0], numbers[1]))  # (I,)
    top, left = numbers[2] * (1 - height), numbers[3] * (1 - width)  # (I,)
    boxes = tf.stack([top, left, top + height, left + width], axis=1)  # (I, 4)
    # (I, size, size, 3), bilinear
    images = tf.image.crop_and_resize(tf.cast(pixels, tf.float32), boxes, tf.range(num_images), (size, size))
    contrast = 1 + MAX_CONTRAST * (2 * numbers[4] - 1)
    brightness = MAX_BRIGHTNESS * (2 * numbers[5] - 1)
    mean = tf.reduce_mean(images, axis=(1, 2, 3), keepdims=True)  # (I, 1, 1, 1)
    images = (images - mean) * _per_image(contrast) + mean + _per_image(brightness)
    return tf.cast(tf.clip_by_value(tf.round(images), 0, 255), tf.uint8)


def _per_image(values: tf.Tensor) -> tf.Tensor:
    """Returns values (I,) so that they apply to images: (I, 1, 1, 1)."""
    return values[:, tf.newaxis, tf.newaxis, tf.newaxis]  # (I, 1, 1, 1)


def augment_batch(batch: Batch, seed: int, step: tf.Tensor) -> Batch:
    """Augments the images of a batch; seed and step decide how, so that a resumed run draws the same.

    Args:
        batch: its `features` are pixels (I, size, size, 3) uint8.
        seed: that of the training.
        step: the number of the training step.
    """
    seeds = tf.stack([tf.constant(seed, tf.int64), tf.cast(step, tf.int64)])  # (2,)
    return batch._replace(features=augment(batch.features, seeds))


# The run.


def settings_to_train_cnn(start: Path) -> dict[str, Any]:
    """Returns the settings, by name, that the training of the CNN takes over from the run that it starts from.

    Raises:
        InputError: as `settings_to_continue`.
    """
    settings = settings_to_continue(start)
    config = read_config(start).train
    return settings | {name: getattr(config, name) for name in KEPT_SETTINGS} | CNN_RECIPE


def open_images(
    run: Path,
    start: Path,
    dataset: Any,
    config: FeatureConfig,
    block: int,
    load_image: Callable[..., np.ndarray],
    build_extractor: Callable[[str, CNN], tf.keras.Model],
) -> tuple[FeatureSource, Any]:
    """Opens the images of a dataset in the place of a cache, and builds the CNN that is trained.

    Args:
        run: the new run's folder; what is in config.json there, if it is resumed, is taken over.
        start: the folder of the run that it starts from.
        dataset: the `CaptionDataset`.
        config: how pixels are read and features are made, with the CNN of `start`.
        block: the first block of the CNN that is trained.
        load_image: `features.load_image`.
        build_extractor: `features.build_feature_extractor`.

    Returns:
        The images, and the dataset without those that `start` could not read.

    Raises:
        InputError: the CNN has no such block; its weights are missing, or others; or a folder of features is given.
    """
    set_max_megapixels(config.max_megapixels)
    saved = read_config(start)
    if config.features_dir != saved.features["folder"]:
        raise InputError("--features-dir: not for --train-cnn, which reads the images")
    folder = run / "features"
    manifest = {
        **saved.features,
        "folder": str(folder),
        "images": Path(os.path.relpath(dataset.image_dir.resolve(), folder.resolve())).as_posix(),
    }
    if (run / CONFIG_FILE).exists():
        manifest = read_config(run).features
    manifest["dtype"] = config.dtype
    # The weights of a run that was already trained here are restored with its checkpoint.
    weights = config.cnn_weights
    if weights == "random":
        weights = find_cnn_weights(start) or weights
    check_cnn_weights(weights, saved.features.get("sha256"))
    extractor = build_extractor(weights, config.sized_cnn)
    trainable_from(find_cnn(extractor), block)
    reader = ImageReader(dataset.image_dir, manifest, load_image, TrainedCNN(extractor, config.dtype))
    return reader, dataset.exclude(set(saved.unreadable_images))


class CNNCheckpoints(Checkpoints):
    """Checkpoints of a run whose CNN is trained: with the best weights, the CNN is saved as captioning reads it."""

    def __init__(self, run: Path, model: tf.keras.Model, *args: Any):
        super().__init__(run, model, *args)
        self.run = run

    def save_best(self) -> None:
        """Saves the current weights as the best: the CNN's file, the checkpoint, and the file's SHA-256.

        In this order: if it is stopped in between, captioning says that they do not belong together, until the training
        is resumed, which then does the same again.
        """
        partial = self.run / f".{CNN_FILE}"  # not atomic_write: Keras demands the ending .weights.h5
        find_cnn(self.model.cnn.extractor).save_weights(partial)
        os.replace(partial, self.run / CNN_FILE)
        super().save_best()
        config: RunConfig = read_config(self.run)
        weights = {"weights": str(self.run / CNN_FILE), "sha256": file_sha256(self.run / CNN_FILE)}
        write_config(self.run, dataclasses.replace(config, features=config.features | weights))
