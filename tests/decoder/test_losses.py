import numpy as np
import pytest

from captioning.base.quiet_tensorflow import tf
from captioning.decoder import fused_loss
from captioning.decoder.losses import cross_entropy, label_smoothing_term, loss_function

TARGETS = tf.constant([4, 5, 0, 6, 3])  # the third is padding


@pytest.fixture
def logits(rng):
    return tf.constant(rng.normal(size=(5, 10)).astype(np.float32))


def test_loss_function_leaves_out_padding(logits):
    losses, mask = loss_function(logits, TARGETS)
    expected = -tf.nn.log_softmax(logits).numpy()[range(5), TARGETS]
    np.testing.assert_allclose(losses, expected * [1, 1, 0, 1, 1], rtol=1e-5)
    np.testing.assert_array_equal(mask, [1, 1, 0, 1, 1])


def test_loss_function_computes_in_float32(logits):
    losses, _ = loss_function(tf.cast(logits, tf.float16), TARGETS)
    assert losses.dtype == tf.float32
    np.testing.assert_allclose(losses, loss_function(logits, TARGETS)[0], rtol=1e-2)


@pytest.mark.parametrize("has_gpu", [False, True], ids=["cpu", "gpu"])
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
def test_cross_entropy_and_its_gradient_match_tensorflow(logits, scale, has_gpu, monkeypatch):
    monkeypatch.setattr(fused_loss, "has_gpu", lambda: has_gpu)
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
    losses, mask = loss_function(logits, TARGETS)
    smoothed = tf.reduce_sum(losses) + 0.3 * label_smoothing_term(logits, TARGETS, mask)
    keras_loss = tf.keras.losses.CategoricalCrossentropy(from_logits=True, label_smoothing=0.3, reduction="none")
    expected = (keras_loss(tf.one_hot(TARGETS, 10), logits) * mask).numpy().sum()
    assert float(smoothed) == pytest.approx(expected, rel=1e-5)
