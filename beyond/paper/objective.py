"""What the paper adds to the cross-entropy: doubly stochastic attention, and REINFORCE for hard attention.

In the comments B is the number of captions, T the number of steps, N the number of words to predict, rows of the
decoder's packed outputs, and L the number of locations. Log-probabilities are in nats.
"""

import dataclasses
from typing import Any

from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import PAD_ID
from captioning.config.options import Settings, option
from captioning.config.run_config import RunConfig
from captioning.decoder.losses import label_smoothing_term, loss_function
from captioning.training.input_pipeline import Batch
from captioning.training.objective import CrossEntropy, StepSums

EPSILON = 1e-20  # the smallest weight whose logarithm is taken
BASELINE_DECAY = 0.9  # of the baseline of REINFORCE


@dataclasses.dataclass(frozen=True)
class PaperConfig(Settings):
    """The weights of what is added to the cross-entropy."""

    doubly_stochastic: float = option(
        0.0, "weight of the penalty on uneven attention (Xu et al. 2015, section 4.2.1)", bounds="[0, inf)"
    )
    reinforce_weight: float = option(0.1, "weight of the REINFORCE term of hard attention", bounds="[0, inf)")
    entropy_weight: float = option(0.002, "weight of the attention's entropy in hard attention", bounds="[0, inf)")


class PaperObjective(CrossEntropy):
    """Cross-entropy with the paper's terms: the penalty for any attention, the others for hard attention."""

    def __init__(self, config: RunConfig):
        super().__init__(config.train)
        self.paper = PaperConfig.from_json(config.objective)
        self.is_hard = config.model.attention == "hard"
        self.baseline = tf.Variable(0.0)  # moving average of a word's log p, for REINFORCE

    def loss(self, model: tf.keras.Model, prepared: Any) -> tuple[tf.Tensor, StepSums]:
        """Computes the loss of a batch; see `CrossEntropy.loss`."""
        batch: Batch = prepared
        outputs = model(batch.features, batch.tokens, batch.image_index, training=True, order=batch.order)
        word_losses, mask = loss_function(outputs.logits, outputs.targets)  # (N,)
        sample_mask = tf.zeros_like(mask)
        if self.is_hard:
            sample_mask = mask * tf.cast(outputs.is_sampled[:, 0], tf.float32)  # (N,)
        # log p of the words whose location was sampled, and how many words these are.
        sampled = tf.reduce_sum(-word_losses * sample_mask), tf.reduce_sum(sample_mask)
        sums = StepSums(tf.reduce_sum(word_losses), tf.reduce_sum(mask), sampled)
        total = sums.loss
        if self.config.label_smoothing:
            total += self.config.label_smoothing * label_smoothing_term(outputs.logits, outputs.targets, mask)
        if self.paper.doubly_stochastic:
            penalty = doubly_stochastic_term(outputs.attention_weights, mask, outputs.positions, batch.tokens)
            total += self.paper.doubly_stochastic * penalty
        if self.is_hard:
            returns = sum_later_words((-word_losses - self.baseline) * mask, outputs.positions, batch.tokens)
            reinforce, entropy = reinforce_terms(outputs, returns, sample_mask, mask)
            total += self.paper.reinforce_weight * reinforce - self.paper.entropy_weight * entropy
        return total / tf.maximum(sums.num_tokens, 1), sums

    def update(self, sums: StepSums) -> None:
        """Moves the baseline towards the mean log p of the sampled words of a step (section 4.1)."""
        # After the gradient, since a baseline must not depend on its samples. Without any it stays.
        log_prob, num_words = sums.others
        change = (1 - BASELINE_DECAY) * (log_prob / tf.maximum(num_words, 1) - self.baseline)
        self.baseline.assign_add(tf.where(num_words > 0, change, 0.0))


def doubly_stochastic_term(
    attention_weights: tf.Tensor, mask: tf.Tensor, positions: tf.Tensor, tokens: tf.Tensor
) -> tf.Tensor:
    """Computes the sum over captions and locations of (1 - sum over steps of weight)^2 (section 4.2.1).

    Attention weights (N, L) sum to 1 over the locations; this asks that those of a location sum to 1 over the steps.
    """
    weights = tf.cast(attention_weights, tf.float32) * mask[:, tf.newaxis]  # (N, L)
    sums = tf.math.unsorted_segment_sum(weights, positions[:, 0], tf.shape(tokens)[0])  # (B, L)
    has_words = tf.reduce_any(tokens != PAD_ID, axis=1, keepdims=True)  # (B, 1), False of captions that fill a batch
    return tf.reduce_sum((1 - sums) ** 2 * tf.cast(has_words, tf.float32))


def sum_later_words(values: tf.Tensor, positions: tf.Tensor, tokens: tf.Tensor) -> tf.Tensor:
    """Sums values (N,) of the words over each word and those after it in its caption: (N,)."""
    by_caption = tf.scatter_nd(positions, values, tf.shape(tokens))  # (B, T + 1)
    return tf.gather_nd(tf.cumsum(by_caption, axis=1, reverse=True), positions)


def reinforce_terms(
    outputs: Any, returns: tf.Tensor, sample_mask: tf.Tensor, mask: tf.Tensor
) -> tuple[tf.Tensor, tf.Tensor]:
    """Computes what hard attention adds to the cross-entropy (section 4.1).

    A sampled location has no gradient, so the cross-entropy does not teach the attention where to attend. The first
    term's gradient is REINFORCE's estimate of what is missing, -(log p(y | s) - b) d log p(s), of the variational
    bound sum_s p(s) log p(y | s). A location affects its own word and those after it, so only their log-probability
    counts; leaving out earlier words changes the variance, not the mean.

    Args:
        outputs: the `HardOutput`.
        returns: (N,), log p of each word and those after it, less a baseline that does not depend on the samples.
        sample_mask: (N,), 1 for words whose location was sampled; the others need no estimate.
        mask: (N,), 1 for words and 0 for padding.

    Returns:
        The REINFORCE term, of which only the gradient has a meaning; and the entropy of the attention weights.
    """
    weights = tf.cast(outputs.attention_weights, tf.float32)
    log_weights = tf.math.log(tf.maximum(weights, EPSILON))  # (N, L)
    samples = tf.stop_gradient(tf.cast(outputs.location_weights, tf.float32))
    sampled_log_prob = tf.reduce_sum(samples * log_weights, axis=1)  # (N,)
    entropy = -tf.reduce_sum(weights * log_weights, axis=1)  # (N,)
    reinforce = -tf.reduce_sum(tf.stop_gradient(returns) * sampled_log_prob * sample_mask)
    return reinforce, tf.reduce_sum(entropy * mask)
