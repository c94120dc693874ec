"""The captioner as a LiteRT file (.tflite), for phones and small machines: from the pixels of an image to ids.

LiteRT has no operation that reads a JPEG, or that looks up text: the caller resizes the image, and looks up the words
of the ids. The search is that of `decoding`, with the model's own step. Greedy search is a beam of 1, since
LiteRT cannot convert the array of growing length that `greedy_search` writes.
"""

import tempfile
from collections.abc import Callable

from beyond.export.exported_model import check_exportable, list_variables
from captioning.base.cli import InputError, suppress_stderr
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.constraints import Constraints
from captioning.decoder.decoding import MAX_WORDS, StepModel, beam_search


def check_convertible(config: DecodeConfig) -> None:
    """Raises InputError if LiteRT lacks operations for the settings: random words, or no repetitions."""
    check_exportable(config)
    if config.no_repeat:
        raise InputError("--no-repeat needs TensorFlow's TensorScatterMin, which LiteRT lacks; leave it out")


class LiteRTModel(tf.Module):
    """Captions the pixels of one image.

    Args:
        extractor: the CNN, from pixels (1, size, size, 3) uint8 to features (1, L, C).
        model: the caption model.
        config: how captions are searched for, N at a time.
        features_dtype: that of the features of the training, to which they are rounded.
        image_size: pixels of both sides of what the CNN takes.

    Raises:
        InputError: see `check_convertible`.
    """

    def __init__(
        self,
        extractor: Callable[..., tf.Tensor],
        model: StepModel,
        config: DecodeConfig,
        features_dtype: str,
        image_size: int,
    ):
        super().__init__()
        check_convertible(config)
        constraints = Constraints(config.min_words, config.no_repeat)
        max_words = config.max_words or MAX_WORDS

        def caption(pixels: tf.Tensor) -> dict[str, tf.Tensor]:
            features = tf.cast(extractor(pixels, training=False), features_dtype)  # (1, L, C)
            decoded = beam_search(
                model, features, config.num_beams, config.length_penalty, max_words, constraints, config.captions
            )
            # tokens (N, T), probabilities (N, T), attention (N, T, L), and gates (N, T) if the decoder has them
            return {name: tensor for name, tensor in decoded._asdict().items() if tensor is not None}

        self.weights = list_variables(extractor, model)
        spec = tf.TensorSpec([1, image_size, image_size, 3], tf.uint8, "pixels")
        self.caption = tf.function(caption, input_signature=[spec])


def convert(model: LiteRTModel, weights: str) -> bytes:
    """Converts the model to the content of a LiteRT file, with the signature `caption`.

    Args:
        model: what is converted. Only LiteRT's own operations are used.
        weights: `float32`, or `float16`, half as large.

    Raises:
        InputError: the converter cannot take these settings.
    """
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
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(f"LiteRT's converter cannot take this model with these settings ({reason})") from None
