"""The whole captioner as one TensorFlow module, which is saved without any of this project's code.

    model = tf.saved_model.load("coco_saved_model")
    result = model.caption(tf.constant([open("photo.jpg", "rb").read()]))
    print(result["caption"][0, 0].numpy().decode())

All is in the graph: reading the bytes, the CNN, the encoder, the search, and the words of the ids. In the comments B is
the number of images, N that of captions for each, and T that of the words of the longest one.
"""

import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from beyond.export.graph_images import read_pixels
from beyond.export.pillow_resize import pillow_takes_rows_first
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID
from captioning.config.settings import DecodeConfig
from captioning.decoder.decoding import DecodedBatch, StepModel, decode
from captioning.output.captions import SMALLEST_PROBABILITY, Vocabulary

SAVED_MODEL_FILE = "saved_model.pb"


def check_exportable(config: DecodeConfig) -> None:
    """Raises InputError if the settings draw words at random: their numbers come from outside the graph."""
    if config.sample:
        raise InputError("--sample cannot be exported; expected greedy search or a beam search")


class ExportedModel(tf.Module):
    """Captions images: `caption` from the bytes of their files, `caption_pixels` from pixels.

    Args:
        extractor: the CNN, from pixels (B, size, size, 3) uint8 to features (B, L, C).
        model: the caption model.
        vocabulary: the tokenizer.
        config: how captions are searched for, `max_words` included.
        features_dtype: that of the features of the training, to which they are rounded.
        min_jpeg_side: how large JPEGs were decoded for the training, see `captioning.images.reading.read_image`.
        image_size: pixels of both sides of what the CNN takes.

    Raises:
        InputError: see `check_exportable`.
    """

    def __init__(
        self,
        extractor: Callable[..., tf.Tensor],
        model: StepModel,
        vocabulary: Vocabulary,
        config: DecodeConfig,
        features_dtype: str,
        min_jpeg_side: int | None,
        image_size: int,
    ):
        super().__init__()
        check_exportable(config)
        rows_first = pillow_takes_rows_first()

        def decode_pixels(pixels: tf.Tensor) -> DecodedBatch:
            features = tf.cast(extractor(pixels, training=False), features_dtype)  # (B, L, C)
            return decode(model, features, config)

        def load(content: tf.Tensor) -> tf.Tensor:
            return read_pixels(content, image_size, rows_first, min_jpeg_side)

        # Only the variables are attributes: of its own models Keras would save more than what is called.
        self.weights = list_variables(extractor, model)
        self.decode_pixels, self.load, self.num_captions = decode_pixels, load, config.captions
        self.words = tf.constant(["" if i in (PAD_ID, END_ID) else w for i, w in enumerate(vocabulary.index_word)])
        # Whether a word stands without a space beside one of its kind, as Chinese characters do.
        self.is_unspaced = tf.constant([vocabulary.join((w, w)) == w + w for w in vocabulary.index_word])
        self.caption = tf.function(self._caption, input_signature=[tf.TensorSpec([None], tf.string, "image")])
        self.pixels_spec = tf.TensorSpec([image_size, image_size, 3], tf.uint8)  # of an image
        pixels = tf.TensorSpec([None, *self.pixels_spec.shape], tf.uint8, "pixels")
        self.caption_pixels = tf.function(self._caption_pixels, input_signature=[pixels])

    def _caption(self, image: tf.Tensor) -> dict[str, tf.Tensor]:
        """Captions the content of image files, (B,)."""
        return self._caption_pixels(tf.map_fn(self.load, image, fn_output_signature=self.pixels_spec))

    def _caption_pixels(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
        """Captions pixels (B, size, size, 3). All results are (B, N, ...), the best caption of an image first."""
        decoded = self.decode_pixels(pixels)
        is_word = (decoded.tokens != PAD_ID) & (decoded.tokens != END_ID)  # (B * N, T + 1)
        num_words = tf.reduce_max(tf.reduce_sum(tf.cast(is_word, tf.int32), axis=1))  # T, without <end>
        tokens, is_word = decoded.tokens[:, :num_words], is_word[:, :num_words]
        results = {
            "caption": self._join(tokens, is_word),
            "words": tf.gather(self.words, tokens),
            "probabilities": tf.where(is_word, decoded.probabilities[:, :num_words], 0),
            "attention": tf.where(is_word[:, :, tf.newaxis], decoded.attention[:, :num_words], 0),
            "finished": tf.reduce_any(decoded.tokens == END_ID, axis=1),
            **_sum_log_probs(decoded),
        }
        if decoded.gates is not None:
            results["gates"] = tf.where(is_word, decoded.gates[:, :num_words], 0)
        num_images = tf.shape(pixels)[0]

        def by_image(tensor: tf.Tensor) -> tf.Tensor:
            return tf.reshape(tensor, tf.concat([[num_images, self.num_captions], tf.shape(tensor)[1:]], axis=0))

        return {name: by_image(tensor) for name, tensor in results.items()}

    def _join(self, tokens: tf.Tensor, is_word: tf.Tensor) -> tf.Tensor:
        """Joins words (B * N, T) to texts (B * N,), as the tokenizer does."""
        is_unspaced = tf.gather(self.is_unspaced, tokens)
        follows_space = ~(is_unspaced[:, 1:] & is_unspaced[:, :-1]) & is_word[:, 1:]
        spaces = tf.pad(tf.cast(follows_space, tf.int32), [[0, 0], [1, 0]])
        return tf.strings.reduce_join(tf.gather(["", " "], spaces) + tf.gather(self.words, tokens), axis=1)


def list_variables(*models: Any) -> list[tf.Variable]:
    """Returns the variables of Keras models, which a module must have as an attribute to be saved with them."""
    return [variable.value for model in models for variable in getattr(model, "variables", ())]


def _sum_log_probs(decoded: DecodedBatch) -> dict[str, tf.Tensor]:
    """Returns log p and confidence (B * N,) as `captions.Caption` has them; -inf and 0 of no caption."""
    is_token = decoded.tokens != PAD_ID
    # In float64, since the smallest probability is 0 in the float32 of a processor.
    probabilities = tf.maximum(tf.cast(decoded.probabilities, tf.float64), SMALLEST_PROBABILITY)
    log_prob = tf.reduce_sum(tf.where(is_token, tf.math.log(probabilities), 0), axis=1)
    num_tokens = tf.reduce_sum(tf.cast(is_token, tf.float64), axis=1)
    log_prob = tf.where(num_tokens > 0, log_prob, -float("inf"))
    confidence = tf.exp(log_prob / tf.maximum(num_tokens, 1))
    return {"log_prob": tf.cast(log_prob, tf.float32), "confidence": tf.cast(confidence, tf.float32)}


def save(model: ExportedModel, folder: Path) -> None:
    """Writes a SavedModel with the signatures `serving_default`, which is `caption`, and `pixels`.

    An earlier SavedModel there is replaced when the new one is complete.

    Raises:
        InputError: the folder holds something else.
        OSError: it cannot be written; the disk may be full.
    """
    if folder.exists() and not (folder / SAVED_MODEL_FILE).is_file() and not _is_empty_folder(folder):
        raise InputError(f"{folder}: expected a new folder, or that of an earlier SavedModel, found something else")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:50]}.", dir=folder.parent) as temporary:
        new = os.path.join(temporary, "new")
        signatures = {"serving_default": model.caption, "pixels": model.caption_pixels}
        try:
            tf.saved_model.save(model, new, signatures=signatures)
        except tf.errors.OpError as error:  # which is what a full disk is to TensorFlow
            raise OSError(f"cannot write {folder} ({str(error).strip().splitlines()[0][:200]})") from None
        if folder.exists():
            os.rename(folder, os.path.join(temporary, "old"))
        shutil.move(new, folder)


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())
