import math

import numpy as np
import pytest
from helpers.references import dense, gru, unpack

import model
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from captioning.decoder.losses import loss_function
from model import BahdanauAttention


def make_features(rng, num_images=3):
    return tf.constant(rng.normal(size=(num_images, 64, 2048)).astype(np.float32))


def make_tokens(rng, num_captions=3, length=7):
    return tf.constant(rng.integers(4, 30, (num_captions, length)), tf.int32)


def mean_loss(caption_model, features, tokens, image_index=None):
    outputs = caption_model(features, tokens, image_index)
    losses, mask = loss_function(outputs.logits, outputs.targets)
    return tf.reduce_sum(losses) / tf.reduce_sum(mask)


@pytest.fixture
def plain_model():
    """A small model that trains with the plain loop."""
    tf.keras.utils.set_random_seed(1)
    return model.build(ModelConfig(vocab_size=30, embedding_dim=8, units=12))


@pytest.fixture(params=["plain", "fused"])
def caption_model(plain_model, request):
    """The same model with either decoder."""
    plain_model.decoder.fused = request.param == "fused"
    return plain_model


# The parts.


def test_build_gives_the_tutorials_architecture(rng):
    caption_model = model.build(ModelConfig())
    features = make_features(rng, 16)
    encoded = caption_model.encoder(features)
    assert encoded.shape == (16, 64, 256)
    state = caption_model.initial_state(caption_model.encode(features))
    logits, state, weights = caption_model.decoder(tf.zeros((16, 1), tf.int32), encoded, state)
    assert (logits.shape, state.shape, weights.shape) == ((16, 5000), (16, 512), (16, 64))
    assert caption_model(features, tf.ones((16, 4), tf.int32)).logits.shape == (16 * 3, 5000)
    shapes = [tuple(variable.shape) for variable in caption_model.trainable_variables]
    for expected in ((2048, 256), (5000, 256), (512, 1536), (512, 512), (512, 5000), (256, 512), (512, 1)):
        assert expected in shapes, "the tutorial's architecture has changed"


def test_main_prints_shapes(capsys):
    model.main(["--vocab-size", "20", "--units", "6"])
    lines = capsys.readouterr().out.splitlines()
    assert "decoder logits     (16, 20)" in lines
    assert "decoder state      (16, 6)" in lines


def test_build_restores_the_dtype_policy(rng):
    mixed_model = model.build(ModelConfig(20, 4, 6), mixed_precision=True)
    assert mixed_model.compute_dtype == "float16"
    assert {variable.dtype for variable in mixed_model.trainable_variables} == {"float32"}
    features, tokens = make_features(rng), tf.zeros(3, tf.int32)
    images = mixed_model.encode(features)
    outputs = mixed_model.step(tokens, images, mixed_model.initial_state(images))
    assert {output.dtype for output in outputs} == {tf.float32}
    assert tf.keras.config.dtype_policy().name == "float32"
    assert model.build(ModelConfig(20, 4, 6)).compute_dtype == "float32"


# Attention.


def test_bahdanau_attention_matches_hand_computed_values():
    attention = BahdanauAttention(2)
    features, state = tf.constant([[[1.0, 0.0], [0.0, 2.0]]]), tf.constant([[0.5]])
    attention(attention.encode(features), state)
    attention.W1.set_weights([np.eye(2), np.zeros(2)])
    attention.W2.set_weights([np.array([[1.0, -1.0]]), np.zeros(2)])
    attention.V.set_weights([np.array([[1.0], [2.0]]), np.zeros(1)])
    scores = [math.tanh(1.5) + 2 * math.tanh(-0.5), math.tanh(0.5) + 2 * math.tanh(1.5)]
    first = math.exp(scores[0]) / sum(map(math.exp, scores))
    context_vector, attention_weights = attention(attention.encode(features), state)
    np.testing.assert_allclose(attention_weights, [[first, 1 - first]], rtol=1e-5)
    np.testing.assert_allclose(context_vector, [[first, 2 * (1 - first)]], rtol=1e-5)


# Teacher forcing.


def reference_logits(caption_model, features, tokens):
    """Teacher forcing as the tutorial writes it, word by word and with nothing computed ahead, in NumPy."""
    encoder, decoder = caption_model.encoder, caption_model.decoder
    attention = decoder.attention
    encoded = np.maximum(dense(encoder.fc, features), 0)  # (B, L, embedding_dim)
    state = np.zeros((len(features), decoder.units))
    logits = []
    for token in tokens.T:
        hidden = np.tanh(dense(attention.W1, encoded) + dense(attention.W2, state)[:, np.newaxis])  # (B, L, units)
        scores = dense(attention.V, hidden)  # (B, L, 1)
        attention_weights = np.exp(scores - scores.max(1, keepdims=True))
        attention_weights /= attention_weights.sum(1, keepdims=True)
        context_vector = (attention_weights * encoded).sum(1)  # (B, embedding_dim)
        gru_input = np.concatenate([context_vector, decoder.embedding.embeddings.numpy()[token]], -1)
        state = gru(decoder.gru, gru_input, state)
        logits.append(dense(decoder.fc2, dense(decoder.fc1, state)))
    return np.stack(logits, 1)  # (B, T, vocab_size)


def test_teacher_force_matches_a_numpy_reference(caption_model, rng):
    features, tokens = make_features(rng), make_tokens(rng)
    for variable in caption_model.trainable_variables:
        variable.assign(variable + rng.normal(0, 0.1, variable.shape))  # biases, too: they start from zeros
    expected = reference_logits(caption_model, features.numpy(), tokens.numpy()[:, :-1])
    for call in (caption_model, tf.function(caption_model)):
        outputs = call(features, tokens)
        np.testing.assert_allclose(unpack(outputs.logits, outputs, tokens), expected, rtol=1e-3, atol=1e-4)


def test_teacher_force_repeats_images_for_their_captions(caption_model, rng):
    features, tokens = make_features(rng, 2), make_tokens(rng, 3)
    image_index = tf.constant([1, 0, 1])
    outputs = caption_model(features, tokens, image_index)
    expected = caption_model(tf.gather(features, image_index), tokens)
    np.testing.assert_array_equal(outputs.positions, expected.positions)
    np.testing.assert_allclose(outputs.logits, expected.logits, rtol=1e-5, atol=1e-6)


def test_step_matches_teacher_force(caption_model, rng):
    features, tokens = make_features(rng), make_tokens(rng)
    outputs = caption_model(features, tokens)
    expected_logits = unpack(outputs.logits, outputs, tokens)
    expected_weights = unpack(outputs.attention_weights, outputs, tokens)
    images = caption_model.encode(features)
    state = caption_model.initial_state(images)
    for t in range(6):
        logits, state, attention_weights = caption_model.step(tokens[:, t], images, state)
        np.testing.assert_allclose(logits, expected_logits[:, t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(attention_weights, expected_weights[:, t], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(tf.reduce_sum(attention_weights, 1), 1, rtol=1e-5)


@pytest.mark.slow
def test_gradients_reach_all_weights_and_match_finite_differences(caption_model, rng):
    features, tokens = make_features(rng, 2), make_tokens(rng, 2, 4)
    variables = caption_model.trainable_variables

    @tf.function
    def compute_loss():
        return mean_loss(caption_model, features, tokens)

    with tf.GradientTape() as tape:
        loss = compute_loss()
    for variable, gradient in zip(variables, tape.gradient(loss, variables), strict=True):
        if variable is caption_model.decoder.attention.V.bias:
            continue  # it cancels in the softmax
        gradient = tf.convert_to_tensor(gradient)
        assert np.abs(gradient).max() > 0, f"{variable.path} is not trained"
        direction = gradient * (1e-3 / tf.reduce_sum(gradient**2))  # changes the loss by 0.001, to first order
        original = tf.identity(variable)
        variable.assign(original + direction)
        above = compute_loss()
        variable.assign(original - direction)
        below = compute_loss()
        variable.assign(original)
        assert float(above - below) == pytest.approx(2e-3, rel=0.05), variable.path


@pytest.mark.parametrize(("name", "fused"), [("dropout", False), ("feature_dropout", True)])
def test_dropout_acts_in_training_only(rng, name, fused):
    caption_model = model.build(ModelConfig(vocab_size=30, embedding_dim=8, units=12, **{name: 0.5}))
    caption_model.decoder.fused = fused
    features, tokens = make_features(rng), make_tokens(rng, 3, 6)
    first, second = (caption_model(features, tokens).logits for _ in range(2))
    np.testing.assert_array_equal(first, second)
    first, second = (caption_model(features, tokens, training=True).logits for _ in range(2))
    assert np.abs(first - second).max() > 0


def test_initial_loss_is_log_vocab_size(rng):
    caption_model = model.build(ModelConfig(vocab_size=1000))
    tokens = tf.constant(rng.integers(4, 1000, (8, 9)), tf.int32)
    loss = mean_loss(caption_model, make_features(rng, 8), tokens)
    assert float(loss) == pytest.approx(math.log(1000), rel=0.05)
