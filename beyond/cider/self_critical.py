"""Self-critical training: captions are sampled, and those that score better than others become more probable.

Rennie et al. 2017, "Self-critical Sequence Training for Image Captioning"; with the baseline of Luo 2020, "A Better
Variant of Self-Critical Sequence Training". The gradient of the mean reward of sampled captions is
E[(r - b) d log p(caption)] (REINFORCE), for any baseline b that does not depend on the caption. In the comments I is
the number of images of a batch, S that of samples of each, R = I * S, and T the number of steps.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

from beyond.cider.rewards import CaptionReward, Reward
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.options import Settings, option
from captioning.config.settings import TrainConfig
from captioning.decoder.constraints import forbidden_tokens
from captioning.decoder.decoding import StepModel, generate, greedy_search, repeat_images
from captioning.decoder.losses import loss_function
from captioning.decoder.sampling import pick
from captioning.training.input_pipeline import Batch, TrainData
from captioning.training.objective import CrossEntropy, StepSums

FORBIDDEN_LOGIT = -1e9


@dataclasses.dataclass(frozen=True)
class CiderConfig(Settings):
    """How captions are sampled and rewarded; the defaults scored best on Flickr8k."""

    samples: int = option(5, "number of captions that are sampled for each image", bounds="[2, inf)")
    baseline: str = option(
        "others",
        "what the reward of a caption is compared with: the mean of the image's other samples, or its greedy caption",
        choices=("others", "greedy"),
    )
    bleu_weight: float = option(1.0, "weight of a caption's BLEU-4, which is added to its CIDEr", bounds="[0, inf)")
    cross_entropy_weight: float = option(
        0.1, "weight of the cross-entropy of the true captions, which is added to the loss", bounds="[0, inf)"
    )


class Samples(NamedTuple):
    """S captions of each of I images: R = I * S rows, those of an image in turn."""

    tokens: tf.Tensor  # (R, T) int32, padded with <pad>
    rewards: tf.Tensor  # (R,)
    advantages: tf.Tensor  # (R,), the rewards less their baselines


def sample_captions(
    model: StepModel, features: tf.Tensor, num_samples: int, max_words: int, seed: tf.Tensor
) -> tf.Tensor:
    """Draws captions of each image, of features (I, L, 2048), by their probability, word by word.

    Returns:
        (R, T) int32, the captions of an image in turn. Those that have not ended by `max_words` are cut.
    """
    num_rows = num_samples * tf.shape(features)[0]
    images = repeat_images(model.encode(features), num_samples)
    numbers = tf.random.stateless_uniform((max_words, num_rows), seed)

    def random_word(log_probs: tf.Tensor, t: tf.Tensor) -> tf.Tensor:
        return pick(tf.exp(log_probs), numbers[t])

    return generate(model, images, random_word, max_words).tokens


class SelfCritical(CrossEntropy):
    """Minimises the negative reward of sampled captions."""

    column = "train_reward"
    can_be_compiled = False  # the rewards are computed in Python

    def __init__(self, config: TrainConfig, cider: CiderConfig, reward: Reward):
        super().__init__(config)
        self.cider, self.reward = cider, reward
        self.own_cider = getattr(reward, "cider", None)

    def result(self, mean_loss: float) -> float:
        """Returns the mean reward, in percent as CIDEr."""
        return round(-100 * mean_loss, 2)

    def prepare(self, model: StepModel, batch: Batch, step: tf.Tensor) -> tuple[Batch, Samples]:
        """Samples captions of the images of a batch, without dropout, and scores them."""
        max_words = self.config.max_length - 1
        seed = tf.stack([tf.constant(self.config.seed, tf.int64), tf.cast(step, tf.int64)])  # others in every step
        tokens = sample_captions(model, batch.features, self.cider.samples, max_words, seed)  # (R, T)
        numbers = tf.repeat(batch.images, self.cider.samples)  # (R,)
        rewards = tf.ensure_shape(tf.numpy_function(self.reward, [tokens, numbers], tf.float32), [None])
        by_image = tf.reshape(rewards, (-1, self.cider.samples))  # (I, S)
        if self.cider.baseline == "greedy":  # Rennie et al. 2017, section 3.2
            greedy = greedy_search(model, batch.features, max_words).tokens
            baseline = tf.numpy_function(self.reward, [greedy, batch.images], tf.float32)[:, tf.newaxis]  # (I, 1)
        else:  # the mean of the image's other samples (Luo 2020, equation 6)
            baseline = (tf.reduce_sum(by_image, axis=1, keepdims=True) - by_image) / (self.cider.samples - 1)  # (I, S)
        return batch, Samples(tokens, rewards, advantages=tf.reshape(by_image - baseline, [-1]))

    def loss(self, model: tf.keras.Model, prepared: Any) -> tuple[tf.Tensor, StepSums]:
        """Computes a loss whose gradient makes the better samples more probable; its value has no meaning.

        A share of the cross-entropy of the batch's true captions can be kept, which holds the model to their language.
        The sums are the negative rewards of the samples, and their number.
        """
        batch, samples = prepared
        tokens = tf.pad(samples.tokens, [[0, 0], [1, 0]], constant_values=START_ID)  # (R, T + 1)
        image_index = tf.repeat(tf.range(tf.shape(batch.features)[0]), self.cider.samples)  # (R,)
        # Means over the words, as the cross-entropy of other trainings.
        weights = samples.advantages / tf.math.count_nonzero(samples.tokens, dtype=tf.float32)  # (R,)
        if self.cider.cross_entropy_weight:
            weight = self.cider.cross_entropy_weight / tf.math.count_nonzero(batch.tokens[:, 1:], dtype=tf.float32)
            weights = tf.concat([weights, tf.fill(tf.shape(batch.image_index), weight)], 0)  # (R + B,)
            longest = tf.maximum(tf.shape(tokens)[1], tf.shape(batch.tokens)[1])
            padded = [tf.pad(rows, [[0, 0], [0, longest - tf.shape(rows)[1]]]) for rows in (tokens, batch.tokens)]
            tokens = tf.concat(padded, 0)  # (R + B, longest)
            image_index = tf.concat([image_index, batch.image_index], 0)  # (R + B,)
        outputs = model(batch.features, tokens, image_index, training=True)
        row = outputs.positions[:, 0]  # (N,), the caption of each word
        # Words that cannot be sampled take no part in the probabilities of the samples.
        forbidden = FORBIDDEN_LOGIT * tf.cast(forbidden_tokens(model.config.vocab_size), tf.float32)  # (V,)
        is_sample = tf.cast(row < tf.size(samples.rewards), tf.float32)[:, tf.newaxis]  # (N, 1)
        logits = tf.cast(outputs.logits, tf.float32) + is_sample * forbidden  # (N, V)
        word_losses, _ = loss_function(logits, outputs.targets)  # (N,)
        num_samples = tf.cast(tf.size(samples.rewards), tf.float32)
        sums = StepSums(loss=-tf.reduce_sum(samples.rewards), num_tokens=num_samples)
        return tf.reduce_sum(tf.gather(weights, row) * word_losses), sums


def make_reward(data: TrainData, bleu_weight: float) -> CaptionReward:
    """Makes what scores captions of the training images by their reference captions."""
    references: Iterable = (map(data.tokenizer.encode, example.captions) for example in data.dataset.split("train"))
    return CaptionReward(references, bleu_weight)
