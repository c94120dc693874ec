"""What the training makes small: cross-entropy, the regularisers, and the bound of hard attention.

In the comments B is the batch size, T the number of tokens, N the words, in the rows of `model.Taught`, and L the
64 locations. What is not given by word is the sum over a batch; padding counts for nothing. Likelihoods are in nats.
"""

import tensorflow as tf

from model import Taught

TINY = 1e-20  # no logarithm is taken of smaller weights; smaller probabilities of words go by their logits


def next_words(tokens: tf.Tensor, taught: Taught) -> tf.Tensor:
    """The true words that the rows of `taught` should have said: from the batch's tokens (B, T), (N,)."""
    return tf.gather_nd(tokens, taught.place + tf.constant([0, 1]))


def word_losses(taught: Taught, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """The cross-entropy of every word, and which words are real; <pad> (id 0) counts for nothing.

    The tutorial averages over padding too, so there the loss depends on the longest caption of the batch.

    Args:
        taught: what teacher forcing found.
        targets: (N,), the true next words.

    Returns:
        Losses in nats, 0 at padding, and 1 for real words, 0 for padding: both (N,) in float32.
    """
    real = tf.cast(targets != 0, tf.float32)
    return cross_entropy(tf.cast(taught.logits, tf.float32), taught.beginning, targets) * real, real


def cross_entropy(logits: tf.Tensor, rows: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """As `tf.nn.sparse_softmax_cross_entropy_with_logits` of the rows, whose CPU code takes twice as long.

    Args:
        logits: (rows, V).
        rows: (N,), the logits of every target.
        targets: (N,).

    Returns:
        (N,).
    """
    true = tf.stack([rows, targets], axis=1)

    @tf.custom_gradient
    def run(logits: tf.Tensor):
        probabilities = tf.nn.softmax(logits)
        found = tf.gather_nd(probabilities, true)

        def of_unlikely() -> tf.Tensor:
            """With the logarithm of the sum of exponentials, from the likeliest word: its probability is never 0."""
            log_sum = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
            return tf.gather(log_sum, rows) - tf.gather_nd(logits, true)

        # Two passes over all logits, and hardly ever needed.
        losses = tf.cond(tf.reduce_all(found > TINY), lambda: -tf.math.log(found), of_unlikely)

        def gradient(to_losses: tf.Tensor) -> tf.Tensor:
            to_rows = tf.math.unsorted_segment_sum(to_losses, rows, tf.shape(logits)[0])
            return tf.tensor_scatter_nd_sub(probabilities * to_rows[:, tf.newaxis], true, to_losses)

        return losses, gradient

    return run(logits)


def smoothing_penalty(taught: Taught, targets: tf.Tensor, real: tf.Tensor) -> tf.Tensor:
    """What label smoothing adds to the cross-entropy, for each unit of its share (Szegedy et al. 2015, section 7).

    The cross-entropy with (1 - share) of the target on the true word, and `share` spread evenly over all words,
    is the plain one plus share * (logit of the true word - mean logit).
    """
    logits = tf.cast(taught.logits, tf.float32)
    true = tf.gather_nd(logits, tf.stack([taught.beginning, targets], axis=1))  # (N,)
    return tf.reduce_sum((true - tf.gather(tf.reduce_mean(logits, axis=1), taught.beginning)) * real)


def doubly_stochastic_penalty(taught: Taught, real: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """How unevenly a caption looks at its picture: the sum over locations of (1 - sum over words of weight)^2.

    The weights of a word sum to 1 over the locations; this asks that those of a location do over the words.
    (Xu et al. 2015, section 4.2.1.)
    """
    weights = tf.cast(taught.weights, tf.float32) * real[:, tf.newaxis]
    seen = tf.math.unsorted_segment_sum(weights, taught.place[:, 0], tf.shape(tokens)[0])  # (B, L)
    captions = tf.cast(tf.reduce_any(tokens != 0, axis=1, keepdims=True), tf.float32)  # others are padding
    return tf.reduce_sum((1 - seen) ** 2 * captions)


def hard_attention_terms(
    taught: Taught, losses: tf.Tensor, real: tf.Tensor, baseline: tf.Tensor, tokens: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """What hard attention adds to the cross-entropy (Xu et al. 2015, section 4.1).

    The cross-entropy, given where the model looked, does not tell the attention where to look: the drawn
    location has no gradient. The first term's gradient is -(log p(y | s) - b) d log p(s), REINFORCE's estimate
    of what it lacks to the gradient of the variational bound sum_s p(s) log p(y | s). A location bears on its
    word and on those after it, so only their likelihood counts for it; leaving out the others changes
    the variance, not the mean. Captions that got the expectation need no estimate.

    Args:
        taught: what teacher forcing found.
        losses: (N,), -log p of every word.
        real: (N,), 1 for real words.
        baseline: b for one word, which may not depend on the draws.
        tokens: (B, T), the batch's.

    Returns:
        The term for the locations, whose value means nothing; and the entropy of the weights.
    """
    weights = tf.cast(taught.weights, tf.float32)
    log_weights = tf.math.log(tf.maximum(weights, TINY))  # (N, L)
    drawn = tf.reduce_sum(tf.stop_gradient(tf.cast(taught.looks, tf.float32)) * log_weights, axis=1)  # (N,)
    by_caption = tf.scatter_nd(taught.place, (-losses - baseline) * real, tf.shape(tokens))  # (B, T)
    # (N,), how much better a word and those after it are than the baseline expects.
    better = tf.gather_nd(tf.cumsum(by_caption, axis=1, reverse=True), taught.place)
    counted = real * tf.cast(taught.sampled[:, 0], tf.float32)  # (N,)
    entropy = -tf.reduce_sum(weights * log_weights, axis=1)  # (N,)
    return -tf.reduce_sum(tf.stop_gradient(better) * drawn * counted), tf.reduce_sum(entropy * real)
