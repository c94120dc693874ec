"""The captioner as a LiteRT file (.tflite), for phones and small machines: from the pixels of an image to ids.

LiteRT has no operation that reads a JPEG or looks up text: the caller resizes the image and looks up the words of the
ids.
"""

import tempfile
from pathlib import Path

from beyond.export.saved_model import list_variables
from captioning.base.cli import InputError, first_line, suppress_stderr
from captioning.base.quiet_tensorflow import tf
from captioning.decoder.decoding import decode
from inference import Captioner


class LiteRTModel(tf.Module):
    """Captions the pixels of one image."""

    def __init__(self, captioner: Captioner):
        super().__init__()

        def caption(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            features = captioner.extract_features(pixels)  # (1, L, C)
            decoded = decode(captioner.model, features, captioner.decode_config)
            return decoded._asdict()  # tokens and probabilities (N, T), attention (N, T, L)

        self.weights = list_variables(captioner.extractor, captioner.model)
        size = captioner.image_size
        spec = tf.TensorSpec([1, size, size, 3], tf.uint8, "pixels")
        self.caption = tf.function(caption, input_signature=[spec])


def is_litert(path: Path) -> bool:
    """Tells whether a file is a LiteRT model."""
    with open(path, "rb") as file:
        return file.read(8)[4:] == b"TFL3"


def convert(captioner: Captioner, weights: str) -> bytes:
    """Converts a captioner to the content of a LiteRT file, with the signature `caption`.

    Args:
        captioner: the run, and how its captions are searched for.
        weights: `float32`, or `float16`, half as large.

    Raises:
        InputError: the converter cannot take these settings.
    """
    model = LiteRTModel(captioner)
    with tempfile.TemporaryDirectory() as folder:
        tf.saved_model.save(model, folder, signatures={"caption": model.caption})
        converter = tf.lite.TFLiteConverter.from_saved_model(folder, signature_keys=["caption"])
        if weights == "float16":
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            converter.target_spec.supported_types = [tf.float16]
        try:
            with suppress_stderr():
                return converter.convert()
        except Exception as error:  # the converter has an error of its own, and raises others
            reason = first_line(error)
            raise InputError(f"LiteRT's converter cannot take this model with these settings ({reason})") from None
