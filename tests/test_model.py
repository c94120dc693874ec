import math

import numpy as np
import pytest
import tensorflow as tf

import model
from common import InputError
from losses import next_words, word_losses
from model import BahdanauAttention, Captioner, Chance, CNNEncoder, ModelConfig, RNNDecoder

rng = np.random.default_rng(0)


def mean_loss(captioner, pictures, tokens, picture=None):
    taught = captioner(pictures, tokens, picture)
    losses, real = word_losses(taught, next_words(tokens, taught))
    return tf.reduce_sum(losses) / tf.reduce_sum(real)


def in_place(rows, taught, tokens):
    """Rows (N, ...) of `taught` where they belong, (B, T - 1, ...), with zeros at padding."""
    return tf.scatter_nd(taught.place, rows, (tokens.shape[0], tokens.shape[1] - 1, *rows.shape[1:])).numpy()


def logits_of(taught):
    """(N, vocabulary), of every word."""
    return tf.gather(taught.logits, taught.beginning)


def features(batch=3):
    return tf.constant(rng.normal(size=(batch, 64, 2048)).astype(np.float32))


def test_shapes_of_a_batch_of_16():
    captioner = model.build(ModelConfig(vocabulary_size=5000))
    encoded = captioner.encoder(features(16))
    assert encoded.shape == (16, 64, 256)
    logits, state, weights = captioner.decoder(
        tf.zeros((16, 1), tf.int32), encoded, captioner.decoder.initial_state(16)
    )
    assert (logits.shape, state.shape, weights.shape) == ((16, 5000), (16, 512), (16, 64))
    assert captioner(features(16), tf.ones((16, 8), tf.int32)).logits.shape == (16 * 7, 5000)
    kernels = [tuple(variable.shape) for variable in captioner.trainable_variables]
    for expected in ((2048, 256), (5000, 256), (512, 1536), (512, 512), (512, 5000), (256, 512), (512, 1)):
        assert expected in kernels, "the tutorial's architecture has changed"


def test_the_first_loss_is_that_of_a_guess():
    captioner = model.build(ModelConfig(vocabulary_size=1000))
    tokens = tf.constant(rng.integers(4, 1000, (8, 9)), tf.int32)
    assert float(mean_loss(captioner, features(8), tokens)) == pytest.approx(math.log(1000), rel=0.05)


def test_attention_by_hand():
    attention = BahdanauAttention(2)
    values, hidden = tf.constant([[[1.0, 0.0], [0.0, 2.0]]]), tf.constant([[0.5]])
    attention(values, hidden)
    attention.W1.set_weights([np.eye(2), np.zeros(2)])
    attention.W2.set_weights([np.array([[1.0, -1.0]]), np.zeros(2)])
    attention.V.set_weights([np.array([[1.0], [2.0]]), np.zeros(1)])
    scores = [math.tanh(1.5) + 2 * math.tanh(-0.5), math.tanh(0.5) + 2 * math.tanh(1.5)]
    first = math.exp(scores[0]) / sum(map(math.exp, scores))
    context, weights, looks = attention(values, hidden)
    np.testing.assert_allclose(weights, [[first, 1 - first]], rtol=1e-5)
    np.testing.assert_allclose(context, [[first, 2 * (1 - first)]], rtol=1e-5)
    np.testing.assert_array_equal(looks, weights)


def plain_logits(captioner, pictures, tokens):
    """Teacher forcing as the tutorial writes it, one word after the other and nothing computed ahead, in NumPy."""
    encoder, decoder = captioner.encoder, captioner.decoder
    dense = lambda layer, x: x @ layer.kernel.numpy() + layer.bias.numpy()
    sigmoid = lambda x: 1 / (1 + np.exp(-x))
    encoded = np.maximum(dense(encoder.fc, pictures), 0)
    state = np.zeros((len(pictures), decoder.units))
    kernel, recurrent, (bias, recurrent_bias) = (v.numpy() for v in decoder.gru.trainable_variables)
    result = []
    for t in range(tokens.shape[1]):
        scores = dense(
            decoder.attention.V,
            np.tanh(dense(decoder.attention.W1, encoded) + dense(decoder.attention.W2, state)[:, None]),
        )
        weights = np.exp(scores - scores.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        x = np.concatenate([(weights * encoded).sum(1), decoder.embedding.embeddings.numpy()[tokens[:, t]]], -1)
        xz, xr, xh = np.split(x @ kernel + bias, 3, -1)
        hz, hr, hh = np.split(state @ recurrent + recurrent_bias, 3, -1)
        z = sigmoid(xz + hz)
        state = z * state + (1 - z) * np.tanh(xh + sigmoid(xr + hr) * hh)
        result.append(dense(decoder.fc2, dense(decoder.fc1, state)))
    return np.stack(result, 1)


@pytest.fixture
def captioner():
    tf.keras.utils.set_random_seed(1)
    return model.build(ModelConfig(vocabulary_size=30, embedding_dim=8, units=12))


def test_teacher_forcing_equals_a_plain_reference(captioner):
    pictures, tokens = features(), rng.integers(1, 30, (3, 7))
    expected = plain_logits(captioner, pictures.numpy(), tokens[:, :-1])
    for call in (captioner, tf.function(captioner)):
        taught = call(pictures, tf.constant(tokens, tf.int32))
        np.testing.assert_allclose(in_place(logits_of(taught), taught, tokens), expected, rtol=1e-3, atol=1e-4)


def test_captioning_steps_equal_teacher_forcing(captioner):
    pictures, tokens = features(), tf.constant(rng.integers(1, 30, (3, 7)), tf.int32)
    taught = captioner(pictures, tokens)
    logits_taught, weights_taught = (in_place(rows, taught, tokens) for rows in (logits_of(taught), taught.weights))
    encoded, state = captioner.encode(pictures), captioner.decoder.initial_state(3)
    for t in range(6):
        logits, state, weights = captioner.step(tokens[:, t], state, encoded)
        np.testing.assert_allclose(logits, logits_taught[:, t], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(weights, weights_taught[:, t], rtol=1e-4, atol=1e-6)
        np.testing.assert_allclose(tf.reduce_sum(weights, 1), 1, rtol=1e-5)


def loop_over_cells(captioner, pictures, tokens, picture, chance, row):
    """Teacher forcing of one caption after the other, with `cell`: logits and attention weights by (caption, step)."""
    decoder, found = captioner.decoder, {}
    for b, length in enumerate(np.count_nonzero(tokens, axis=1)):
        encoded, state = captioner.encode(pictures[picture[b] : picture[b] + 1]), decoder.initial_state(1)
        for t in range(length - 1):
            drawn = chance and Chance(chance.noise[row[b, t], tf.newaxis], chance.sampled[b, tf.newaxis])
            state, weights, _ = decoder.cell(decoder.embedding(tokens[b : b + 1, t]), state, encoded, drawn)
            found[b, t] = decoder.to_logits(state)[0], weights[0]
    return found


@pytest.mark.parametrize("attention", ["soft", "hard"])
def test_the_written_gradient_is_that_of_a_loop_over_cells(attention):
    """Captions of different lengths, in any order, some of the same picture, some of which begin alike."""
    tf.keras.utils.set_random_seed(1)
    captioner = model.build(ModelConfig(30, embedding_dim=8, units=12, attention=attention))
    variables = captioner.trainable_variables
    for variable in variables:  # biases too, and far from linear
        variable.assign(2 * variable + 0.1 * tf.random.normal(variable.shape))
    tokens = 4 + (4 * np.arange(7)[:, np.newaxis] + np.arange(-1, 6)) % 26  # no two begin alike
    tokens[:, 0] = 2
    tokens[1, :3] = tokens[0, :3]  # they part after two words
    tokens[4, :3] = tokens[0, :3]  # as another picture's
    tokens[2] = tokens[3]  # one ends where the other goes on
    tokens[5] = tokens[6]  # one and the same
    for caption, length in zip(tokens, (4, 7, 3, 5, 7, 6, 6), strict=True):
        caption[length:] = 0
    tokens, picture, pictures = tf.constant(tokens, tf.int32), tf.constant([0, 0, 1, 1, 2, 0, 0]), features()
    chance = None
    if attention == "hard":
        noise = tf.constant(rng.gumbel(size=(31, 64)).astype(np.float32))
        chance = Chance(noise, tf.constant([[True], [False], [True], [False], [False], [True], [False]]))
        captioner.decoder.attention.draw = lambda *_: chance
    to_logits, to_weights = (tf.random.normal((7, 6, size)) for size in (30, 64))
    with tf.GradientTape(persistent=True) as tape:
        taught = captioner(pictures, tokens, picture, training=True)
        row = {tuple(place): i for i, place in enumerate(taught.place.numpy())}
        plain = loop_over_cells(captioner, pictures, tokens, picture, chance, row)
        ours = tf.reduce_sum(logits_of(taught) * tf.gather_nd(to_logits, taught.place))
        ours += tf.reduce_sum(taught.weights * tf.gather_nd(to_weights, taught.place))
        theirs = tf.add_n(
            [
                tf.reduce_sum(to_logits[p] * logits) + tf.reduce_sum(to_weights[p] * w)
                for p, (logits, w) in plain.items()
            ]
        )
    assert len(row) == 31 and row.keys() == plain.keys()
    # Shared: three words of the first two captions, the first of theirs and the last two's, two and five more.
    assert len(taught.logits) == (31 if attention == "hard" else 31 - 3 - 1 - 2 - 5)
    for place, (logits, weights) in plain.items():
        np.testing.assert_allclose(logits_of(taught)[row[place]], logits, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(taught.weights[row[place]], weights, rtol=1e-4, atol=1e-6)
    for variable, found, expected in zip(
        variables, tape.gradient(ours, variables), tape.gradient(theirs, variables), strict=True
    ):
        found, expected = tf.convert_to_tensor(found), tf.convert_to_tensor(expected)
        tolerance = 1e-5 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=tolerance, err_msg=variable.path)


def test_the_state_is_carried(captioner):
    """In the tutorial's code the GRU starts from zeros at every word."""
    tokens = tf.constant([[5, 7, 9, 3], [6, 7, 9, 3]])
    taught = captioner(features(1), tokens, tf.constant([0, 0]))
    first, second = in_place(logits_of(taught), taught, tokens)
    gru = captioner.decoder.gru
    x = tf.ones((1, gru.kernel.shape[0]))
    assert np.abs(gru(x, [tf.ones((1, 12))])[0] - gru(x, [tf.zeros((1, 12))])[0]).max() > 1e-3
    assert np.abs(first[2] - second[2]).max() > 1e-6, "the third step has forgotten the first word"


def test_gradients_reach_every_weight_and_equal_differences(captioner):
    pictures, tokens = features(2), tf.constant(rng.integers(4, 30, (2, 5)), tf.int32)

    with tf.GradientTape() as tape:
        value = mean_loss(captioner, pictures, tokens)
    gradients = tape.gradient(value, captioner.trainable_variables)
    for variable, gradient in zip(captioner.trainable_variables, gradients, strict=True):
        gradient = tf.convert_to_tensor(gradient)
        if variable.path.endswith("V/bias") or gradient.shape == (1,):
            continue  # the softmax does not see it
        assert np.abs(gradient).max() > 0, f"{variable.path} is not trained"
        direction = gradient * (
            1e-3 / tf.reduce_sum(gradient**2)
        )  # changes the loss by 0.001, if the gradient is right
        before = tf.identity(variable)
        variable.assign(before + direction)
        above = mean_loss(captioner, pictures, tokens)
        variable.assign(before - direction)
        below = mean_loss(captioner, pictures, tokens)
        variable.assign(before)
        assert float(above - below) == pytest.approx(2e-3, rel=0.05), variable.path


def test_padding_a_batch_changes_no_gradient(captioner):
    pictures, tokens = features(2), tf.constant([[2, 4, 5, 3], [2, 6, 3, 0]])

    def gradients(tokens):
        with tf.GradientTape() as tape:
            mean = mean_loss(captioner, pictures, tokens)
        return [tf.convert_to_tensor(g) for g in tape.gradient(mean, captioner.trainable_variables)]

    padded = tf.pad(tokens, [[0, 0], [0, 5]])
    for short, long in zip(gradients(tokens), gradients(padded), strict=True):
        np.testing.assert_allclose(short, long, rtol=1e-4, atol=1e-7)


def test_dropout_is_at_work_in_training_only():
    captioner = model.build(ModelConfig(vocabulary_size=30, embedding_dim=8, units=12, dropout=0.5))
    pictures, tokens = features(), tf.constant(rng.integers(1, 30, (3, 6)), tf.int32)
    logits = lambda **kwargs: captioner(pictures, tokens, **kwargs).logits
    np.testing.assert_array_equal(logits(), logits())
    assert np.abs(logits(training=True) - logits(training=True)).max() > 0


@pytest.mark.parametrize(
    "settings", [{"units": 0}, {"vocabulary_size": "many"}, {"dropout": 1.0}, {"attention": "both"}]
)
def test_impossible_settings(settings):
    with pytest.raises(InputError, match="expected"):
        ModelConfig(**settings)


def test_parts_can_be_used_alone():
    assert CNNEncoder(4)(features()).shape == (3, 64, 4)
    decoder = RNNDecoder(4, 6, 20)
    assert decoder(tf.zeros(3, tf.int32), tf.zeros((3, 64, 4)), decoder.initial_state(3))[0].shape == (3, 20)
    assert isinstance(model.build(ModelConfig(vocabulary_size=20)), Captioner)
