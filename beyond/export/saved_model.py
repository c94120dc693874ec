"""The whole captioner as one TensorFlow module, which is saved without any of this project's code.

    model = tf.saved_model.load("coco_saved_model")
    result = model.caption(pixels)  # (B, 299, 299, 3) uint8
    print(result["caption"][0, 0].numpy().decode())

The graph holds the CNN, the encoder, the search and the words. In the comments B is the number of images, N the number
of captions for each, T the number of words of the longest caption and L the number of image locations.
"""

import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, first_line
from captioning.base.files import plain_path
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID
from captioning.decoder.decoding import DecodedBatch, decode
from captioning.output.captions import SMALLEST_PROBABILITY
from inference import Captioner

SAVED_MODEL_FILE = "saved_model.pb"


class ExportedModel(tf.Module):
    """Captions images as the captioner does: `caption` takes pixels.

    `caption_files` takes the bytes of image files, which `read_pixels` reads; it is None unless `with_decoder`.
    """

    def __init__(self, captioner: Captioner, with_decoder: bool = False):
        super().__init__()
        size, config = captioner.image_size, captioner.decode_config

        def decode_pixels(pixels: tf.Tensor) -> DecodedBatch:
            return decode(captioner.model, captioner.extract_features(pixels), config)

        # Only the variables are attributes: Keras would save more of its models than what is called.
        self.weights = list_variables(captioner.extractor, captioner.model)
        self.decode_pixels = decode_pixels
        self.num_captions = config.captions
        vocabulary = captioner.tokenizer
        self.words = tf.constant(["" if i in (PAD_ID, END_ID) else w for i, w in enumerate(vocabulary.index_word)])
        # Whether a word is written without a space beside another such word, as Chinese characters are.
        self.is_unspaced = tf.constant([vocabulary.join((w, w)) == w + w for w in vocabulary.index_word])

        def caption_files(content: tf.Tensor) -> dict[str, tf.Tensor]:
            spec = tf.TensorSpec([size, size, 3], tf.uint8)
            return self._caption(tf.map_fn(lambda file: read_pixels(file, size), content, fn_output_signature=spec))

        pixels = tf.TensorSpec([None, size, size, 3], tf.uint8, "pixels")
        content = tf.TensorSpec([None], tf.string, "content")  # (B,)
        self.caption = tf.function(self._caption, input_signature=[pixels])
        self.caption_files = tf.function(caption_files, input_signature=[content]) if with_decoder else None

    def _caption(self, pixels: tf.Tensor) -> dict[str, tf.Tensor]:
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


def read_pixels(content: tf.Tensor, size: int) -> tf.Tensor:
    """Decodes and resizes an image file to (size, size, 3) uint8, by TensorFlow.

    The pixels differ slightly from those of the training's Pillow; README.md has the measured differences.

    Raises:
        tf.errors.InvalidArgumentError: it is no JPEG, PNG, GIF, BMP or WebP file, or is damaged.
    """
    if tf.io.is_jpeg(content):
        # decode_image would take the fast transform, which darkens every pixel by about 1.
        image = tf.io.decode_jpeg(content, channels=3, dct_method="INTEGER_ACCURATE")  # (height, width, 3) uint8
    else:
        image = tf.io.decode_image(content, channels=3, expand_animations=False)
    image = tf.image.resize(tf.ensure_shape(image, [None, None, 3]), [size, size], antialias=True)
    return tf.cast(tf.round(image), tf.uint8)


def list_variables(*models: Any) -> list[tf.Variable]:
    """Returns the variables of Keras models, which a module must have as an attribute to be saved with them."""
    return [variable.value for model in models for variable in getattr(model, "variables", ())]


def _sum_log_probs(decoded: DecodedBatch) -> dict[str, tf.Tensor]:
    """Returns log p and confidence (B * N,) as `captions.Caption` has them; -inf and 0 where there is no caption."""
    is_token = decoded.tokens != PAD_ID
    # In float64, since the smallest probability is 0 in the float32 of a processor.
    probabilities = tf.maximum(tf.cast(decoded.probabilities, tf.float64), SMALLEST_PROBABILITY)
    log_prob = tf.reduce_sum(tf.where(is_token, tf.math.log(probabilities), 0), axis=1)
    num_tokens = tf.reduce_sum(tf.cast(is_token, tf.float64), axis=1)
    log_prob = tf.where(num_tokens > 0, log_prob, -float("inf"))
    confidence = tf.exp(log_prob / tf.maximum(num_tokens, 1))
    return {"log_prob": tf.cast(log_prob, tf.float32), "confidence": tf.cast(confidence, tf.float32)}


def save(model: ExportedModel, folder: Path) -> None:
    """Writes a SavedModel with the signature `caption`, which is also the default, and `caption_files` if it is there.

    An earlier SavedModel there is replaced when the new one is complete.

    Raises:
        InputError: the folder holds something else.
        OSError: it cannot be written; the disk may be full.
    """
    is_empty = folder.is_dir() and not any(folder.iterdir())
    if folder.exists() and not (folder / SAVED_MODEL_FILE).is_file() and not is_empty:
        raise InputError(f"{folder}: expected a new folder or one with an earlier SavedModel, found something else")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name[:50]}.", dir=folder.parent) as temporary:
        new = os.path.join(temporary, "new")
        signatures = {"serving_default": model.caption, "caption": model.caption}
        if model.caption_files:
            signatures["caption_files"] = model.caption_files
        try:
            tf.saved_model.save(model, str(plain_path(new)), signatures=signatures)
        except tf.errors.OpError as error:  # TensorFlow raises it for a full disk, too
            raise OSError(f"cannot write {folder} ({first_line(error)})") from None
        if folder.exists():
            os.rename(folder, os.path.join(temporary, "old"))
        shutil.move(new, folder)
