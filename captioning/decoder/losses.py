"""Training losses: masked cross-entropy, two regularisers, and the REINFORCE terms of hard attention.

In the comments B is the number of captions, T that of steps, N the rows of the decoder's packed outputs, L the
locations, V the size of the vocabulary. Functions return sums over the batch unless they say (N,); padding is masked.
Log-probabilities are in nats.
"""

from typing import Any, NamedTuple

from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import PAD_ID
from captioning.config.settings import TrainConfig

EPSILON = 1e-20  # the smallest weight or probability whose logarithm is taken


class StepSums(NamedTuple):
    """Sums over a batch, float32 scalars."""

    loss: tf.Tensor  # the cross-entropy of all words, in nats; or the negative rewards of samples
    num_tokens: tf.Tensor  # or the number of samples
    sampled_log_prob: tf.Tensor  # log p of the words whose location was sampled (hard attention)
    num_sampled: tf.Tensor


def mean_loss(
    outputs: Any, tokens: tf.Tensor, config: TrainConfig, baseline: tf.Tensor | None
) -> tuple[tf.Tensor, StepSums]:
    """Computes what a training step minimises, and what it reports.

    Args:
        outputs: the model's `TeacherForcingOutput`.
        tokens: (B, T + 1), the captions.
        config: which terms are added to the cross-entropy, with their weights.
        baseline: of hard attention, see `reinforce_terms`; None for soft attention.

    Returns:
        The loss, a mean over the words of the batch; and sums.
    """
    word_losses, mask = masked_cross_entropy(outputs.logits, outputs.targets)  # (N,)
    sample_mask = mask * tf.cast(outputs.is_sampled[:, 0], tf.float32)  # (N,)
    sums = StepSums(
        loss=tf.reduce_sum(word_losses),
        num_tokens=tf.reduce_sum(mask),
        sampled_log_prob=tf.reduce_sum(-word_losses * sample_mask),
        num_sampled=tf.reduce_sum(sample_mask),
    )
    objective = sums.loss
    if config.label_smoothing:
        objective += config.label_smoothing * label_smoothing_term(outputs.logits, outputs.targets, mask)
    if config.doubly_stochastic:
        penalty = doubly_stochastic_term(outputs.attention_weights, mask, outputs.positions, tokens)
        objective += config.doubly_stochastic * penalty
    if baseline is not None:
        weights, samples = outputs.attention_weights, outputs.location_weights
        place = baseline, outputs.positions, tokens
        reinforce_loss, entropy = reinforce_terms(weights, samples, sample_mask, word_losses, mask, *place)
        objective += config.reinforce_weight * reinforce_loss - config.entropy_weight * entropy
    return objective / tf.maximum(sums.num_tokens, 1), sums


def masked_cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes the cross-entropy of each row, the tutorial's `loss_function`.

    The tutorial averages over padding too, which makes its loss depend on the longest caption of the batch.

    Args:
        logits: (N, V).
        targets: (N,), the true tokens.

    Returns:
        The losses, 0 at padding; and the mask, 1 for words and 0 for padding. Both (N,) float32.
    """
    mask = tf.cast(targets != PAD_ID, tf.float32)
    return cross_entropy(tf.cast(logits, tf.float32), targets) * mask, mask


def cross_entropy(logits: tf.Tensor, targets: tf.Tensor) -> tf.Tensor:
    """Computes the same as `tf.nn.sparse_softmax_cross_entropy_with_logits`, in half its time on a CPU: (N,)."""
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
        is_stable = tf.reduce_all(target_probs > EPSILON)
        losses = tf.cond(is_stable, lambda: -tf.math.log(target_probs), stable_losses)

        def gradient(d_losses: tf.Tensor) -> tf.Tensor:
            return tf.tensor_scatter_nd_sub(probabilities * d_losses[:, tf.newaxis], row_target, d_losses)

        return losses, gradient

    return compute(logits)


def label_smoothing_term(logits: tf.Tensor, targets: tf.Tensor, mask: tf.Tensor) -> tf.Tensor:
    """Computes what label smoothing adds to the cross-entropy, per unit of smoothing (Szegedy et al. 2015, section 7).

    The cross-entropy with (1 - s) of the target on the true word and s spread evenly over all words is the plain
    cross-entropy plus s * (logit of the true word - mean logit).
    """
    logits = tf.cast(logits, tf.float32)
    target_logits = tf.gather(logits, targets, batch_dims=1)  # (N,)
    return tf.reduce_sum((target_logits - tf.reduce_mean(logits, axis=1)) * mask)


def doubly_stochastic_term(
    attention_weights: tf.Tensor, mask: tf.Tensor, positions: tf.Tensor, tokens: tf.Tensor
) -> tf.Tensor:
    """Computes the sum over captions and locations of (1 - sum over steps of weight)^2 (Xu et al. 2015, 4.2.1).

    The weights of a step sum to 1 over the locations; this asks that those of a location sum to 1 over the steps.
    """
    weights = tf.cast(attention_weights, tf.float32) * mask[:, tf.newaxis]  # (N, L)
    sums = tf.math.unsorted_segment_sum(weights, positions[:, 0], tf.shape(tokens)[0])  # (B, L)
    has_words = tf.reduce_any(tokens != PAD_ID, axis=1, keepdims=True)  # (B, 1), False of captions that fill a batch
    return tf.reduce_sum((1 - sums) ** 2 * tf.cast(has_words, tf.float32))


def reinforce_terms(
    attention_weights: tf.Tensor,
    location_weights: tf.Tensor,
    sample_mask: tf.Tensor,
    losses: tf.Tensor,
    mask: tf.Tensor,
    baseline: tf.Tensor,
    positions: tf.Tensor,
    tokens: tf.Tensor,
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes what hard attention adds to the cross-entropy (Xu et al. 2015, section 4.1).

    A sampled location has no gradient, so the cross-entropy does not teach the attention where to attend. The first
    term's gradient is REINFORCE's estimate of what is missing, -(log p(y | s) - b) d log p(s), of the variational
    bound sum_s p(s) log p(y | s). A location affects its own word and those after it, so only their log-probability
    counts; leaving out earlier words changes the variance, not the mean.

    Args:
        attention_weights: (N, L).
        location_weights: (N, L), one-hot where the location was sampled.
        sample_mask: (N,), 1 for words whose location was sampled; the others need no estimate.
        losses: (N,), -log p of every word.
        mask: (N,), 1 for words.
        baseline: b for one word, which must not depend on the samples.
        positions: (N, 2), (caption, step) of each row.
        tokens: (B, T + 1), the captions.

    Returns:
        The REINFORCE term, of which only the gradient has a meaning; and the entropy of the attention weights.
    """
    weights = tf.cast(attention_weights, tf.float32)
    log_weights = tf.math.log(tf.maximum(weights, EPSILON))  # (N, L)
    samples = tf.stop_gradient(tf.cast(location_weights, tf.float32))
    sampled_log_prob = tf.reduce_sum(samples * log_weights, axis=1)  # (N,)
    by_caption = tf.scatter_nd(positions, (-losses - baseline) * mask, tf.shape(tokens))  # (B, T + 1)
    advantage = tf.gather_nd(tf.cumsum(by_caption, axis=1, reverse=True), positions)  # (N,), of a word and later ones
    entropy = -tf.reduce_sum(weights * log_weights, axis=1)  # (N,)
    reinforce = -tf.reduce_sum(tf.stop_gradient(advantage) * sampled_log_prob * sample_mask)
    return reinforce, tf.reduce_sum(entropy * mask)
