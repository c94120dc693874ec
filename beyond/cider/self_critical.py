"""Self-critical training: captions are sampled, and those that score better than others become more probable.

Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning"; with the baseline of Luo 2020, "A Better
Variant of Self-Critical Sequence Training". The gradient of the mean reward of sampled captions is
E[(r - b) d log p(caption)] (REINFORCE), for any baseline b that does not depend on the caption. In the comments I is
the number of images of a batch, S that of samples of each, R = I * S, and T the number of steps.
"""

from typing import NamedTuple

from beyond.cider.rewards import Reward
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import TrainConfig
from captioning.decoder.constraints import forbidden_tokens
from captioning.decoder.decoding import StepModel, generate, greedy_search, repeat_images
from captioning.decoder.losses import StepSums, masked_cross_entropy
from captioning.training.input_pipeline import Batch

FORBIDDEN_LOGIT = -1e9


class Samples(NamedTuple):
    """S captions of each of I images: R = I * S rows, those of an image in turn."""

    tokens: tf.Tensor  # (R, T) int32, padded with <pad>
    rewards: tf.Tensor  # (R,)
    advantages: tf.Tensor  # (R,), the rewards less their baselines


def sample_captions(
    model: StepModel, features: tf.Tensor, num_samples: int, max_words: int, seed: tf.Tensor
) -> tf.Tensor:
    """Draws captions of each image by their probability, word by word: (R, T) int32, the captions of an image in turn.

    Args:
        model: see `StepModel`.
        features: (I, L, 2048).
        num_samples: S.
        max_words: captions that have not ended by then are cut.
        seed: (2,), of the random numbers.
    """
    num_rows = num_samples * tf.shape(features)[0]
    images = repeat_images(model.encode(features), num_samples)
    numbers = tf.random.stateless_uniform((max_words, num_rows), seed)

    def random_word(log_probs: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        cumulative = tf.cumsum(tf.exp(log_probs), axis=1)  # (R, V)
        # The last sum is 1 but for rounding. A word of probability 0 never passes the number, which is below it.
        return tf.math.count_nonzero(cumulative <= numbers[t][:, tf.newaxis] * cumulative[:, -1:], axis=1)  # (R,)

    return generate(model, images, random_word, max_words).tokens


def advantages(rewards: tf.Tensor, num_samples: int, greedy_rewards: tf.Tensor | None = None) -> tf.Tensor:
    """Subtracts from each reward (R,) its baseline.

    It is the reward of the image's greedy caption, (I,), if given (Rennie et al. 2017, section 3.2); otherwise the mean
    reward of the image's other samples (Luo 2020, equation 6).
    """
    by_image = tf.reshape(rewards, (-1, num_samples))  # (I, S)
    if greedy_rewards is not None:
        return tf.reshape(by_image - greedy_rewards[:, tf.newaxis], [-1])
    others = (tf.reduce_sum(by_image, axis=1, keepdims=True) - by_image) / (num_samples - 1)
    return tf.reshape(by_image - others, [-1])


def draw_samples(model: StepModel, batch: Batch, config: TrainConfig, reward: Reward, step: tf.Tensor) -> Samples:
    """Samples captions of the images of a batch, without dropout, and scores them.

    Args:
        model: the caption model.
        batch: the images and their numbers.
        config: the settings of the training.
        reward: scores captions by the numbers of their images.
        step: the number of the training step, with which every replica draws other captions, and a resumed run the
            same.
    """
    max_words = config.max_length - 1
    replica = tf.distribute.get_replica_context()
    draw = tf.cast(step, tf.int64) * replica.num_replicas_in_sync
    seed = tf.stack([tf.constant(config.seed, tf.int64), draw + tf.cast(replica.replica_id_in_sync_group, tf.int64)])
    tokens = sample_captions(model, batch.features, config.samples, max_words, seed)  # (R, T)
    numbers = tf.repeat(batch.images, config.samples)  # (R,)
    rewards = tf.ensure_shape(tf.numpy_function(reward, [tokens, numbers], tf.float32), [None])
    greedy_rewards = None
    if config.baseline == "greedy":
        greedy = greedy_search(model, batch.features, max_words).tokens
        greedy_rewards = tf.numpy_function(reward, [greedy, batch.images], tf.float32)
    return Samples(tokens, rewards, advantages(rewards, config.samples, greedy_rewards))


def self_critical_loss(
    model: tf.keras.Model, batch: Batch, samples: Samples, config: TrainConfig
) -> tuple[tf.Tensor, StepSums]:
    """Computes a loss whose gradient makes the better samples more probable; its value has no meaning.

    A share of the cross-entropy of the batch's true captions can be kept, which holds the model to their language.

    Returns:
        The loss; and sums, of which the first two are the negative rewards and the number of the samples.
    """
    tokens = tf.pad(samples.tokens, [[0, 0], [1, 0]], constant_values=START_ID)  # (R, T + 1)
    image_index = tf.repeat(tf.range(tf.shape(batch.features)[0]), config.samples)  # (R,)
    # Means over the words, as the cross-entropy of other trainings.
    weights = samples.advantages / tf.math.count_nonzero(samples.tokens, dtype=tf.float32)  # (R,)
    if config.cross_entropy_weight:
        weight = config.cross_entropy_weight / tf.math.count_nonzero(batch.tokens[:, 1:], dtype=tf.float32)
        weights = tf.concat([weights, tf.fill(tf.shape(batch.image_index), weight)], 0)  # (R + B,)
        longest = tf.maximum(tf.shape(tokens)[1], tf.shape(batch.tokens)[1])
        tokens = tf.concat([_pad_to(tokens, longest), _pad_to(batch.tokens, longest)], 0)  # (R + B, longest)
        image_index = tf.concat([image_index, batch.image_index], 0)  # (R + B,)
    outputs = model(batch.features, tokens, image_index, training=True)
    row = outputs.positions[:, 0]  # (N,), the caption of each word
    # Words that were never to be sampled take no part in the probabilities of the samples.
    forbidden = FORBIDDEN_LOGIT * tf.cast(forbidden_tokens(model.config.vocab_size), tf.float32)  # (V,)
    is_sample = tf.cast(row < tf.size(samples.rewards), tf.float32)[:, tf.newaxis]  # (N, 1)
    logits = tf.cast(outputs.logits, tf.float32) + is_sample * forbidden  # (N, V)
    word_losses, _ = masked_cross_entropy(logits, outputs.targets)  # (N,)
    num_samples = tf.cast(tf.size(samples.rewards), tf.float32)
    sums = StepSums(-tf.reduce_sum(samples.rewards), num_samples, tf.constant(0.0), tf.constant(0.0))
    return tf.reduce_sum(tf.gather(weights, row) * word_losses), sums


def _pad_to(tokens: tf.Tensor, length: tf.Tensor) -> tf.Tensor:
    """Pads captions with <pad> to a length."""
    return tf.pad(tokens, [[0, 0], [0, length - tf.shape(tokens)[1]]])
