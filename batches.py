"""Batches of captions of similar length with their pictures' features, in an order that seed and epoch determine."""

from typing import NamedTuple

import features
import numpy as np
import tensorflow as tf

import data_utils
from tokenizer import Tokenizer

WINDOW = 50  # batches among which captions are sorted by length: little padding, and batches still differ by epoch


class Captions(NamedTuple):
    """All captions of a split as arrays, a few bytes each; the features stay on the disk."""

    paths: np.ndarray  # (pictures,) of str, the features' files
    picture: np.ndarray  # (captions,) int32, each caption's picture
    tokens: np.ndarray  # (captions, longest) int32, padded with <pad>
    lengths: np.ndarray  # (captions,) int32


def encode_captions(
    examples: list[data_utils.Example], words: Tokenizer, cache: features.FeatureCache, max_length: int
) -> Captions:
    """Turns the captions of a split into arrays."""
    rows = [(i, words.encode(text, max_length)) for i, example in enumerate(examples) for text in example.captions]
    tokens = np.zeros((len(rows), max(len(ids) for _, ids in rows)), np.int32)
    for row, (_, ids) in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Captions(
        np.array([str(cache.path(example.image)) for example in examples]),
        np.array([i for i, _ in rows], np.int32),
        tokens,
        np.array([len(ids) for _, ids in rows], np.int32),
    )


def order_batches(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """An epoch's batches, each the indices of captions of similar length.

    Captions are shuffled, sorted by length inside windows of 50 batches, and the batches shuffled. What does
    not fill a batch comes last, of any lengths. The order depends on nothing but the arguments, which is how
    a stopped epoch can be continued at any batch.
    """
    dice = np.random.default_rng((seed, epoch))
    order = dice.permutation(len(lengths))
    full = len(order) // batch_size * batch_size
    batches = []
    for start in range(0, full, WINDOW * batch_size):
        window = order[start : min(start + WINDOW * batch_size, full)]
        window = window[np.argsort(lengths[window], kind="stable")]
        batches += np.split(window, len(window) // batch_size)
    batches = [batches[i] for i in dice.permutation(len(batches))]
    return batches + ([order[full:]] if full < len(order) else [])


def make_pipeline(captions: Captions, batches: list[np.ndarray], cache: features.FeatureCache) -> tf.data.Dataset:
    """Reads the batches' features from the cache, in parallel and ahead of the model.

    All batches but the last must be of one size. Yields features (B, 64, 2048) in the cache's dtype, and
    tokens (B, T) padded to the batch's longest caption.
    """

    def tokens():
        for batch in batches:
            yield captions.tokens[batch, : captions.lengths[batch].max()]

    paths = captions.paths[captions.picture[np.concatenate(batches)]]
    pictures = tf.data.Dataset.from_tensor_slices(paths).map(cache.read, num_parallel_calls=tf.data.AUTOTUNE)
    words = tf.data.Dataset.from_generator(tokens, output_signature=tf.TensorSpec((None, None), tf.int32))
    return tf.data.Dataset.zip(pictures.batch(len(batches[0])), words).prefetch(tf.data.AUTOTUNE)


def batch_signature(cache: features.FeatureCache) -> list[tf.TensorSpec]:
    """What `make_pipeline` yields, for functions compiled once for batches of all sizes and lengths."""
    pictures = tf.TensorSpec((None, features.LOCATIONS, features.CHANNELS), cache.dtype)
    return [pictures, tf.TensorSpec((None, None), tf.int32)]
