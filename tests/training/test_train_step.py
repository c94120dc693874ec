"""The training step of train.py, compiled and with its input pipeline, against plain eager TensorFlow."""

import functools
import itertools
import math

import numpy as np
import pytest

import model
import train
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.training.checkpoints import TrainProgress
from captioning.training.input_pipeline import (
    encode_captions,
    make_dataset,
    make_distributed_dataset,
    make_epoch_batches,
)
from captioning.training.optimizer import FusedAdam, WeightEMA, make_optimizer
from model import SamplingNoise


@pytest.fixture
def captions(dataset, tokenizer, cache):
    return encode_captions(dataset.split("train"), tokenizer.encode, cache.path)


@pytest.fixture
def batch(captions, cache):
    """The first batch of three captions."""
    return next(iter(make_dataset(captions, make_epoch_batches(captions, 3, 0, 0), cache.read)))


@pytest.fixture
def make_step(captions, cache):
    """Returns a function that makes the state and the step of a training on one device."""

    def make(caption_model, optimizer, config, ema_decay=0.0):
        optimizer.build(caption_model.trainable_variables)
        ema = WeightEMA(caption_model.trainable_variables, ema_decay)
        state = train.TrainState(caption_model, optimizer, ema, TrainProgress())
        strategy = tf.distribute.get_strategy()
        batch_spec = make_distributed_dataset(strategy, captions, [], cache.read).element_spec
        return state, train.make_train_step(state, config, strategy, batch_spec)

    return make


@pytest.fixture
def hard_model(tokenizer):
    tf.keras.utils.set_random_seed(0)
    return model.build(ModelConfig(len(tokenizer), embedding_dim=8, units=16, attention="hard"))


def read_weights(caption_model):
    return [variable.numpy() for variable in caption_model.trainable_variables]


# Soft attention.


def eager_objective(caption_model, batch, config):
    """Computes the mean loss and its regularised form, caption by caption and word by word."""
    loss = objective = 0.0
    for image, caption in zip(batch.image_index.numpy(), batch.tokens, strict=True):
        caption = caption[: np.count_nonzero(caption)]
        images = caption_model.encode(batch.features[image : image + 1])
        state = caption_model.initial_state(images)
        attention_sum = 0.0
        for token, target in itertools.pairwise(caption):
            logits, state, attention_weights = caption_model.step(token[tf.newaxis], images, state)
            attention_sum += attention_weights[0]
            one_hot = tf.one_hot(target, caption_model.config.vocab_size)
            cross_entropy = functools.partial(
                tf.keras.losses.categorical_crossentropy, one_hot, logits[0], from_logits=True
            )
            loss += cross_entropy()
            objective += cross_entropy(label_smoothing=config.label_smoothing)
        objective += config.doubly_stochastic * tf.reduce_sum((1 - attention_sum) ** 2)
    num_words = np.count_nonzero(batch.tokens[:, 1:])
    return loss / num_words, objective / num_words


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("decoder", "settings"),
    [
        ("fused", {"label_smoothing": 0.2, "doubly_stochastic": 2.0}),
        ("plain", {}),
        pytest.param("fused", {}, marks=slow),
        pytest.param("fused", {"label_smoothing": 0.2}, marks=slow),
        pytest.param("fused", {"doubly_stochastic": 2.0}, marks=slow),
        pytest.param("jit", {"doubly_stochastic": 2.0}, marks=slow),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value) or "default",
)
def test_train_step_is_adam_on_the_mean_loss_over_words(small_model, batch, make_step, decoder, settings):
    config = TrainConfig(**settings, jit="on" if decoder == "jit" else "off")
    small_model.decoder.fused = decoder == "fused"
    before = read_weights(small_model)
    state, train_step = make_step(small_model, FusedAdam(1e-2, global_clipnorm=0.1), config, ema_decay=0.5)
    train_step(batch)
    after = read_weights(small_model)

    for variable, value in zip(small_model.trainable_variables, before, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        loss, objective = eager_objective(small_model, batch, config)
    gradients = [tf.convert_to_tensor(g) for g in tape.gradient(objective, small_model.trainable_variables)]
    norm = tf.linalg.global_norm(gradients)
    assert norm > 0.1, "the gradients are too small to be clipped"
    for gradient, old, new in zip(gradients, before, after, strict=True):
        clipped = gradient.numpy() * 0.1 / norm.numpy()
        expected = old - 1e-2 * clipped / (np.abs(clipped) + 1e-7 / np.sqrt(1e-3))  # Adam's first step, in Keras's form
        is_certain = np.abs(clipped) > 1e-6  # elsewhere rounding decides the direction
        np.testing.assert_allclose(new[is_certain], expected[is_certain], rtol=1e-3, atol=2e-4)
    assert state.progress.mean_loss() == pytest.approx(float(loss), rel=1e-5)
    assert state.progress.get("token_count") == np.count_nonzero(batch.tokens[:, 1:])
    assert state.progress.get("step") == 1
    # At first the average moves by 1 - 2 / 11, more than its decay of 0.5 allows later.
    for old, new, shadow in zip(before, after, state.ema.shadow, strict=True):
        np.testing.assert_allclose(shadow, old + (1 - 2 / 11) * (new - old), rtol=1e-3, atol=1e-6)


# Hard attention.


def eager_hard_objective(caption_model, batch, config, baseline):
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
            objective -= log_prob + config.entropy_weight * entropy
            if outputs.is_sampled[row[b, t], 0]:
                sampled_log_probs.append(float(log_prob))
                advantage = sum(float(later) - baseline for later in caption_log_probs[t:])
                location = int(tf.argmax(outputs.location_weights[row[b, t]]))
                objective -= config.reinforce_weight * advantage * tf.math.log(attention_weights[location])
    return objective / lengths.sum(), sampled_log_probs


def test_train_step_of_hard_attention_follows_the_estimate(hard_model, batch, make_step, rng):
    num_steps = batch.tokens.shape[1] - 1
    gumbel = tf.constant(rng.gumbel(size=(num_steps, 3, 64)).astype(np.float32))
    noise = SamplingNoise(gumbel, tf.constant([[True], [False], [True]]))
    hard_model.decoder.attention.sample_noise = lambda *_: noise
    config = TrainConfig(reinforce_weight=0.7, entropy_weight=0.3, clip_norm=1e9)
    state, train_step = make_step(hard_model, tf.keras.optimizers.SGD(1.0), config)
    state.progress.baseline.assign(-1.5)
    before = read_weights(hard_model)
    train_step(batch)
    after = read_weights(hard_model)

    for variable, value in zip(hard_model.trainable_variables, before, strict=True):
        variable.assign(value)
    with tf.GradientTape() as tape:
        objective, sampled_log_probs = eager_hard_objective(hard_model, batch, config, baseline=-1.5)
    gradients = tape.gradient(objective, hard_model.trainable_variables)
    for variable, old, new, gradient in zip(hard_model.trainable_variables, before, after, gradients, strict=True):
        gradient = tf.convert_to_tensor(gradient)
        np.testing.assert_allclose(old - new, gradient, rtol=1e-3, atol=2e-6, err_msg=variable.path)
    assert state.progress.get("baseline") == pytest.approx(0.9 * -1.5 + 0.1 * np.mean(sampled_log_probs), rel=1e-4)


@pytest.mark.slow
def test_train_step_moves_the_baseline_to_the_log_prob_of_sampled_words(hard_model, tokenizer, batch, make_step):
    optimizer = tf.keras.optimizers.SGD(0.0)  # the model stays as it is
    state, train_step = make_step(hard_model, optimizer, TrainConfig())
    train_step(batch)
    log_prob = -math.log(len(tokenizer))
    assert state.progress.get("baseline") == pytest.approx(0.1 * log_prob, rel=0.1)
    for _ in range(60):
        train_step(batch)
    assert state.progress.get("baseline") == pytest.approx(log_prob, rel=0.1)


# Float16.


@pytest.mark.slow
def test_train_step_that_overflows_in_float16_changes_nothing(batch, tokenizer, make_step):
    tf.keras.utils.set_random_seed(1)  # some captions are sampled in every step
    config = TrainConfig(mixed_precision=True)
    model_config = ModelConfig(len(tokenizer), embedding_dim=4, units=6, attention="hard")
    caption_model = model.build(model_config, mixed_precision=True)
    state, train_step = make_step(caption_model, make_optimizer(1e-2, 5.0, mixed_precision=True), config, 0.9)
    bias, scale = caption_model.encoder.fc.bias, state.optimizer.dynamic_scale
    kept = [*caption_model.trainable_variables, *state.optimizer.inner_optimizer.variables, *state.ema.variables]
    kept += [state.progress.loss_sum, state.progress.token_count, state.progress.baseline]
    for bias_value, first_scale, message in ((0, 1e30, "the gradients overflow"), (1e30, 1024, "so does the loss")):
        bias.assign(tf.fill(bias.shape, bias_value))
        scale.assign(first_scale)
        before = [np.array(variable) for variable in kept]
        train_step(batch)
        for variable, old in zip(kept, before, strict=True):
            np.testing.assert_array_equal(variable, old, err_msg=message)
        assert float(scale) == pytest.approx(first_scale / 2)

    bias.assign(tf.zeros_like(bias))
    train_step(batch)
    assert state.progress.mean_loss() == pytest.approx(math.log(len(tokenizer)), rel=0.3)
    assert state.progress.get("baseline") < 0
    assert state.ema.num_updates.numpy() == 1 and state.progress.get("step") == 3


@pytest.mark.slow
def test_train_step_teaches_the_papers_lstm_with_hard_attention(batch, tokenizer, make_step):
    tf.keras.utils.set_random_seed(0)
    config = ModelConfig(len(tokenizer), embedding_dim=16, units=32, attention="hard", decoder="paper", cell="lstm")
    state, train_step = make_step(model.build(config), make_optimizer(1e-2, 5.0, False), TrainConfig())
    losses = []
    for _ in range(30):
        train_step(batch)
        losses.append(state.progress.mean_loss())
        state.progress.reset_epoch()
    assert losses[0] == pytest.approx(math.log(len(tokenizer)), rel=0.1)
    assert losses[-1] < 0.5 * losses[0]


# All combinations.


@pytest.mark.slow
@pytest.mark.parametrize("jit", ["off", "on"])
@pytest.mark.parametrize("mixed_precision", [False, True])
@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_train_step_of_every_combination_is_finite(
    captions, cache, tokenizer, make_step, attention, mixed_precision, jit
):
    config = TrainConfig(jit=jit, mixed_precision=mixed_precision, doubly_stochastic=1.0, label_smoothing=0.1)
    model_config = ModelConfig(len(tokenizer), embedding_dim=4, units=6, dropout=0.1, attention=attention)
    caption_model = model.build(model_config, mixed_precision=mixed_precision)
    caption_model.decoder.fused = attention == "soft" and jit == "off"
    state, train_step = make_step(caption_model, make_optimizer(1e-2, 5.0, mixed_precision), config)
    before = read_weights(caption_model)
    batches = make_epoch_batches(captions, 3, 0, 0)[:1]
    (batch,) = make_dataset(captions, batches, cache.read, static_shapes=jit == "on")
    for _ in range(3):  # in mixed precision the first steps may be left out, until the loss scale is small enough
        train_step(batch)
    assert state.progress.mean_loss() == pytest.approx(math.log(len(tokenizer)), rel=0.3)
    for variable, old in zip(caption_model.trainable_variables, before, strict=True):
        new = variable.numpy()
        assert np.isfinite(new).all()
        assert np.any(old != new) or variable is caption_model.decoder.attention.V.bias, variable.path
