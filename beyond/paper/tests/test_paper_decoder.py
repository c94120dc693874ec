"""The decoder of Show, Attend and Tell: against its equations, in search, and in its commands."""

import numpy as np
import pytest
from helpers.references import dense, gru, sigmoid, unpack
from helpers.runs import run_training

import inference
import model
from beyond.paper import __main__ as paper
from beyond.paper import gates as gates_command
from beyond.paper.gates import compute_gates
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import ModelConfig
from captioning.decoder.decoding import beam_search, greedy_search

NUM_LOCATIONS = 4


def make_model(decoder, scale=0.5):
    """Returns a small model of random weights, biases included."""
    config = ModelConfig(vocab_size=30, embedding_dim=8, units=12, decoder=decoder)
    caption_model = model.build(config, (NUM_LOCATIONS, 7))
    rng = np.random.default_rng(1)
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


# The equations.


def lstm(cell, inputs, h, c):
    """Equations 1 to 3 of the paper; Keras has the gates i, f, g and o one after the other."""
    i, f, g, o = np.split(inputs @ cell.kernel.numpy() + h @ cell.recurrent_kernel.numpy() + cell.bias.numpy(), 4, -1)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def follow_paper(caption_model, features, tokens):
    """Computes the paper's equations word by word; returns logits, attention weights and gates, (B, T, ...)."""
    decoder = caption_model.decoder
    attention, is_lstm = decoder.attention, caption_model.config.decoder == "paper-lstm"
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
        cell_input = np.concatenate([z, word], axis=1)
        if is_lstm:
            h, c = lstm(decoder.cell, cell_input, h, c)
        else:
            h = gru(decoder.cell, cell_input, h)
        hidden = np.tanh(word + dense(decoder.L_h, h) + dense(decoder.L_z, z))  # equation 7
        logits.append(dense(decoder.L_o, hidden))
        weights.append(alpha[:, :, 0])
        gates.append(beta[:, 0])
    return tuple(np.stack(values, axis=1) for values in (logits, weights, gates))


@pytest.mark.parametrize("decoder", ["paper", "paper-lstm"])
def test_decoder_matches_the_equations(decoder, features, tokens):
    caption_model = make_model(decoder)
    expected = follow_paper(caption_model, features.numpy(), tokens.numpy()[:, :-1])
    outputs = caption_model(features, tokens)
    for actual, values in zip((outputs.logits, outputs.attention_weights), expected[:2], strict=True):
        np.testing.assert_allclose(unpack(actual, outputs, tokens), values, rtol=1e-4, atol=1e-4)
    images = caption_model.encode(features)
    state = caption_model.initial_state(images)
    for t in range(tokens.shape[1] - 1):
        logits, state, weights = caption_model.step(tokens[:, t], images, state)
        for actual, values in zip((logits, weights), expected[:2], strict=True):
            np.testing.assert_allclose(actual, values[:, t], rtol=1e-4, atol=1e-4)
    assert np.ptp(expected[2]) > 0.1, "the gates hardly differ"
    words = tokens.numpy()[1, 1:].tolist()
    np.testing.assert_allclose(compute_gates(caption_model, features[1:2], words), expected[2][1], rtol=1e-4)
    assert compute_gates(caption_model, features[1:2], []) == []


# Search.


@pytest.mark.slow
def test_searches_follow_the_equations(features):
    caption_model = make_model("paper-lstm", scale=1.5)
    greedy = greedy_search(caption_model, features, max_words=6)
    wide = beam_search(caption_model, features, 3, max_words=6)
    np.testing.assert_array_equal(greedy.tokens, beam_search(caption_model, features, 1, max_words=6).tokens)
    for decoded in (greedy, wide):
        inputs = np.pad(decoded.tokens.numpy()[:, :-1], [(0, 0), (1, 0)], constant_values=START_ID)
        _, attention_weights, _ = follow_paper(caption_model, features.numpy(), inputs)
        is_token = decoded.tokens.numpy() > 0
        np.testing.assert_allclose(
            decoded.attention.numpy()[is_token], attention_weights[is_token], rtol=1e-3, atol=1e-4
        )


# The commands.


@pytest.fixture
def command(dataset, cache, monkeypatch, tmp_path):
    """Runs beyond.paper on the small dataset until the training would begin; returns its arguments."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(paper.train.data_utils, "load_dataset", lambda *_: dataset)
    prepare = paper.train.prepare
    monkeypatch.setattr(paper.train, "prepare", lambda args: prepare(args, lambda *_: (cache, dataset)))

    def run_command(*argv):
        calls = []
        monkeypatch.setattr(paper.train, "train", lambda *args: calls.append(args))
        paper.main([*argv])
        return calls[0]

    return run_command


def test_command_keeps_what_differs_from_train(command, capsys):
    run, _, config, *_ = command("--doubly-stochastic", "1")
    assert (run.name, config.model.decoder, config.objective) == ("coco", "paper", {"doubly_stochastic": 1.0})
    _, _, config, *_ = command("--decoder", "paper-lstm", "--attention", "hard", "--run", "runs/other")
    assert (config.model.decoder, config.model.attention, config.objective) == ("paper-lstm", "hard", {})
    command("--reinforce-weight", "0.5", "--run", "runs/third")
    assert "--reinforce-weight changes nothing without --attention hard" in capsys.readouterr().err


@pytest.mark.slow
def test_gates_are_printed_for_a_run_of_the_papers_decoder(
    dataset, cache, tokenizer, run, tmp_path, monkeypatch, capsys
):
    paper_run = run_training(tmp_path / "paper", (dataset, cache, tokenizer), decoder="paper", epochs=1)
    features = cache.read(tf.constant([str(cache.path(dataset.examples[0].image_path))]))
    monkeypatch.setattr(inference.Captioner, "load_image", lambda *_: np.zeros((299, 299, 3), np.uint8))
    monkeypatch.setattr(inference.Captioner, "extract_features", lambda *_: features)
    capsys.readouterr()
    gates_command.main(["photo.jpg", "--run", str(paper_run), "--min-words", "2"])
    caption, *lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == caption.split()
    assert all(0 < float(line.split()[0]) < 1 for line in lines)
    with pytest.raises(InputError, match="expected a run with the paper's decoder, found the tutorial decoder"):
        gates_command.main(["photo.jpg", "--run", str(run)])
