import itertools
import math

import numpy as np
import pytest

import model
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from captioning.decoder import losses as losses_module
from captioning.decoder.losses import (
    cross_entropy,
    doubly_stochastic_term,
    label_smoothing_term,
    masked_cross_entropy,
    reinforce_terms,
)
from model import SamplingNoise

TARGETS = tf.constant([4, 5, 0, 6, 3])  # the third is padding


@pytest.fixture
def logits(rng):
    return tf.constant(rng.normal(size=(5, 10)).astype(np.float32))


def test_masked_cross_entropy_leaves_out_padding(logits):
    losses, mask = masked_cross_entropy(logits, TARGETS)
    expected = -tf.nn.log_softmax(logits).numpy()[range(5), TARGETS]
    np.testing.assert_allclose(losses, expected * [1, 1, 0, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(mask, [1, 1, 0, 1, 1])


def test_masked_cross_entropy_computes_in_float32(logits):
    losses, _ = masked_cross_entropy(tf.cast(logits, tf.float16), TARGETS)
    assert losses.dtype == tf.float32
    np.testing.assert_allclose(losses, masked_cross_entropy(logits, TARGETS)[0], rtol=1e-2)


@pytest.mark.parametrize("has_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_cross_entropy_and_its_gradient_match_tensorflow(logits, scale, has_gpu, monkeypatch):
    monkeypatch.setattr(losses_module, "has_gpu", lambda: has_gpu)
    logits, d_losses = tf.Variable(logits * scale), tf.constant([1.0, 0.5, 2.0, 0.0, -3.0])

    def reference(logits, targets):
        return tf.nn.sparse_softmax_cross_entropy_with_logits(targets, logits)

    results = []
    for function in (cross_entropy, reference):
        with tf.GradientTape() as tape:
            losses = function(tf.convert_to_tensor(logits), TARGETS)
        results.append((losses, tf.convert_to_tensor(tape.gradient(losses, logits, d_losses))))
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-6)


def test_label_smoothing_term_matches_keras(logits):
    losses, mask = masked_cross_entropy(logits, TARGETS)
    smoothed = tf.reduce_sum(losses) + 0.3 * label_smoothing_term(logits, TARGETS, mask)
    keras_loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3, reduction="none")
    expected = (keras_loss(tf.one_hot(TARGETS, 10), logits) * mask).numpy().sum()
    assert float(smoothed) == pytest.approx(expected, rel=1e-5)


def test_doubly_stochastic_term_matches_hand_computed_values():
    tokens = tf.constant([[2, 4, 3], [2, 3, 0], [0, 0, 0]])  # the third caption fills the batch
    attention_weights = tf.constant([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    positions = tf.constant([[0, 0], [1, 0], [0, 1], [1, 1]])
    mask = tf.constant([1.0, 1.0, 1.0, 0.0])  # the second caption's last word is padding
    penalty = doubly_stochastic_term(attention_weights, mask, positions, tokens)
    assert float(penalty) == pytest.approx(0.25**2 + 0.75**2)


# Hard attention.


TOKENS = tf.constant([[2, 4, 5, 4], [2, 5, 0, 0]])  # three words to predict, and one
WORD_POSITIONS = [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.fixture
def tiny_hard_model():
    """Two locations, whose choice matters: the weights are large."""
    tf.keras.utils.set_random_seed(3)
    hard_model = model.build(ModelConfig(6, embedding_dim=3, units=4, attention="hard"), (2, 2048))
    for variable in hard_model.decoder.trainable_variables:
        variable.assign(variable * 3)
    return hard_model


def sample_locations(hard_model, monkeypatch, locations):
    """Makes teacher forcing sample these locations, one for each of the words of TOKENS."""
    grid = np.zeros((3, 2), int)  # (T, B); at padding the choice has no effect
    for (caption, step), location in zip(WORD_POSITIONS, locations, strict=True):
        grid[step, caption] = location
    noise = SamplingNoise(1e4 * tf.one_hot(grid, 2), tf.constant([[True], [True]]))
    monkeypatch.setattr(hard_model.decoder.attention, "sample_noise", lambda *_: noise)


@pytest.mark.slow
def test_reinforce_terms_mean_is_the_exact_gradient(tiny_hard_model, rng, monkeypatch):
    """Enumerates all samples s of the bound sum_s p(s) log p(y | s)."""
    features = tf.constant(rng.normal(size=(2, 2, 2048)).astype(np.float32) * 3)
    variables = tiny_hard_model.trainable_variables
    estimates = [0.0] * len(variables)

    def compute(locations):
        sample_locations(tiny_hard_model, monkeypatch, locations)
        with tf.GradientTape() as tape:
            outputs = tiny_hard_model(features, TOKENS, training=True)
            losses, mask = masked_cross_entropy(outputs.logits, outputs.targets)
            reinforce_loss, _ = reinforce_terms(
                outputs.attention_weights,
                outputs.location_weights,
                mask * tf.cast(outputs.is_sampled[:, 0], tf.float32),
                losses,
                mask,
                tf.constant(-1.3),
                outputs.positions,
                TOKENS,
            )
            objective = tf.reduce_sum(losses) + reinforce_loss
        gradients = [
            tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
            for variable, gradient in zip(variables, tape.gradient(objective, variables), strict=True)
        ]
        sampled_weights = tf.reduce_sum(outputs.attention_weights * outputs.location_weights, axis=1)
        probability = tf.reduce_prod(tf.where(mask > 0, sampled_weights, 1.0))
        row = {tuple(position): i for i, position in enumerate(outputs.positions.numpy())}
        sampled = [int(tf.argmax(outputs.location_weights[row[position]])) for position in WORD_POSITIONS]
        assert sampled == list(locations)
        return probability, losses, gradients

    with tf.GradientTape() as exact_tape:
        bound = total_probability = 0.0
        for locations in itertools.product((0, 1), repeat=len(WORD_POSITIONS)):
            probability, losses, gradients = compute(locations)
            bound -= probability * tf.reduce_sum(losses)
            total_probability += probability
            estimates = [mean + probability * gradient for mean, gradient in zip(estimates, gradients, strict=True)]
    assert float(total_probability) == pytest.approx(1)
    exact = exact_tape.gradient(bound, variables)
    for variable, gradient, estimate in zip(variables, exact, estimates, strict=True):
        gradient, estimate = tf.convert_to_tensor(gradient), tf.convert_to_tensor(estimate)
        atol = 2e-5 * max(1, np.abs(gradient).max())
        np.testing.assert_allclose(-gradient, estimate, rtol=1e-3, atol=atol, err_msg=variable.path)
        if variable is tiny_hard_model.decoder.attention.W1.kernel:
            assert np.abs(gradient).max() > 1e-3, "the attention's gradient is too small for this test"


def test_reinforce_terms_of_a_zero_weight_are_finite():
    scores = tf.Variable([[200.0, 0.0], [0.0, 0.0], [0.0, 200.0]])
    with tf.GradientTape() as tape:
        attention_weights = tf.nn.softmax(scores)
        mask = tf.constant([1.0, 1.0, 0.0])  # the last row is padding
        reinforce_loss, entropy = reinforce_terms(
            attention_weights,
            # The first word sampled the location whose weight has vanished.
            location_weights=tf.constant([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]]),
            sample_mask=mask,
            losses=tf.constant([1.0, 2.0, 0.0]),
            mask=mask,
            baseline=tf.constant(-1.5),
            positions=tf.constant([[0, 0], [0, 1], [0, 2]]),
            tokens=tf.constant([[2, 4, 3, 0]]),
        )
        objective = reinforce_loss - 0.01 * entropy
    assert float(tf.reduce_min(attention_weights)) == 0
    assert float(entropy) == pytest.approx(math.log(2)), "of the three rows only the second has any"
    gradient = tape.gradient(objective, scores).numpy()
    assert np.isfinite(gradient).all() and np.isfinite(objective)
    assert np.abs(gradient[1]).max() > 0
    assert np.abs(gradient[2]).max() == 0
