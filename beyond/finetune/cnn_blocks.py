"""The blocks of a CNN, of which the last ones are trained, and the CNN as the front part of a caption model.

In the comments I is the number of images of a batch, L the number of the CNN's locations and C of its channels.
"""

from typing import Any

import numpy as np

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf


def find_blocks(cnn: tf.keras.Model) -> list[list[tf.keras.layers.Layer]]:
    """Divides the layers of a CNN into blocks: a block begins wherever layers with strides make the grid smaller.

    They are the blocks 1 to 5 of VGG19 and of ResNet50 (`block5_conv1`, `conv5_block1_out`). Those of InceptionV3 begin
    with its first layers and with `mixed0` (block 3), the strided layers of `mixed3` (4), and those of `mixed8` (5).
    Only blocks with weights are returned, in the order in which an image passes them.
    """
    levels = {id(x): 0 for x in tf.nest.flatten(cnn.inputs)}  # strided layers before a tensor
    blocks: dict[int, list[tf.keras.layers.Layer]] = {}
    for operation in cnn.operations:
        outputs = tf.nest.flatten(operation.output)
        if id(outputs[0]) in levels:  # the input
            continue
        layers = getattr(operation, "layers", [operation])  # a layer of ConvNeXt holds others
        has_strides = any(max(tf.nest.flatten(getattr(layer, "strides", 1))) > 1 for layer in layers)
        level = max(levels[id(x)] for x in tf.nest.flatten(operation.input)) + has_strides
        levels |= {id(x): level for x in outputs}
        blocks.setdefault(level, []).extend(layers)
    has_weights = {level for level, layers in blocks.items() if any(map(_has_weights, layers))}
    return [blocks[level] for level in sorted(has_weights)]


def _has_weights(layer: Any) -> bool:
    # Those of Normalization are constants, the mean and variance of images.
    return bool(getattr(layer, "weights", ())) and not isinstance(layer, tf.keras.layers.Normalization)


def trainable_from(cnn: tf.keras.Model, block: int) -> None:
    """Makes the layers of a CNN trainable from a block on, and no others.

    Batch normalisation stays as it is, its scale and offset too: a batch of captioning has few images.

    Raises:
        InputError: the CNN has no such block; they are counted from 1.
    """
    blocks = find_blocks(cnn)
    if not 1 <= block <= len(blocks):
        raise InputError(f"--block {block}: expected 1 to {len(blocks)}, the blocks of {cnn.name}")
    for number, layers in enumerate(blocks, start=1):
        for layer in layers:
            layer.trainable = number >= block and not isinstance(layer, tf.keras.layers.BatchNormalization)


class TrainedCNN(tf.keras.layers.Layer):
    """The CNN in front of a caption model, which then takes pixels where it otherwise takes features.

    The features are rounded to `stored_dtype`, as those that captioning reads.
    """

    def __init__(self, extractor: tf.keras.Model, stored_dtype: np.dtype | str):
        super().__init__(dtype="float32", name="cnn")
        self.extractor, self.stored_dtype = extractor, stored_dtype

    def call(self, pixels: tf.Tensor) -> tf.Tensor:
        """Computes the features (I, L, C) float32 of pixels (I, size, size, 3) uint8, with inference's statistics."""
        features = self.extractor(pixels, training=False)  # (I, L, C)
        rounded = tf.cast(tf.cast(features, self.stored_dtype), tf.float32)
        return features + tf.stop_gradient(rounded - features)  # rounded, with the gradient of what is not
