"""Hard attention: what is sampled, REINFORCE against the exact gradient, and the training step."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from helpers.steps import make_step, read_weights

import model
from beyond.paper.hard_attention import HardAttention, SampledImages
from beyond.paper.objective import (
    PaperObjective,
    doubly_stochastic_term,
    reinforce_terms,
    sum_later_words,
)
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.decoder.losses import loss_function
from captioning.training.input_pipeline import encode_captions, make_dataset, make_epoch_batches


def fix_noise(hard_model, monkeypatch, gumbel, is_sampled):
    """Makes teacher forcing draw this noise."""

    def sample_noise(images, _):
        return SampledImages(*images, gumbel, tf.constant(is_sampled))

    monkeypatch.setattr(hard_model.decoder.attention, "sample_noise", sample_noise)


@pytest.fixture
def tiny_model():
    """Two locations, whose choice matters: the weights are large."""
    tf.keras.utils.set_random_seed(3)
    hard_model = model.build(ModelConfig(6, embedding_dim=3, units=4, attention="hard"), (2, 2048))
    for variable in hard_model.decoder.trainable_variables:
        variable.assign(variable * 3)
    return hard_model


# The attention.


def test_hard_attention_samples_half_of_the_captions():
    tf.keras.utils.set_random_seed(0)
    attention = HardAttention(2)
    scores = tf.tile(tf.constant([[0.0, 1.0, -2.0]]), [20_000, 1])
    attention.score = lambda *_: scores
    attention_weights = tf.nn.softmax(scores)
    images = model.EncodedImages(tf.zeros((20_000, 3, 1)), tf.zeros((20_000, 3, 2)))
    noise = attention.sample_noise(images, 2)
    assert noise.gumbel.shape == (2, 20_000, 3)
    is_sampled = noise.is_sampled.numpy()[:, 0]
    assert is_sampled.mean() == pytest.approx(0.5, abs=0.02)
    rows_by_step = []
    for gumbel in noise.gumbel:
        rows = attention.call(noise._replace(gumbel=gumbel), None)[1].location.numpy()
        np.testing.assert_array_equal(rows[~is_sampled], attention_weights.numpy()[~is_sampled])
        assert set(rows[is_sampled].ravel()) == {0.0, 1.0}
        np.testing.assert_allclose(rows[is_sampled].mean(axis=0), attention_weights[0], atol=0.02)
        rows_by_step.append(rows[is_sampled])
    assert np.any(rows_by_step[0] != rows_by_step[1]), "steps must be sampled independently"


def test_hard_attention_takes_the_most_probable_location_outside_training(rng):
    config = ModelConfig(6, embedding_dim=3, units=4, decoder="paper-lstm", attention="hard")
    tiny_model = model.build(config, (2, 2048))
    features = tf.constant(rng.normal(size=(5, 2, 2048)).astype(np.float32))
    images = tiny_model.encode(features)
    output = tiny_model.step(tf.fill([5], 2), images, tiny_model.initial_state(images))
    outputs = tiny_model(features, tf.fill([5, 2], 2))
    expected = tf.one_hot(tf.argmax(outputs.attention_weights, axis=1), 2)
    np.testing.assert_array_equal(output.attention_weights, expected)
    np.testing.assert_array_equal(outputs.location_weights, expected)
    assert outputs.attention_weights.numpy().min() > 0, "the attention weights themselves are soft"


def test_random_state_of_the_samples_is_saved_with_the_model(tiny_model):
    """What changes by sampling is among the variables that a checkpoint holds, so that a run resumes exactly."""
    before = [variable.numpy() for variable in tiny_model.non_trainable_variables]
    images = model.EncodedImages(tf.zeros((2, 2, 3)), tf.zeros((2, 2, 4)))
    tiny_model.decoder.attention.sample_noise(images, 2)
    after = [variable.numpy() for variable in tiny_model.non_trainable_variables]
    assert any((old != new).any() for old, new in zip(before, after, strict=True))


# The objective.


def test_doubly_stochastic_term_matches_hand_computed_values():
    tokens = tf.constant([[2, 4, 3], [2, 3, 0], [0, 0, 0]])  # the third caption fills the batch
    attention_weights = tf.constant([[0.5, 0.5], [0.75, 0.25], [0.5, 0.5], [0.0, 1.0]])
    positions = tf.constant([[0, 0], [1, 0], [0, 1], [1, 1]])
    mask = tf.constant([1.0, 1.0, 1.0, 0.0])  # the second caption's last word is padding
    penalty = doubly_stochastic_term(attention_weights, mask, positions, tokens)
    assert float(penalty) == pytest.approx(0.25**2 + 0.75**2)


TOKENS = tf.constant([[2, 4, 5, 4], [2, 5, 0, 0]])  # three words to predict, and one
WORD_POSITIONS = [(0, 0), (0, 1), (0, 2), (1, 0)]


@pytest.mark.slow
def test_reinforce_terms_mean_is_the_exact_gradient(tiny_model, rng, monkeypatch):
    """Enumerates all samples s of the bound sum_s p(s) log p(y | s)."""
    features = tf.constant(rng.normal(size=(2, 2, 2048)).astype(np.float32) * 3)
    variables = tiny_model.trainable_variables
    estimates = [0.0] * len(variables)

    def compute(locations):
        grid = np.zeros((3, 2), int)  # (T, B); at padding the choice has no effect
        for (caption, step), location in zip(WORD_POSITIONS, locations, strict=True):
            grid[step, caption] = location
        fix_noise(tiny_model, monkeypatch, 1e4 * tf.one_hot(grid, 2), [[True], [True]])
        with tf.GradientTape() as tape:
            outputs = tiny_model(features, TOKENS, training=True)
            losses, mask = loss_function(outputs.logits, outputs.targets)
            returns = sum_later_words((-losses + 1.3) * mask, outputs.positions, TOKENS)
            reinforce_loss, _ = reinforce_terms(outputs, returns, mask, mask)
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
        if variable is tiny_model.decoder.attention.W1.kernel:
            assert np.abs(gradient).max() > 1e-3, "the attention's gradient is too small for this test"


def test_reinforce_terms_of_a_zero_weight_are_finite(tiny_model):
    scores = tf.Variable([[200.0, 0.0], [0.0, 0.0], [0.0, 200.0]])
    mask = tf.constant([1.0, 1.0, 0.0])  # the last row is padding
    outputs = tiny_model(tf.zeros((1, 2, 2048)), tf.constant([[2, 4, 3]]))
    with tf.GradientTape() as tape:
        # The first word sampled the location whose weight has vanished.
        location_weights = tf.constant([[0.0, 1.0], [0.0, 1.0], [0.0, 1.0]])
        sampled = outputs._replace(attention_weights=tf.nn.softmax(scores), location_weights=location_weights)
        reinforce_loss, entropy = reinforce_terms(sampled, tf.constant([1.0, -0.5, 0.0]), mask, mask)
        objective = reinforce_loss - 0.01 * entropy
    assert float(tf.reduce_min(sampled.attention_weights)) == 0
    assert float(entropy) == pytest.approx(math.log(2)), "of the three rows only the second has any"
    gradient = tape.gradient(objective, scores).numpy()
    assert np.isfinite(gradient).all() and np.isfinite(objective)
    assert np.abs(gradient[1]).max() > 0
    assert np.abs(gradient[2]).max() == 0


# The training step.


def eager_objective(caption_model, batch, paper, baseline):
    """Computes the mean objective as a plain sum over captions and words; returns it with log p of sampled words."""
    outputs = caption_model(batch.features, batch.tokens, batch.image_index, training=True)
    row = {tuple(position): number for number, position in enumerate(outputs.positions.numpy())}
    log_probs = tf.nn.log_softmax(outputs.logits)
    objective, sampled_log_probs = 0.0, []
    lengths = np.count_nonzero(batch.tokens, axis=1) - 1
    for b, length in enumerate(lengths):
        caption_log_probs = [log_probs[row[b, t], batch.tokens[b, t + 1]] for t in range(length)]
        for t, log_prob in enumerate(caption_log_probs):
            attention_weights = outputs.attention_weights[row[b, t]]
            entropy = -tf.reduce_sum(attention_weights * tf.math.log(attention_weights))
            objective -= log_prob + paper.entropy_weight * entropy
            if outputs.is_sampled[row[b, t], 0]:
                sampled_log_probs.append(float(log_prob))
                advantage = sum(float(later) - baseline for later in caption_log_probs[t:])
                location = int(tf.argmax(outputs.location_weights[row[b, t]]))
                objective -= paper.reinforce_weight * advantage * tf.math.log(attention_weights[location])
        attention_sum = tf.add_n([outputs.attention_weights[row[b, t]] for t in range(length)])
        objective += paper.doubly_stochastic * tf.reduce_sum((1 - attention_sum) ** 2)
    return objective / lengths.sum(), sampled_log_probs


@pytest.mark.slow
def test_train_step_follows_the_estimate(dataset, tokenizer, cache, run_config, rng, monkeypatch):
    captions = encode_captions(dataset.split("train"), tokenizer.encode, cache.path)
    batch = next(iter(make_dataset(captions, make_epoch_batches(captions, 3, 0, 0), cache.read)))
    config = dataclasses.replace(
        run_config,
        model=dataclasses.replace(run_config.model, attention="hard"),
        train=TrainConfig(clip_norm=1e9),
        objective={"reinforce_weight": 0.7, "entropy_weight": 0.3, "doubly_stochastic": 2.0},
    )
    hard_model, objective = model.build(config.model), PaperObjective(config)
    gumbel = tf.constant(rng.gumbel(size=(batch.tokens.shape[1] - 1, 3, 64)).astype(np.float32))
    fix_noise(hard_model, monkeypatch, gumbel, [[True], [False], [True]])
    _, train_step = make_step(hard_model, tf.keras.optimizers.SGD(1.0), objective, captions, cache)
    objective.baseline.assign(-1.5)
    before = read_weights(hard_model)
    train_step(batch)
    after = read_weights(hard_model)

    for variable, value in zip(hard_model.trainable_variables, before, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        mean, sampled_log_probs = eager_objective(hard_model, batch, objective.paper, baseline=-1.5)
    gradients = tape.gradient(mean, hard_model.trainable_variables)
    for variable, old, new, gradient in zip(hard_model.trainable_variables, before, after, gradients, strict=True):
        gradient = tf.convert_to_tensor(gradient)
        np.testing.assert_allclose(old - new, gradient, rtol=1e-3, atol=5e-6, err_msg=variable.path)
    assert float(objective.baseline) == pytest.approx(0.9 * -1.5 + 0.1 * np.mean(sampled_log_probs), rel=1e-4)
