import numpy as np
import pytest
from helpers.decoders import WideDecoder

import model
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from captioning.decoder import fused_decoder

NUM_WORDS = 31  # to predict, in all of `captions`


def make_model(mixed_precision=False):
    """Returns a small model with random weights, biases included, that are far from the linear range of tanh."""
    tf.keras.utils.set_random_seed(1)
    config = ModelConfig(vocab_size=30, embedding_dim=8, units=12)
    caption_model = model.build(config, mixed_precision=mixed_precision)
    for variable in caption_model.trainable_variables:
        variable.assign(2 * variable + 0.1 * tf.random.normal(variable.shape))
    return caption_model


@pytest.fixture
def captions(rng):
    """Features, tokens and image index of captions of different lengths, some of one image, and two that are equal."""
    tokens = rng.integers(4, 30, (7, 7))
    tokens[:, 0] = 2
    tokens[5] = tokens[6]
    for caption, length in zip(tokens, (4, 7, 3, 5, 7, 6, 6), strict=True):
        caption[length:] = 0
    features = tf.constant(rng.normal(size=(3, 64, 2048)).astype(np.float32))
    return features, tf.constant(tokens, tf.int32), tf.constant([0, 0, 1, 1, 2, 0, 0])


def rows_by_position(rows, outputs):
    return {tuple(position): row for position, row in zip(outputs.positions.numpy(), np.array(rows), strict=True)}


def run_decoder(caption_model, captions, compute_loss, fused, graph=False):
    """Returns the outputs of teacher forcing, and the gradients of a loss."""
    caption_model.decoder.fused = fused
    # The bias of V cancels in the softmax, so the fused decoder has no gradient for it.
    variables = [v for v in caption_model.trainable_variables if v is not caption_model.decoder.attention.V.bias]

    def compute():
        with tf.GradientTape() as tape:
            outputs = caption_model(*captions, training=True)
            loss = compute_loss(outputs)
        return outputs, [tf.convert_to_tensor(gradient) for gradient in tape.gradient(loss, variables)]

    return tf.function(compute)() if graph else compute()


def assert_gradients_match(actual, expected, tolerance=1e-5):
    for number, (gradient, expected_gradient) in enumerate(zip(actual, expected, strict=True)):
        atol = tolerance * max(1, np.abs(expected_gradient).max())
        message = f"variable {number}"
        np.testing.assert_allclose(gradient, expected_gradient, rtol=10 * tolerance, atol=atol, err_msg=message)


@pytest.fixture
def compute_loss(captions, rng):
    """A loss of words that depends on the attention weights, too, as a penalty on them does."""
    d_logits = tf.constant(rng.normal(size=(7, 6, 30)), tf.float32)
    d_attention = tf.constant(rng.normal(size=(7, 6, 64)), tf.float32)
    mask = tf.cast(captions[1][:, 1:, tf.newaxis] != 0, tf.float32)  # (7, 6, 1)

    def compute_loss(outputs):
        logits, attention_weights = (tf.cast(rows, tf.float32) for rows in (outputs.logits, outputs.attention_weights))
        weighted_logits = logits * tf.gather_nd(d_logits * mask, outputs.positions)
        weighted_attention = attention_weights * tf.gather_nd(d_attention * mask, outputs.positions)
        return tf.reduce_sum(weighted_logits) + tf.reduce_sum(weighted_attention)

    return compute_loss


@pytest.mark.parametrize("graph", [False, pytest.param(True, marks=pytest.mark.slow)], ids=["eager", "graph"])
def test_fused_decoder_matches_autodiff_of_the_plain_loop(captions, compute_loss, graph):
    caption_model = make_model()
    plain, plain_gradients = run_decoder(caption_model, captions, compute_loss, fused=False)
    fused, fused_gradients = run_decoder(caption_model, captions, compute_loss, fused=True, graph=graph)
    assert len(plain.logits) == 7 * 6
    assert len(fused.logits) == NUM_WORDS, "the fused decoder has no rows for padding"
    for name, atol in (("logits", 1e-5), ("attention_weights", 1e-6)):
        expected = rows_by_position(getattr(plain, name), plain)
        actual = rows_by_position(getattr(fused, name), fused)
        assert len(actual) == NUM_WORDS
        for position, row in actual.items():
            np.testing.assert_allclose(row, expected[position], rtol=1e-4, atol=atol)
    assert_gradients_match(fused_gradients, plain_gradients)


@pytest.mark.slow
def test_fused_decoder_matches_the_plain_loop_in_mixed_precision(captions, compute_loss):
    _, expected = run_decoder(make_model(), captions, compute_loss, fused=False)
    outputs, gradients = run_decoder(make_model(mixed_precision=True), captions, compute_loss, fused=True)
    assert outputs.logits.dtype == tf.float16
    assert_gradients_match(gradients, expected, tolerance=2e-2)


def test_fused_decoder_takes_one_caption_of_one_word(rng):
    features = tf.constant(rng.normal(size=(1, 64, 2048)).astype(np.float32))
    captions = features, tf.constant([[2, 3]]), tf.constant([0])
    caption_model = make_model()

    def compute_loss(outputs):
        return tf.reduce_sum(outputs.logits**2)

    plain, plain_gradients = run_decoder(caption_model, captions, compute_loss, fused=False)
    fused, fused_gradients = run_decoder(caption_model, captions, compute_loss, fused=True)
    np.testing.assert_allclose(fused.logits, plain.logits, rtol=1e-4, atol=1e-5)
    assert_gradients_match(fused_gradients, plain_gradients)


def test_order_words_goes_step_after_step_and_longest_first():
    order = fused_decoder.order_words(np.array([[2, 5, 3, 0, 0], [2, 6, 7, 8, 3], [2, 9, 3, 0, 0], [2, 3, 0, 0, 0]]))
    assert order.longest_first.tolist() == [1, 0, 2, 3], "captions of the same length keep their order"
    assert order.num_active.tolist() == [4, 3, 1, 1] and order.step_start.tolist() == [0, 4, 7, 8]
    assert order.positions.tolist() == [[1, 0], [0, 0], [2, 0], [3, 0], [1, 1], [0, 1], [2, 1], [1, 2], [1, 3]]
    assert order.ranks.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [0, 1], [1, 1], [2, 1], [0, 2], [0, 3]]
    assert {array.dtype for array in order} == {np.dtype(np.int32)}


def test_teacher_force_takes_an_order_that_is_computed_beforehand(captions):
    caption_model = make_model()
    caption_model.decoder.fused = True
    order = fused_decoder.WordOrder(*map(tf.constant, fused_decoder.order_words(captions[1].numpy())))
    for actual, expected in zip(caption_model(*captions, order=order), caption_model(*captions), strict=True):
        np.testing.assert_array_equal(actual, expected)


# Whether the fused decoder computes what RNNDecoder.step does.


def test_fused_decoder_matches_is_true_as_it_is():
    assert model.fused_decoder_matches(ModelConfig(dropout=0.5))


def test_fused_decoder_matches_is_false_for_weights_of_other_shapes(monkeypatch):
    monkeypatch.setattr(model, "RNNDecoder", WideDecoder)
    assert not model.fused_decoder_matches(ModelConfig())


def test_fused_decoder_matches_is_false_once_it_is_changed(monkeypatch):
    backward_step = fused_decoder.backward_step
    monkeypatch.setattr(fused_decoder, "backward_step", lambda first, *args: backward_step(1.1 * first, *args))
    assert not model.fused_decoder_matches(ModelConfig())
