"""Builds a CNN of `captioning.config.cnns` with its weights and the preprocessing that it was trained with."""

import contextlib
import os
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

from captioning.base import devices
from captioning.base.cli import InputError, advise, first_line
from captioning.base.files import file_sha256, replace
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN


def preprocess(pixels: tf.Tensor, cnn: CNN) -> tf.Tensor:
    """Scales pixels as those of the CNN's ImageNet training were: (B, size, size, 3), from uint8 to float32."""
    if cnn.preprocessing == "tf":  # the same as `preprocess_input` of inception_v3 and resnet_v2
        return tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)
    x = tf.keras.ops.cast(pixels, "float32")
    return tf.keras.applications.imagenet_utils.preprocess_input(x, mode="caffe") if cnn.preprocessing == "caffe" else x


def imagenet_file(cnn: CNN) -> Path:
    """Returns the file that Keras downloads ImageNet's weights into."""
    return Path(os.environ.get("KERAS_HOME") or Path.home() / ".keras") / "models" / cnn.weights_file


def load_cnn(cnn: CNN, cnn_weights: str) -> tf.keras.Model:
    """Makes a CNN up to the layer whose output is used, with the weights `imagenet`, `random`, or those of a file.

    Returns:
        A model from preprocessed images (B, size, size, 3) to (B, H, W, C), named like the CNN.

    Raises:
        InputError: the weights cannot be downloaded, or do not belong to this CNN.
    """
    if cnn_weights == "random":
        tf.keras.utils.set_random_seed(0)
    devices.check_gpus()
    try:
        with warnings.catch_warnings(action="ignore", category=UserWarning):  # MobileNetV3's of sizes other than 224
            model = getattr(tf.keras.applications, cnn.name)(
                include_top=False,
                weights="imagenet" if cnn_weights == "imagenet" else None,
                input_shape=(cnn.image_size, cnn.image_size, 3),
            )
        if cnn_weights not in ("imagenet", "random"):
            with warnings.catch_warnings(action="error", category=UserWarning):
                model.load_weights(cnn_weights)  # a layer that the file lacks is only a warning of Keras
    except Exception as error:  # Keras raises a bare Exception if a download fails; h5py and Keras raise many types
        reason = first_line(error)
        if sys.platform == "darwin" and "CERTIFICATE" in reason:
            reason += "; Python's folder in Applications has `Install Certificates.command`, which mends this"
        if cnn_weights == "imagenet":
            raise InputError(
                f"{cnn.name}'s ImageNet weights cannot be downloaded ({reason}); put the file {cnn.weights_file} into "
                f"{imagenet_file(cnn).parent}/"
                + advise(", or give --cnn-weights FILE, or try the pipeline with --cnn-weights random")
            ) from None
        raise InputError(f"{cnn_weights}: not the weights of {cnn.name} without its top ({reason})") from None
    if cnn.layer:
        model = tf.keras.Model(model.input, model.get_layer(cnn.layer).output, name=model.name)
    return model


@contextlib.contextmanager
def computing_in(precision: str) -> Iterator[None]:
    """Sets what a CNN that is built and run in the block computes in, one of `feature_cache.PRECISIONS`.

    Its weights are float32 in any case.
    """
    policy = tf.keras.config.dtype_policy()
    tf.keras.config.set_dtype_policy("mixed_float16" if precision == "float16" else "float32")
    tf.config.experimental.enable_tensor_float_32_execution(precision == "tf32")
    try:
        yield
    finally:
        tf.config.experimental.enable_tensor_float_32_execution(False)
        tf.keras.config.set_dtype_policy(policy)


def find_cnn(extractor: tf.keras.Model) -> tf.keras.Model:
    """Returns the CNN in a model of `features.build_feature_extractor`."""
    return next(layer for layer in extractor.layers if isinstance(layer, tf.keras.Model))


def save_cnn(extractor: tf.keras.Model, path: Path) -> str:
    """Saves the weights of the CNN in an extractor into a whole file; returns its SHA-256."""
    partial = path.with_name(f".{path.name}")  # not atomic_write: Keras demands the ending .weights.h5
    try:
        find_cnn(extractor).save_weights(partial)
        replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return file_sha256(path)
