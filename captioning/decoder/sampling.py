"""Draws words at random, by their probability: temperature and top-p (Holtzman et al. 2020, section 3.1).

The random numbers of an image come from a seed and from the image, so that its captions do not depend on which other
images are in the batch. In the comments R is the number of captions and V the vocabulary size.
"""

import zlib
from collections.abc import Iterable, Sequence

import numpy as np

from captioning.base.quiet_tensorflow import tf

BLOCK = 64  # words


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
        numbers: (R,), uniform from 0 to 1. The word is the one at which the cumulative probability of the words, with a
            top_p below 1 the most probable ones first, passes this share of its largest value.
        temperature: log p is divided by it.
        top_p: only the most probable words are drawn that together have at least this probability.

    Returns:
        (R,) int64, the ids.
    """
    probabilities = tf.nn.softmax(log_probs / temperature)  # (R, V)

    def of_most_probable() -> tf.Tensor:
        largest, ids = tf.math.top_k(probabilities, log_probs.shape[1])  # (R, V), sorted, which takes 20 times as long
        before = tf.cumsum(largest, axis=1, exclusive=True)  # (R, V)
        rank = pick(tf.where(before < top_p, largest, 0.0), numbers)  # (R,)
        return tf.cast(tf.gather(ids, rank, batch_dims=1), tf.int64)

    return tf.cond(tf.convert_to_tensor(top_p) < 1.0, of_most_probable, lambda: pick(probabilities, numbers))


def pick(probabilities: tf.Tensor, numbers: tf.Tensor) -> tf.Tensor:
    """Returns the words at which the cumulative probabilities pass a share of their sum, (R,) int64.

    A word of probability 0 is never returned.

    Args:
        probabilities: (R, V), whose sums need not be 1.
        numbers: (R,), the shares, from 0 inclusive to 1 exclusive.
    """
    # First the block of words is found, then the word within it: long cumulative sums are slow.
    num_words = probabilities.shape[1]
    num_blocks = -(-num_words // BLOCK)
    blocks = tf.pad(probabilities, [[0, 0], [0, num_blocks * BLOCK - num_words]])
    blocks = tf.reshape(blocks, [-1, num_blocks, BLOCK])
    ends = tf.cumsum(tf.reduce_sum(blocks, axis=2), axis=1)  # (R, blocks)
    # Smaller than the last end, also when it is rounded: float32 below 1 differ from 1 by at least 2 ** -24.
    target = numbers[:, tf.newaxis] * ends[:, -1:]  # (R, 1)
    block = tf.math.count_nonzero(ends <= target, axis=1)  # (R,)
    start = tf.gather(tf.pad(ends, [[0, 0], [1, 0]]), block, batch_dims=1)  # (R,)
    cumulative = tf.cumsum(tf.gather(blocks, block, batch_dims=1), axis=1)  # (R, BLOCK)
    # Their last sum may be rounded to less than the target: then it is the last word that adds to it.
    passed = (cumulative <= target - start[:, tf.newaxis]) & (cumulative < cumulative[:, -1:])
    return block * BLOCK + tf.math.count_nonzero(passed, axis=1)
