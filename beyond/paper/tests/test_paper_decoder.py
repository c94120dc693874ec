"""The decoder of Show, Attend and Tell: against its equations, in training, and in search."""

import dataclasses
import io

import numpy as np
import pytest
from helpers.runs import LossRecorder, read_history, run_training
from PIL import Image
from test_exported_model import build_small_cnn, export

import inference
import model
from beyond.export.litert_model import LiteRTModel, convert
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import DecodeConfig, ModelConfig
from captioning.decoder.decoding import beam_search, greedy_search
from captioning.runs.run_folder import init_run_dir, read_config

CONFIG = ModelConfig(vocab_size=30, embedding_dim=8, units=12, decoder="paper")
NUM_LOCATIONS = 4
CELLS = pytest.mark.parametrize("cell", ["gru", "lstm"])


def make_model(seed=1, scale=0.5, mixed_precision=False, **settings):
    """Returns a small model of random weights, biases included."""
    caption_model = model.build(dataclasses.replace(CONFIG, **settings), (NUM_LOCATIONS, 7), mixed_precision)
    rng = np.random.default_rng(seed)
    for variable in caption_model.trainable_variables:
        variable.assign(rng.normal(0, scale, variable.shape))
    return caption_model


@pytest.fixture
def features(rng):
    return tf.constant(rng.normal(size=(3, NUM_LOCATIONS, 7)), tf.float32)


@pytest.fixture
def tokens(rng):
    tokens = rng.integers(4, 30, (3, 7))
    tokens[:, 0] = START_ID
    return tf.constant(tokens, tf.int32)


def unpack(rows, outputs, tokens):
    """Unpacks rows (N, ...) of outputs to (B, T, ...)."""
    return tf.scatter_nd(outputs.positions, rows, (tokens.shape[0], tokens.shape[1] - 1, *rows.shape[1:])).numpy()


# The equations.


def dense(layer, inputs):
    return inputs @ layer.kernel.numpy() + (layer.bias.numpy() if layer.use_bias else 0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def lstm(cell, inputs, h, c):
    """Equations 1 to 3 of the paper; Keras has the gates i, f, g and o one after the other."""
    i, f, g, o = np.split(inputs @ cell.kernel.numpy() + h @ cell.recurrent_kernel.numpy() + cell.bias.numpy(), 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def gru(cell, inputs, h, c):
    bias, recurrent_bias = cell.bias.numpy()
    x_z, x_r, x_g = np.split(inputs @ cell.kernel.numpy() + bias, 3, -1)
    u_z, u_r, u_g = np.split(h @ cell.recurrent_kernel.numpy() + recurrent_bias, 3, -1)
    update = sigmoid(x_z + u_z)
    return update * h + (1 - update) * np.tanh(x_g + sigmoid(x_r + u_r) * u_g), c


def follow_paper(caption_model, features, tokens):
    """Computes the paper's equations word by word; returns logits, attention weights and gates, (B, T, ...)."""
    decoder = caption_model.decoder
    attention, is_lstm = decoder.attention, caption_model.config.cell == "lstm"
    a = np.maximum(dense(caption_model.encoder.fc, features), 0)  # (B, L, embedding_dim): the annotation vectors a_i
    h = np.tanh(dense(decoder.f_init_h, a.mean(axis=1)))  # section 3.1.2
    c = np.tanh(dense(decoder.f_init_c, a.mean(axis=1))) if is_lstm else None
    logits, weights, gates = [], [], []
    for token in tokens.T:
        e = dense(attention.V, np.tanh(dense(attention.W1, a) + dense(attention.W2, h)[:, np.newaxis]))  # equation 4
        alpha = np.exp(e) / np.exp(e).sum(axis=1, keepdims=True)  # (B, L, 1), equation 5
        beta = sigmoid(dense(decoder.f_beta, h))  # (B, 1), section 4.2.1
        z = beta * (alpha * a).sum(axis=1)  # (B, embedding_dim)
        word = decoder.embedding.embeddings.numpy()[token]
        h, c = (lstm if is_lstm else gru)(decoder.cell, np.concatenate([z, word], axis=1), h, c)
        hidden = np.tanh(word + dense(decoder.L_h, h) + dense(decoder.L_z, z))  # equation 7
        logits.append(dense(decoder.L_o, hidden))
        weights.append(alpha[:, :, 0])
        gates.append(beta[:, 0])
    return tuple(np.stack(values, axis=1) for values in (logits, weights, gates))


@CELLS
def test_teacher_force_matches_the_equations(cell, features, tokens):
    caption_model = make_model(cell=cell)
    logits, attention_weights, _ = follow_paper(caption_model, features.numpy(), tokens.numpy()[:, :-1])
    outputs = caption_model(features, tokens)
    np.testing.assert_allclose(unpack(outputs.logits, outputs, tokens), logits, rtol=1e-4, atol=1e-4)
    weights = unpack(outputs.attention_weights, outputs, tokens)
    np.testing.assert_allclose(weights, attention_weights, rtol=1e-4, atol=1e-5)


@CELLS
def test_step_matches_the_equations_and_returns_the_gate(cell, features, tokens):
    caption_model = make_model(cell=cell)
    expected = follow_paper(caption_model, features.numpy(), tokens.numpy()[:, :-1])
    images = caption_model.encode(features)
    state = caption_model.initial_state(images)
    assert np.ptp(expected[2]) > 0.1, "the gates hardly differ"
    for t in range(tokens.shape[1] - 1):
        logits, state, weights = caption_model.step(tokens[:, t], images, state)
        assert weights.shape == (3, NUM_LOCATIONS + 1)
        step_values = logits, weights[:, :-1], weights[:, -1]
        for actual, values in zip(step_values, expected, strict=True):
            np.testing.assert_allclose(actual, values[:, t], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_a_closed_gate_hides_the_image_but_for_the_first_state(features, tokens):
    caption_model = make_model()
    decoder, same_tokens = caption_model.decoder, tf.repeat(tokens[:1], 3, axis=0)

    def spread():
        """Returns by how much the logits of the three images differ at most."""
        outputs = caption_model(features, same_tokens)
        return np.ptp(unpack(outputs.logits, outputs, same_tokens), axis=0).max()

    decoder.f_init_h.kernel.assign(tf.zeros_like(decoder.f_init_h.kernel))
    assert spread() > 0.1
    decoder.f_beta.bias.assign([-100.0])
    assert spread() < 1e-5
    decoder.f_init_h.kernel.assign(tf.ones_like(decoder.f_init_h.kernel))
    assert spread() > 0.01


# Training.


@pytest.mark.slow
@pytest.mark.parametrize(("cell", "attention"), [("gru", "hard"), ("lstm", "soft")])
def test_gradients_reach_all_weights(cell, attention, features, tokens):
    caption_model = make_model(cell=cell, attention=attention, dropout=0.2)
    with tf.GradientTape() as tape:
        outputs = caption_model(features, tokens, training=True)
        # The attention's own weights are in the loss, since a location that is sampled has no gradient.
        loss = tf.reduce_sum(outputs.logits[:, 5] + tf.reduce_sum(outputs.attention_weights**2, axis=1))
    for variable, gradient in zip(
        caption_model.trainable_variables, tape.gradient(loss, caption_model.trainable_variables), strict=True
    ):
        is_used = variable is not caption_model.decoder.attention.V.bias  # which cancels in the softmax
        assert not is_used or np.abs(tf.convert_to_tensor(gradient)).max() > 0, f"{variable.path} is not trained"


@pytest.mark.slow
def test_dropout_acts_in_training_only(features, tokens):
    caption_model = make_model(dropout=0.5)
    without = make_model(dropout=0.0)(features, tokens).logits
    np.testing.assert_array_equal(caption_model(features, tokens).logits, without)
    first, second = (caption_model(features, tokens, training=True).logits for _ in range(2))
    assert np.abs(first - second).max() > 0


@pytest.mark.slow
def test_mixed_precision_computes_nearly_the_same(features, tokens):
    outputs = make_model(mixed_precision=True)(features, tokens)
    assert outputs.logits.dtype == tf.float16
    np.testing.assert_allclose(outputs.logits, make_model()(features, tokens).logits, rtol=0.1, atol=0.05)


@pytest.mark.slow
def test_training_lowers_the_loss(dataset, cache, tokenizer, tmp_path, capsys):
    decoders, recorder = [], LossRecorder()

    def on_step(state):
        decoders.append(state.model.decoder)
        recorder(state)

    settings = {"decoder": "paper", "epochs": 2, "embedding_dim": 32}
    run = run_training(tmp_path / "run", (dataset, cache, tokenizer), on_step, **settings)
    assert np.mean(recorder.losses[-3:]) < 0.8 * np.mean(recorder.losses[:3])
    first, *_, last = (float(row["val_loss"]) for row in read_history(run))
    assert last < first
    assert decoders[0].fused and "differs" not in capsys.readouterr().err
    caption_model, _, _ = inference.load_run(run)
    assert (caption_model.config.decoder, caption_model.config.cell) == ("paper", "gru")


# Search.


@pytest.mark.slow
@CELLS
def test_searches_return_the_gate_of_every_word(cell, features):
    caption_model = make_model(cell=cell, scale=1.5)
    greedy = greedy_search(caption_model, features, max_words=6)
    beam = beam_search(caption_model, features, 1, max_words=6)
    wide = beam_search(caption_model, features, 3, max_words=6)
    np.testing.assert_array_equal(greedy.tokens, beam.tokens)
    for actual, expected in zip(beam[1:], greedy[1:], strict=True):
        is_token = greedy.tokens.numpy() > 0
        np.testing.assert_allclose(actual.numpy()[is_token], expected.numpy()[is_token], rtol=1e-4, atol=1e-6)
    for decoded in (greedy, wide):
        inputs = np.pad(decoded.tokens.numpy()[:, :-1], [(0, 0), (1, 0)], constant_values=START_ID)
        _, attention_weights, gates = follow_paper(caption_model, features.numpy(), inputs)
        is_token = decoded.tokens.numpy() > 0
        np.testing.assert_allclose(decoded.gates.numpy()[is_token], gates[is_token], rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(
            decoded.attention.numpy()[is_token], attention_weights[is_token], rtol=1e-3, atol=1e-4
        )


@pytest.mark.slow
@pytest.mark.parametrize("config", [DecodeConfig(beam_size=2), DecodeConfig(sample=True, captions=2)])
def test_captions_have_the_gate(config, tokenizer, rng):
    image_features = tf.constant(rng.normal(size=(2, NUM_LOCATIONS, 7)), tf.float32)
    config = dataclasses.replace(config, min_words=2, max_words=4)
    for decoder in ("paper", "tutorial"):
        caption_model = make_model(vocab_size=len(tokenizer), decoder=decoder)
        for caption in inference.decode_captions(caption_model, tokenizer, image_features, config):
            words = caption.to_json()["words"]
            if decoder == "tutorial":
                assert caption.gates is None and not any("gate" in word for word in words)
                continue
            assert len(caption.gates) == len(caption.words) > 0
            assert all(0 < gate < 1 for gate in caption.gates)
            assert [word["gate"] for word in words] == [round(gate, 4) for gate in caption.gates]
            np.testing.assert_allclose(caption.attention.sum(axis=1), 1, rtol=1e-5)


@pytest.fixture
def captioner(tmp_path, run_config, tokenizer, monkeypatch):
    """An untrained run of the paper's decoder with an LSTM, and a small CNN."""
    config = dataclasses.replace(run_config.model, decoder="paper", cell="lstm")
    run = tmp_path / "runs/paper"
    init_run_dir(run, dataclasses.replace(run_config, model=config), tokenizer.save, "imagenet")
    checkpoint = tf.train.Checkpoint(model=model.build(config))
    tf.train.CheckpointManager(checkpoint, str(run / "checkpoints/best"), 1).save()
    monkeypatch.setattr("features.build_feature_extractor", build_small_cnn)
    return inference.Captioner.load(run, DecodeConfig(beam_size=3, captions=2, min_words=2, max_words=5))


@pytest.mark.slow
def test_exports_caption_as_the_captioner(captioner, rng):
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(buffer, "png")
    photo = buffer.getvalue()
    caption = captioner.caption(photo)
    assert caption.gates and caption.alternatives
    of_graph = {name: tensor[0] for name, tensor in export(captioner).caption(tf.constant([photo])).items()}
    parts = captioner.extractor, captioner.model, captioner.decode_config
    litert_model = LiteRTModel(*parts, captioner.config.features["dtype"], captioner.image_size)
    content = convert(litert_model, "float32")
    with pytest.warns(UserWarning, match=r"tf\.lite\.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_content=content)
    of_litert = interpreter.get_signature_runner("caption")(pixels=captioner.load_image(photo)[np.newaxis])
    for rank, expected in enumerate((caption, *caption.alternatives)):
        length = len(expected.words)
        for results in (of_graph, of_litert):
            for name in ("probabilities", "attention", "gates"):
                values = np.asarray(results[name])[rank, :length]
                np.testing.assert_allclose(values, getattr(expected, name), atol=1e-3, err_msg=name)
        assert not np.asarray(of_graph["gates"])[rank, length:].any()


# Settings.


def test_lstm_is_refused_with_the_tutorials_decoder():
    assert ModelConfig(decoder="paper", cell="lstm").cell == "lstm"
    with pytest.raises(InputError, match=r"^cell: lstm is only for the paper's decoder, found the tutorial's$"):
        ModelConfig(cell="lstm")


def test_runs_from_before_these_settings_have_the_tutorials_decoder(run, run_config):
    old = run / "config.json"
    text = old.read_text()
    for setting in ('"decoder": "tutorial",', '"cell": "gru"'):
        assert setting in text
    old.write_text(text.replace('"decoder": "tutorial",', "").replace(',\n    "cell": "gru"', ""))
    assert "decoder" not in old.read_text()
    assert read_config(run).model == run_config.model
    assert (run_config.model.decoder, run_config.model.cell) == ("tutorial", "gru")
    inference.load_run(run)


def test_model_config_can_be_fused_with_soft_attention_and_a_gru():
    for decoder in ("tutorial", "paper"):
        assert ModelConfig(decoder=decoder).can_be_fused
        assert not ModelConfig(decoder=decoder, attention="hard").can_be_fused
    assert not ModelConfig(decoder="paper", cell="lstm").can_be_fused
