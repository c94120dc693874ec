"""What the training makes small: cross-entropy, the regularisers, and the bound of hard attention.

In the comments B is the batch size, T the number of tokens, L the 64 locations. All functions but the first
return the sum over a batch, in nats; padding counts for nothing.
"""

import tensorflow as tf

from model import Taught

TINY = 1e-20  # the logarithm of a weight of zero must be a number


def word_losses(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The cross-entropy of every word, and which words are real; <pad> (id 0) counts for nothing.

    The tutorial averages over padding too, so there the loss depends on the longest caption of the batch.

    Args:
        logits: (B, T, vocabulary).
        targets: (B, T), the true next words.

    Returns:
        Losses in nats, 0 at padding, and 1 for real words, 0 for padding: both (B, T) in float32.
    """
    real = tf.cast(targets != 0, tf.float32)
    losses = tf.nn.sparse_softmax_cross_entropy_with_logits(targets, tf.cast(logits, tf.float32))  # (B, T)
    return losses * real, real


def smoothing_penalty(logits: tf.Tensor, targets: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """What label smoothing adds to the cross-entropy, for each unit of its share (Szegedy et al. 2015, section 7).

    The cross-entropy with (1 - share) of the target on the true word, and `share` spread evenly over all words,
    is the plain one plus share * (logit of the true word - mean logit).
    """
    logits = tf.cast(logits, tf.float32)
    true = tf.gather(logits, targets, batch_dims=2)  # (B, T)
    return tf.reduce_sum((true - tf.reduce_mean(logits, axis=2)) * real)


def doubly_stochastic_penalty(weights: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """How unevenly a caption looks at its picture: the sum over locations of (1 - sum over words of weight)^2.

    The weights of a word sum to 1 over the locations; this asks that those of a location do over the words.
    (Xu et al. 2015, section 4.2.1.)
    """
    seen = tf.einsum("btl,bt->bl", tf.cast(weights, tf.float32), real)  # (B, L)
    return tf.reduce_sum((1 - seen) ** 2)


def hard_attention_terms(
    taught: Taught, losses: tf.Tensor, real: tf.Tensor, baseline: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """What hard attention adds to the cross-entropy (Xu et al. 2015, section 4.1).

    The cross-entropy, given where the model looked, does not tell the attention where to look: the drawn
    location has no gradient. The first term's gradient is -(log p(y | s) - b) d log p(s), REINFORCE's estimate
    of what it lacks to the gradient of the variational bound sum_s p(s) log p(y | s). A location bears on its
    word and on those after it, so only their likelihood counts for it; leaving out the others changes
    the variance, not the mean. Captions that got the expectation need no estimate.

    Args:
        taught: what teacher forcing found.
        losses: (B, T), -log p of every word.
        real: (B, T), 1 for real words.
        baseline: b for one word, which may not depend on the draws.

    Returns:
        The term for the locations, whose value means nothing; and the entropy of the weights.
    """
    weights = tf.cast(taught.weights, tf.float32)
    log_weights = tf.math.log(tf.maximum(weights, TINY))  # (B, T, L)
    drawn = tf.reduce_sum(tf.stop_gradient(tf.cast(taught.looks, tf.float32)) * log_weights, axis=2)  # (B, T)
    better = tf.cumsum((-losses - baseline) * real, axis=1, reverse=True)  # (B, T), than the baseline expects
    counted = real * tf.cast(taught.sampled, tf.float32)  # (B, T)
    entropy = -tf.reduce_sum(weights * log_weights, axis=2)  # (B, T)
    return -tf.reduce_sum(tf.stop_gradient(better) * drawn * counted), tf.reduce_sum(entropy * real)
