import itertools
import math

import numpy as np
import pytest
import tensorflow as tf

import model
from losses import (
    cross_entropy,
    doubly_stochastic_penalty,
    hard_attention_terms,
    next_words,
    smoothing_penalty,
    word_losses,
)
from model import BahdanauAttention, Chance, ModelConfig, Taught

rng = np.random.default_rng(0)
LOGITS = tf.constant(rng.normal(size=(5, 10)).astype(np.float32))
TARGETS = tf.constant([4, 5, 0, 6, 3])  # the third is padding
TAUGHT = Taught(LOGITS, tf.range(5), None, None, None, None)


def test_padding_counts_for_nothing():
    losses, real = word_losses(TAUGHT, TARGETS)
    expected = -tf.nn.log_softmax(LOGITS).numpy()[range(5), TARGETS]
    np.testing.assert_allclose(losses, expected * [1, 1, 0, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(real, [1, 1, 0, 1, 1])


@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_cross_entropy_and_its_gradient_are_tensorflows(scale):
    logits, upstream = tf.Variable(LOGITS * scale), tf.constant([1.0, 0.5, 2.0, 0.0, -3.0])
    rows = tf.constant([0, 2, 2, 4, 1])  # two words after the same beginning, and a beginning without one
    found = []
    for function in (cross_entropy, lambda x, r, y: tf.nn.sparse_softmax_cross_entropy_with_logits(y, tf.gather(x, r))):
        with tf.GradientTape() as tape:
            losses = function(tf.convert_to_tensor(logits), rows, TARGETS)
        found.append((losses, tf.convert_to_tensor(tape.gradient(losses, logits, upstream))))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


def test_label_smoothing_is_keras_own():
    losses, real = word_losses(TAUGHT, TARGETS)
    smoothed = tf.reduce_sum(losses) + 0.3 * smoothing_penalty(TAUGHT, TARGETS, real)
    keras = tf.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3, reduction="none")
    expected = (keras(tf.one_hot(TARGETS, 10), LOGITS) * real).numpy().sum()
    assert float(smoothed) == pytest.approx(expected, rel=1e-5)


def test_doubly_stochastic_penalty_by_hand():
    weights = tf.constant([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    place = tf.constant([[0, 0], [1, 0], [0, 1], [1, 1]])
    real = tf.constant([1.0, 1.0, 1.0, 0.0])  # the second caption's last word is padding, as is the third caption
    taught = Taught(None, None, weights, weights, None, place)
    assert float(
        doubly_stochastic_penalty(taught, real, tf.constant([[2, 4, 3], [2, 3, 0], [0, 0, 0]]))
    ) == pytest.approx(0.25**2 + 0.75**2)


# Hard attention.


@pytest.fixture
def tiny():
    """Two locations, two words: four ways to look."""
    tf.keras.utils.set_random_seed(3)
    captioner = model.build(ModelConfig(6, embedding_dim=3, units=4, attention="hard"), (2, 2048))
    for variable in captioner.decoder.trainable_variables:  # so that it matters where one looks
        variable.assign(variable * 3)
    return captioner


TOKENS = tf.constant([[2, 4, 5, 4], [2, 5, 4, 0]])  # the second caption has one word less


def taught_by(captioner, pictures, looks, monkeypatch):
    """Teacher forcing that looks at these locations, one for each of the five words, in the order of the rows."""
    chance = Chance(1e4 * tf.one_hot(looks, 2), tf.constant([[True], [True]]))
    monkeypatch.setattr(captioner.decoder.attention, "draw", lambda *_: chance)
    taught = captioner(pictures, TOKENS, training=True)
    np.testing.assert_array_equal(tf.argmax(taught.looks, axis=1), looks)
    return taught, *word_losses(taught, next_words(TOKENS, taught))


def test_the_estimators_mean_is_the_exact_gradient(tiny, monkeypatch):
    """Of the bound sum_s p(s) log p(y | s), enumerated over all ways to look."""
    pictures = tf.constant(rng.normal(size=(2, 2, 2048)).astype(np.float32) * 3)
    variables = tiny.trainable_variables
    estimates, ways = [0.0] * len(variables), list(itertools.product((0, 1), repeat=5))
    with tf.GradientTape() as exact_tape:
        bound = total = 0.0
        for looks in ways:
            with tf.GradientTape() as tape:
                taught, losses, real = taught_by(tiny, pictures, looks, monkeypatch)
                locations, _ = hard_attention_terms(taught, losses, real, tf.constant(-1.3), TOKENS)
                objective = tf.reduce_sum(losses) + locations
            p = tf.reduce_prod(tf.reduce_sum(taught.weights * tf.one_hot(looks, 2), axis=1))
            bound, total = bound - p * tf.reduce_sum(losses), total + p
            gradients = tape.gradient(objective, variables, unconnected_gradients="zero")
            estimates = [mean + p * gradient for mean, gradient in zip(estimates, gradients, strict=True)]
    assert float(total) == pytest.approx(1)
    exact = exact_tape.gradient(bound, variables)
    keys = tiny.decoder.attention.W1.kernel.path
    for variable, gradient, estimate in zip(variables, exact, estimates, strict=True):
        gradient, estimate = tf.convert_to_tensor(gradient), tf.convert_to_tensor(estimate)
        np.testing.assert_allclose(-gradient, estimate, rtol=1e-3, atol=1e-5, err_msg=variable.path)
        if variable.path == keys:
            assert np.abs(gradient).max() > 1e-3, "the test must see the attention's own gradient"


def test_locations_are_drawn_as_the_weights_say_for_half_of_the_captions():
    tf.keras.utils.set_random_seed(0)
    attention = BahdanauAttention(2, hard=True)
    scores = tf.tile(tf.constant([[0.0, 1.0, -2.0]]), [20_000, 1])
    weights = tf.nn.softmax(scores)
    chance = attention.draw(20_000, 20_000, 3)
    looks = attention.look(scores, weights, chance).numpy()
    sampled = chance.sampled.numpy()[:, 0]
    assert sampled.mean() == pytest.approx(0.5, abs=0.02)
    np.testing.assert_array_equal(looks[~sampled], weights.numpy()[~sampled])
    assert set(looks[sampled].ravel()) == {0.0, 1.0}
    np.testing.assert_allclose(looks[sampled].mean(axis=0), weights[0], atol=0.02)


def test_captioning_looks_at_the_most_probable_location(tiny):
    pictures = tf.constant(rng.normal(size=(5, 2, 2048)).astype(np.float32))
    _, _, looks = tiny.step(tf.fill([5], 2), tiny.decoder.initial_state(5), tiny.encode(pictures))
    taught = tiny(pictures, tf.fill([5, 2], 2))
    expected = tf.one_hot(tf.argmax(taught.weights, axis=1), 2)
    np.testing.assert_array_equal(looks, expected)
    np.testing.assert_array_equal(taught.looks, expected)
    assert taught.weights.numpy().min() > 0, "the weights themselves are soft"


def test_a_weight_of_zero_gives_no_nan():
    scores = tf.Variable([[200.0, 0.0], [0.0, 0.0], [0.0, 200.0]])
    place = tf.constant([[0, 0], [0, 1], [0, 2]])
    with tf.GradientTape() as tape:
        weights = tf.nn.softmax(scores)
        # The first word drew the location whose weight has vanished; the last is padding.
        looks = tf.constant([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        taught = Taught(None, None, weights, looks, tf.constant([[True]] * 3), place)
        losses, real = tf.constant([1.0, 2.0, 0.0]), tf.constant([1.0, 1.0, 0.0])
        locations, entropy = hard_attention_terms(taught, losses, real, tf.constant(-1.5), tf.constant([[2, 4, 3, 0]]))
        objective = locations - 0.01 * entropy
    assert float(tf.reduce_min(weights)) == 0
    assert float(entropy) == pytest.approx(math.log(2)), "only the word that is real and undecided has any"
    gradient = tape.gradient(objective, scores).numpy()
    assert np.isfinite(gradient).all() and np.isfinite(objective)
    assert np.abs(gradient[1]).max() > 0 == np.abs(gradient[2]).max()
