"""Makes the features of a CNN with random weights useful: local, and of a size that does not vanish or explode."""

import contextlib
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN
from captioning.images.cnn_loader import find_cnn, preprocess, save_cnn

NUM_IMAGES = 64  # on which a CNN is calibrated
MAX_CHAIN_IMAGES = 16  # VGG19's first layers have 13 MB for each image of 224x224


def save_random_cnn(
    path: Path,
    extractor: tf.keras.Model,
    cnn: CNN,
    image_files: Iterable[Path],
    load_image: Callable[[Path, int], np.ndarray],
) -> str:
    """Calibrates a random CNN on the first images that can be read, saves its weights, and returns their SHA-256.

    Raises:
        InputError: none of the images can be read.
    """
    images: list[np.ndarray] = []
    for file in image_files:
        if len(images) == NUM_IMAGES:
            break
        with contextlib.suppress(InputError):
            images.append(load_image(file, cnn.image_size))
    if not images:
        raise InputError("--cnn-weights random needs an image that can be read, found none")
    calibrate(extractor, np.stack(images), cnn)
    path.parent.mkdir(parents=True, exist_ok=True)
    return save_cnn(extractor, path)


def make_local(cnn: tf.keras.Model, sigma: float = 0.7) -> None:
    """Multiplies the kernels of a random CNN by a Gaussian around their centres; `sigma` is in pixels.

    Without it, every location of the grid depends almost equally on the whole image, and attention cannot tell the
    locations apart. Training makes the kernels of a real CNN local.
    """
    for layer in cnn.layers:
        if isinstance(layer, tf.keras.layers.Conv2D | tf.keras.layers.DepthwiseConv2D):
            height, width = layer.kernel.shape[:2]
            y = np.arange(height) - (height - 1) / 2
            x = np.arange(width) - (width - 1) / 2
            window = np.exp(-(y[:, np.newaxis] ** 2 + x**2) / (2 * sigma**2))  # (height, width)
            layer.kernel.assign(layer.kernel * window[:, :, np.newaxis, np.newaxis])
        elif type(layer).__name__ == "LayerScale":  # a class that Keras does not show
            # ConvNeXt's blocks begin with a millionth of their weight (Touvron et al. 2021, "Going deeper with Image
            # Transformers", section 2): untrained they would do nothing.
            layer.gamma.assign(tf.ones_like(layer.gamma))


def calibrate(extractor: tf.keras.Model, images: np.ndarray, cnn: CNN) -> None:
    """Fits a random CNN to some images (B, size, size, 3) uint8, so that its activations neither vanish nor explode.

    Batch normalisation gets the statistics of the images. A chain of convolutions without any, such as VGG19, gets
    what batch normalisation would do in its kernels and biases. Layer normalisation, ConvNeXt's, needs nothing: it
    normalises every image by itself.
    """
    model = find_cnn(extractor)
    kinds = {type(layer) for layer in model.layers}
    if tf.keras.layers.BatchNormalization in kinds:
        _calibrate_batch_norm(extractor, model, images)
    elif tf.keras.layers.LayerNormalization not in kinds:
        _calibrate_chain(model, preprocess(tf.constant(images[:MAX_CHAIN_IMAGES]), cnn))


def _calibrate_batch_norm(extractor: tf.keras.Model, model: tf.keras.Model, images: np.ndarray) -> None:
    """Sets the statistics of batch normalisation to those of images (B, size, size, 3) uint8."""
    replaced = []
    for layer in model.layers:
        if isinstance(layer, tf.keras.layers.BatchNormalization):
            replaced.append((layer, "momentum", layer.momentum))
            layer.momentum = 0.0  # the moving statistics become those of this batch
        elif isinstance(layer, tf.keras.layers.Dropout):
            replaced.append((layer, "rate", layer.rate))
            layer.rate = 0.0  # EfficientNet's leaves out whole blocks
    extractor(images, training=True)
    for layer, name, value in replaced:
        setattr(layer, name, value)


def _calibrate_chain(model: tf.keras.Model, x: tf.Tensor) -> None:
    """Makes every convolution of a chain of layers give each channel a mean of 0 and a variance of 1 before its ReLU.

    `x` are preprocessed images (B, size, size, 3). After Salimans and Kingma 2016, "Weight Normalization", section 3.
    """
    for layer in model.layers[1:]:  # the first is the input
        if isinstance(layer, tf.keras.layers.Conv2D):
            activation, layer.activation = layer.activation, tf.keras.activations.linear
            mean, variance = tf.nn.moments(layer(x), axes=(0, 1, 2))  # of each channel
            layer.activation = activation
            scale = tf.math.rsqrt(variance + 1e-3)
            layer.kernel.assign(layer.kernel * scale)
            layer.bias.assign((layer.bias - mean) * scale)
        x = layer(x)
