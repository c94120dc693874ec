"""The loss of captioning: the cross-entropy of the words, without padding.

In the comments N is the number of words to predict in a batch, rows of the decoder's packed outputs, and V the size of
the vocabulary. Log-probabilities are in nats.
"""

from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import PAD_ID

MIN_PROBABILITY = 1e-20  # the smallest one whose logarithm is taken


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Computes `tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)`, on a CPU in half the time.

    Its gradient is written by hand, so that the softmax of the logits (N, V) float32 is computed only once. TensorFlow
    also subtracts, exponentiates and sums the logits in more passes over them than are needed.
    """
    if has_gpu():
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)
    row_target = tf.stack([tf.range(tf.size(targets)), targets], axis=1)  # (N, 2)

    @tf.custom_gradient
    def compute(logits: tf.Tensor):
        probabilities = tf.nn.softmax(logits)  # (N, V)
        target_probs = tf.gather_nd(probabilities, row_target)  # (N,)

        def stable_losses() -> tf.Tensor:
            """Subtracts logits, since a probability may be too small for a logarithm."""
            log_sum = tf.reduce_max(logits, axis=1) - tf.math.log(tf.reduce_max(probabilities, axis=1))
            return log_sum - tf.gather_nd(logits, row_target)

        # Two more passes over all logits, and hardly ever needed.
        is_stable = tf.reduce_all(target_probs > MIN_PROBABILITY)
        losses = tf.cond(is_stable, lambda: -tf.math.log(target_probs), stable_losses)

        def gradient(d_losses: tf.Tensor) -> tf.Tensor:
            # d loss / d logits = probabilities - one_hot(target)
            return tf.tensor_scatter_nd_sub(probabilities * d_losses[:, tf.newaxis], row_target, d_losses)

        return losses, gradient

    return compute(logits)


def loss_function(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the cross-entropy of logits (N, V) and the true tokens (N,).

    The tutorial averages over padding, too, which makes its loss depend on the longest caption of the batch. Here the
    mask is returned, so that a mean can be taken over words.

    Returns:
        The losses, 0 at padding; and the mask, 1 for words and 0 for padding. Both (N,) float32.
    """
    mask = tf.cast(targets != PAD_ID, tf.float32)
    loss = cross_entropy(tf.cast(logits, tf.float32), targets)
    return loss * mask, mask


def label_smoothing_term(logits: tf.Tensor, targets: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Sums what label smoothing adds to the cross-entropy, per unit of smoothing (Szegedy et al. 2015, section 7).

    The cross-entropy with (1 - s) of the target on the true word and s spread evenly over all words is the plain
    cross-entropy plus s * (logit of the true word - mean logit).
    """
    logits = tf.cast(logits, tf.float32)
    target_logits = tf.gather(logits, targets, batch_dims=1)  # (N,)
    return tf.reduce_sum((target_logits - tf.reduce_mean(logits, axis=1)) * mask)
