import os
import signal

import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.training import optimizer as optimizer_module
from captioning.training.optimizer import FusedAdam, WeightEMA, make_optimizer


def make_variables():
    return [tf.keras.Variable(np.ones(shape, np.float32)) for shape in ((3, 4), (5,))]


@pytest.mark.parametrize("has_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("clip_norm", [0.5, 1e6], ids=["clipped", "not clipped"])
def test_fused_adam_matches_keras(rng, clip_norm, has_gpu, monkeypatch):
    monkeypatch.setattr(optimizer_module, "has_gpu", lambda: has_gpu)
    steps = [[rng.normal(size=(3, 4)), rng.normal(size=5)] for _ in range(4)]
    results = []
    for make in (FusedAdam, tf.keras.optimizers.Adam):
        optimizer, variables = make(1e-2, global_clipnorm=clip_norm), make_variables()
        optimizer.build(variables)
        for gradients in steps:
            optimizer.apply([tf.constant(gradient, tf.float32) for gradient in gradients], variables)
            optimizer.learning_rate.assign(optimizer.learning_rate * 0.5)
        results.append([variable.numpy() for variable in variables])
    for actual, expected in zip(*results, strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
        assert np.abs(actual - 1).min() > 1e-4


def test_make_optimizer_scales_the_loss_in_mixed_precision_only():
    assert isinstance(make_optimizer(1e-3, 5.0, mixed_precision=False), FusedAdam)
    scaled, variables = make_optimizer(1e-3, 5.0, mixed_precision=True), make_variables()
    scaled.build(variables)
    scale = float(scaled.scale_loss(tf.constant(1.0)))
    assert scale > 1
    overflow = [tf.fill((3, 4), np.inf), tf.zeros(5)]
    scaled.apply(overflow, variables)
    np.testing.assert_array_equal(variables[0], np.ones((3, 4)), "a step with an overflow is left out")
    assert float(scaled.scale_loss(tf.constant(1.0))) < scale


def test_ema_is_swapped_in_only_temporarily(small_model):
    weight = small_model.trainable_variables[0]
    ema = WeightEMA(small_model.trainable_variables, 0.9)
    original = weight.numpy()
    weight.assign(original + 1)
    with ema.applied():
        np.testing.assert_array_equal(weight, original)
    np.testing.assert_array_equal(weight, original + 1)
    with pytest.raises(KeyboardInterrupt), ema.applied():
        raise KeyboardInterrupt
    np.testing.assert_array_equal(weight, original + 1)


def test_ema_is_swapped_out_whole_at_a_second_interrupt(small_model, monkeypatch):
    variables = small_model.trainable_variables
    ema = WeightEMA(variables, 0.9)
    for variable in variables:
        variable.assign(variable + 1)
    expected = [variable.numpy() for variable in variables]
    with pytest.raises(KeyboardInterrupt), ema.applied():
        assign = variables[0].assign
        monkeypatch.setattr(variables[0], "assign", lambda value: (assign(value), os.kill(os.getpid(), signal.SIGINT)))
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_array_equal(variable, value)


def test_ema_follows_quickly_at_first():
    variable = tf.Variable([1.0])
    ema = WeightEMA([variable], 0.25)
    variable.assign([2.0])
    ema.update()
    first = 1 + (1 - 2 / 11)
    np.testing.assert_allclose(ema.shadow[0], [first], rtol=1e-6)
    for _ in range(2):  # the decay is now (1 + 3) / (10 + 3), which is more than 0.25
        ema.update()
    np.testing.assert_allclose(ema.shadow[0], [2 - (2 - first) * (3 / 12) * 0.25], rtol=1e-6)


def test_ema_without_decay_keeps_no_copy(small_model):
    ema = WeightEMA(small_model.trainable_variables, 0.0)
    assert ema.shadow == []
    weight = small_model.trainable_variables[0]
    weight.assign_add(tf.ones_like(weight))
    current = weight.numpy()
    ema.update()
    with ema.applied():
        np.testing.assert_array_equal(weight, current)
