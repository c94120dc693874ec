"""Makes the features of a CNN with random weights useful: local, and of a size that does not vanish."""

import numpy as np

from captioning.quiet_tensorflow import tf


def apply_gaussian_window(cnn: tf.keras.Model, sigma: float = 0.7) -> None:
    """Multiplies the kernels of a random CNN by a Gaussian around their centres; `sigma` is in pixels.

    Without it, every location of the 8x8 grid depends almost equally on the whole image, and attention cannot tell the
    locations apart. Training makes the kernels of a real CNN local.
    """
    for layer in cnn.layers:
        if isinstance(layer, tf.keras.layers.Conv2D):
            height, width = layer.kernel.shape[:2]
            y = np.arange(height) - (height - 1) / 2
            x = np.arange(width) - (width - 1) / 2
            window = np.exp(-(y[:, np.newaxis] ** 2 + x**2) / (2 * sigma**2))  # (height, width)
            layer.kernel.assign(layer.kernel * window[:, :, np.newaxis, np.newaxis])


def calibrate_batch_norm(extractor: tf.keras.Model, images: np.ndarray) -> None:
    """Sets the batch-normalisation statistics of a random CNN to those of some images.

    Without it, the activations of random weights vanish on their way through 94 layers.

    Args:
        extractor: a model of `build_feature_extractor`, which is changed.
        images: (B, 299, 299, 3) uint8.
    """
    layers = extractor.get_layer("inception_v3").layers
    norms = [layer for layer in layers if isinstance(layer, tf.keras.layers.BatchNormalization)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # the moving statistics become those of this batch
    extractor(images, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum
