"""Draws words at random, by their probability: temperature and top-p (Holtzman et al. 2020, section 3.1).

The random numbers of an image come from a seed and from the image, so that its captions do not depend on which other
images are in the batch. In the comments R is the number of captions and V the vocabulary size.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from captioning.base.quiet_tensorflow import tf


def image_keys(images: Iterable[np.ndarray]) -> list[int]:
    """Returns a number for the content of each image, from its pixels or its features."""
    return [zlib.crc32(np.ascontiguousarray(image).tobytes()) for image in images]


def random_numbers(seed: int, keys: Sequence[int], num_captions: int, num_words: int) -> np.ndarray:
    """Draws a number for every word of N captions, of T words, of B images, whose `image_keys` are given.

    Returns:
        (B * N, T) float32, from 0 inclusive to 1 exclusive; the captions of an image are consecutive rows, of which the
        first ones are the same for any N.
    """
    rows = [np.random.default_rng([seed, key]).random((num_captions, num_words), np.float32) for key in keys]
    return np.concatenate(rows) if rows else np.zeros((0, num_words), np.float32)


def draw(log_probs: tf.Tensor, numbers: tf.Tensor, temperature: float, top_p: float) -> tf.Tensor:
    """Draws a word of each of R captions.

    Args:
        log_probs: (R, V), log p of the words.
        numbers: (R,), uniform from 0 to 1. The word is the one at which the cumulative probability of the words, most
            probable first, passes this share of its largest value.
        temperature: log p is divided by it.
        top_p: only the most probable words are drawn that together have at least this probability.

    Returns:
        (R,) int32, the ids.
    """
    probabilities, ids = tf.math.top_k(tf.nn.softmax(log_probs / temperature), log_probs.shape[1])  # (R, V), sorted
    cumulative = tf.cumsum(probabilities, axis=1)
    total = cumulative[:, -1:]  # (R, 1), 1 but for rounding
    # The probability of the words that are kept: the smallest cumulative one that reaches top_p.
    kept = tf.reduce_min(tf.where(cumulative >= tf.minimum(top_p, total), cumulative, total), axis=1, keepdims=True)
    # The product is smaller than `kept`, also when it is rounded: float32 below 1 differ from 1 by at least 2 ** -24.
    rank = tf.math.count_nonzero(cumulative <= numbers[:, tf.newaxis] * kept, axis=1)  # (R,)
    return tf.gather(ids, rank, batch_dims=1)
