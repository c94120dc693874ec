"""Self-critical training on a model that is small enough to list all of its captions."""

import itertools

import numpy as np
import pytest

import model
from beyond.cider import self_critical
from beyond.cider.self_critical import CiderConfig, SelfCritical
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.decoder.decoding import greedy_search
from captioning.training.input_pipeline import Batch

MAX_WORDS = 3
WORDS = (4, 5)  # the vocabulary beside the special tokens


def make_objective(reward=None, **settings):
    """The objective with these settings of `CiderConfig`, and without cross-entropy unless it is one of them."""
    cider = CiderConfig(**{"cross_entropy_weight": 0.0, **settings})
    return SelfCritical(TrainConfig(max_length=MAX_WORDS + 1), cider, reward)


def list_captions():
    """Lists every caption that can be sampled, (15, 3): up to 2 words and <end>, or 3 words."""
    ended = [(*words, END_ID) for n in range(MAX_WORDS) for words in itertools.product(WORDS, repeat=n)]
    cut = list(itertools.product(WORDS, repeat=MAX_WORDS))
    return np.array([[*caption, *[PAD_ID] * (MAX_WORDS - len(caption))] for caption in ended + cut], np.int32)


CAPTIONS = list_captions()


@pytest.fixture
def tiny_model(rng):
    tiny = model.build(ModelConfig(vocab_size=6, embedding_dim=4, units=5), features_shape=(4, 7))
    for variable in tiny.trainable_variables:
        variable.assign(rng.normal(0, 0.7, variable.shape))
    return tiny


@pytest.fixture
def batch(rng):
    """Two images, the first of which has two true captions."""
    tokens = tf.constant([[2, 4, 5, 3], [2, 5, 3, 0], [2, 1, 3, 0]])
    features = tf.constant(rng.normal(size=(2, 4, 7)), tf.float32)
    return Batch(features, tf.constant([0, 0, 1]), tokens, images=tf.constant([8, 9]), order=None)


def log_probabilities(tiny, features):
    """Computes log p of every caption of one image, step by step; only words and <end> can be sampled."""
    images, total = tiny.encode(tf.repeat(features[tf.newaxis], len(CAPTIONS), axis=0)), 0.0
    state, token = tiny.initial_state(images), tf.fill([len(CAPTIONS)], START_ID)
    for t in range(MAX_WORDS):
        logits, state, _ = tiny.step(token, images, state)
        log_probs = tf.nn.log_softmax(logits[:, END_ID:])  # of <end> and the words, which are the last ids
        token = tf.constant(CAPTIONS[:, t])
        word = tf.gather(log_probs, tf.maximum(token - END_ID, 0), batch_dims=1)
        total += tf.where(token == PAD_ID, 0.0, word)
    return total


def gradients_of(compute, variables):
    with tf.GradientTape() as tape:
        value = compute()
    return [
        tf.zeros_like(v) if g is None else tf.convert_to_tensor(g)
        for g, v in zip(tape.gradient(value, variables), variables, strict=True)
    ]


def test_gradient_is_that_of_the_expected_reward(tiny_model, batch, rng):
    tiny_model.decoder.fused = True
    rewards = rng.normal(size=len(CAPTIONS)).astype(np.float32)
    variables = tiny_model.trainable_variables
    expected = gradients_of(
        lambda: -tf.reduce_sum(tf.exp(log_probabilities(tiny_model, batch.features[1])) * rewards), variables
    )
    probabilities = tf.exp(log_probabilities(tiny_model, batch.features[1]))
    assert float(tf.reduce_sum(probabilities)) == pytest.approx(1, abs=1e-5)

    # Every caption once, weighted by its probability, in the place of samples.
    num_words = np.count_nonzero(CAPTIONS)
    samples = self_critical.Samples(tf.constant(CAPTIONS), tf.constant(rewards), probabilities * rewards * num_words)
    second = batch._replace(features=batch.features[1:])
    objective = make_objective(samples=len(CAPTIONS))
    gradients = gradients_of(lambda: objective.loss(tiny_model, (second, samples))[0], variables)
    for variable, gradient, value in zip(variables, gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, value, rtol=1e-3, atol=1e-5, err_msg=variable.path)


def test_samples_are_drawn_by_their_probability(tiny_model, batch):
    tokens = self_critical.sample_captions(tiny_model, batch.features, 4000, MAX_WORDS, tf.constant([0, 1]))
    assert tokens.shape == (8000, MAX_WORDS)
    for image, of_image in enumerate(np.split(tokens.numpy(), 2)):
        counts = (of_image[:, np.newaxis] == CAPTIONS).all(axis=2).sum(axis=0)
        assert counts.sum() == 4000, "a caption was drawn that cannot be"
        probabilities = np.exp(log_probabilities(tiny_model, batch.features[image]))
        deviations = (counts - 4000 * probabilities) / np.sqrt(4000 * probabilities)
        assert np.abs(deviations).max() < 4


@pytest.mark.parametrize("baseline", ["others", "greedy"])
def test_rewards_are_compared_with_the_baseline(tiny_model, batch, baseline):
    seen = []

    def reward(tokens, numbers):
        seen.append((tokens, numbers))
        return (tokens.sum(axis=1) * numbers).astype(np.float32)

    _, samples = make_objective(reward, samples=3, baseline=baseline).prepare(tiny_model, batch, tf.constant(5))
    np.testing.assert_array_equal(seen[0][1], [8, 8, 8, 9, 9, 9])
    rewards = samples.tokens.numpy().sum(axis=1) * np.repeat([8, 9], 3)
    np.testing.assert_array_equal(samples.rewards, rewards)
    if baseline == "others":
        expected = [rewards[i] - np.delete(rewards[i // 3 * 3 : i // 3 * 3 + 3], i % 3).mean() for i in range(6)]
    else:
        greedy, numbers = seen[1]
        np.testing.assert_array_equal(numbers, [8, 9])
        np.testing.assert_array_equal(greedy, greedy_search(tiny_model, batch.features, MAX_WORDS).tokens)
        expected = rewards - np.repeat(greedy.sum(axis=1) * [8, 9], 3)
    np.testing.assert_allclose(samples.advantages, expected, rtol=1e-6)
    assert np.abs(samples.advantages).max() > 1


def test_a_share_of_the_cross_entropy_is_that_of_the_true_captions(tiny_model, batch):
    samples = self_critical.Samples(tf.constant([[4, 5], [5, 0], [3, 0], [4, 4]]), tf.zeros(4), tf.zeros(4))
    objective = make_objective(samples=2, cross_entropy_weight=0.3)
    variables = tiny_model.trainable_variables

    def cross_entropy():
        outputs = tiny_model(batch.features, batch.tokens, batch.image_index)
        losses = tf.keras.losses.sparse_categorical_crossentropy(outputs.targets, outputs.logits, from_logits=True)
        return 0.3 * tf.reduce_sum(tf.where(outputs.targets == PAD_ID, 0.0, losses)) / 7  # words

    gradients = gradients_of(lambda: objective.loss(tiny_model, (batch, samples))[0], variables)
    for gradient, value in zip(gradients, gradients_of(cross_entropy, variables), strict=True):
        np.testing.assert_allclose(gradient, value, rtol=1e-3, atol=1e-6)
