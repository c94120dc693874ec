"""The loss of captioning: the cross-entropy of the words, without padding.

In the comments N is the number of words to predict in a batch, rows of the decoder's packed outputs, and V the size of
the vocabulary. Log-probabilities are in nats.
"""

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import PAD_ID
from captioning.decoder.fused_loss import cross_entropy


def loss_function(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the cross-entropy of logits (N, V) and the true tokens (N,).

    The tutorial averages over padding, too, which makes its loss depend on the longest caption of the batch. Here the
    mask is returned, so that a mean can be taken over words.

    Returns:
        The losses, 0 at padding; and the mask, 1 for words and 0 for padding. Both (N,) float32.
    """
    mask = tf.cast(targets != PAD_ID, tf.float32)
    loss = cross_entropy(tf.cast(logits, tf.float32), targets)  # sparse_softmax_cross_entropy_with_logits
    return loss * mask, mask


def label_smoothing_term(logits: tf.Tensor, targets: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Sums what label smoothing adds to the cross-entropy, per unit of smoothing (Szegedy et al. 2015, section 7).

    The cross-entropy with (1 - s) of the target on the true word and s spread evenly over all words is the plain
    cross-entropy plus s * (logit of the true word - mean logit).
    """
    logits = tf.cast(logits, tf.float32)
    target_logits = tf.gather(logits, targets, batch_dims=1)  # (N,)
    return tf.reduce_sum((target_logits - tf.reduce_mean(logits, axis=1)) * mask)
