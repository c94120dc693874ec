"""What a caption may not contain: the special tokens, an early end, and repetitions.

In the comments R is the number of captions, t the number of words so far and V the vocabulary size.
"""

from typing import NamedTuple

import numpy as np

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID, UNK_ID


class Constraints(NamedTuple):
    """Rules for captions beyond the special tokens; the defaults are none."""

    min_words: int = 0  # words before which no caption ends
    no_repeat: bool = False  # no word twice in a row, and no three words twice


def forbidden_tokens(vocab_size: int) -> tf.Tensor:
    """Returns a mask (V,) of the tokens that no caption may contain: <pad>, <unk> and <start>."""
    one_hot = tf.one_hot([PAD_ID, UNK_ID, START_ID], vocab_size, on_value=True, off_value=False)  # (3, V)
    return tf.reduce_any(one_hot, axis=0)


def constrain(log_probs: tf.Tensor, history: tf.Tensor, constraints: Constraints) -> tf.Tensor:
    """Sets log p (R, V) of the words that may not come after a history (R, t) of words to -inf.

    What remains keeps its log p: probabilities stay the model's own. A caption that could go on with no word at all may
    end, whatever `min_words` is.
    """
    if not (constraints.no_repeat or constraints.min_words):
        return log_probs
    is_end = tf.one_hot(END_ID, log_probs.shape[1], on_value=True, off_value=False)  # (V,)
    allowed = log_probs
    if constraints.no_repeat:
        allowed = _forbid(allowed, history[:, -1:], tf.ones_like(history[:, -1:], tf.bool))
        allowed = _forbid(allowed, *_ends_of_trigrams(history))
    if constraints.min_words:
        allowed = tf.where(is_end & (tf.shape(history)[1] < constraints.min_words), -np.inf, allowed)
    is_stuck = tf.reduce_all(allowed == -np.inf, axis=1, keepdims=True)  # (R, 1)
    return tf.where(is_stuck & is_end, log_probs, allowed)


def _ends_of_trigrams(history: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Returns the third words of all trigrams, (R, max(0, t - 2)), and which of them followed the last two words."""
    first, second, third = history[:, :-2], history[:, 1:-1], history[:, 2:]
    return third, (first == history[:, -2:-1]) & (second == history[:, -1:])


def _forbid(log_probs: tf.Tensor, tokens: tf.Tensor, is_forbidden: tf.Tensor) -> tf.Tensor:
    """Sets log p (R, V) of tokens (R, n) to -inf where `is_forbidden` (R, n) says so."""
    num_rows = tf.shape(tokens, tokens.dtype)[0]
    rows = tf.repeat(tf.range(num_rows)[:, tf.newaxis], tf.shape(tokens)[1], axis=1)  # (R, n)
    values = tf.where(is_forbidden, -np.inf, np.inf)  # (R, n)
    return tf.tensor_scatter_nd_min(log_probs, tf.stack([rows, tokens], axis=2), tf.cast(values, log_probs.dtype))
