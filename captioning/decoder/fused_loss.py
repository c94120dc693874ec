"""Softmax cross-entropy with a hand-written gradient, in half the time of TensorFlow's on a CPU.

TensorFlow's own subtracts, exponentiates and sums the logits in more passes over them than are needed.
"""

from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf

MIN_PROBABILITY = 1e-20  # the smallest one whose logarithm is taken


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Computes `tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)` of logits (N, V) float32: (N,)."""
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
