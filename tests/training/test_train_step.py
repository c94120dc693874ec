"""The training step of train.py, compiled and with its input pipeline, against plain eager TensorFlow."""

import functools
import itertools
import math

import numpy as np
import pytest
from helpers.steps import make_step, read_weights

import model
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.training.input_pipeline import choose_shapes, encode_captions, make_dataset, make_epoch_batches
from captioning.training.objective import CrossEntropy
from captioning.training.optimizer import FusedAdam, make_optimizer


@pytest.fixture
def captions(dataset, tokenizer, cache):
    return encode_captions(dataset.split("train"), tokenizer.encode, cache.path)


@pytest.fixture
def batch(captions, cache):
    """The first batch of three captions."""
    return next(iter(make_dataset(captions, make_epoch_batches(captions, 3, 0, 0), cache.read)))


def eager_objective(caption_model, batch, config):
    """Computes the mean loss and its regularised form, caption by caption and word by word."""
    loss = objective = 0.0
    for image, caption in zip(batch.image_index.numpy(), batch.tokens, strict=True):
        caption = caption[: np.count_nonzero(caption)]
        images = caption_model.encode(batch.features[image : image + 1])
        state = caption_model.initial_state(images)
        for token, target in itertools.pairwise(caption):
            logits, state, _ = caption_model.step(token[tf.newaxis], images, state)
            one_hot = tf.one_hot(target, caption_model.config.vocab_size)
            cross_entropy = functools.partial(
                tf.keras.losses.categorical_crossentropy, one_hot, logits[0], from_logits=True
            )
            loss += cross_entropy()
            objective += cross_entropy(label_smoothing=config.label_smoothing)
    num_words = np.count_nonzero(batch.tokens[:, 1:])
    return loss / num_words, objective / num_words


slow = pytest.mark.slow


@pytest.mark.parametrize(
    ("decoder", "label_smoothing"),
    [("plain", 0.0), pytest.param("fused", 0.2, marks=slow), pytest.param("jit", 0.0, marks=slow)],
)
def test_train_step_is_adam_on_the_mean_loss_over_words(small_model, captions, cache, batch, decoder, label_smoothing):
    config = TrainConfig(label_smoothing=label_smoothing, jit="on" if decoder == "jit" else "off")
    small_model.decoder.fused = decoder == "fused"
    before = read_weights(small_model)
    adam = FusedAdam(1e-2, global_clipnorm=0.1)
    state, train_step = make_step(small_model, adam, CrossEntropy(config), captions, cache, ema_decay=0.5)
    train_step(batch._replace(order=None) if decoder == "jit" else batch)
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


@pytest.mark.slow
def test_train_step_that_overflows_in_float16_changes_nothing(captions, cache, batch, tokenizer):
    config = TrainConfig(mixed_precision=True)
    caption_model = model.build(ModelConfig(len(tokenizer), embedding_dim=4, units=6), mixed_precision=True)
    adam = make_optimizer(1e-2, 5.0, mixed_precision=True)
    state, train_step = make_step(caption_model, adam, CrossEntropy(config), captions, cache, 0.9)
    bias, scale = caption_model.encoder.fc.bias, state.optimizer.dynamic_scale
    kept = [*caption_model.trainable_variables, *state.optimizer.inner_optimizer.variables, *state.ema.variables]
    kept += [state.progress.loss_sum, state.progress.token_count]
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
    assert state.ema.num_updates.numpy() == 1 and state.progress.get("step") == 3


@pytest.mark.slow
def test_train_step_in_mixed_precision_with_xla_is_finite(captions, cache, tokenizer):
    config = TrainConfig(jit="on", mixed_precision=True, label_smoothing=0.1)
    model_config = ModelConfig(len(tokenizer), embedding_dim=4, units=6, dropout=0.1)
    caption_model = model.build(model_config, mixed_precision=True)
    caption_model.decoder.fused = False
    adam = make_optimizer(1e-2, 5.0, mixed_precision=True)
    state, train_step = make_step(caption_model, adam, CrossEntropy(config), captions, cache)
    before = read_weights(caption_model)
    batches = make_epoch_batches(captions, 3, 0, 0)[:1]
    (batch,) = make_dataset(captions, batches, cache.read, choose_shapes(captions, batches))
    for _ in range(3):  # the first steps may be left out, until the loss scale is small enough
        train_step(batch)
    assert state.progress.mean_loss() == pytest.approx(math.log(len(tokenizer)), rel=0.3)
    for variable, old in zip(caption_model.trainable_variables, before, strict=True):
        new = variable.numpy()
        assert np.isfinite(new).all()
        assert np.any(old != new) or variable is caption_model.decoder.attention.V.bias, variable.path
