"""Another decoder is one changed function, `RNNDecoder.step`: training and captioning take it as it is."""

import numpy as np
import pytest
from helpers.decoders import GatedDecoder
from helpers.runs import read_history, run_training

import inference
import model
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import START_ID
from captioning.config.settings import DecodeConfig, ModelConfig
from captioning.decoder.decoding import forbidden_tokens


@pytest.fixture
def data(dataset, cache, tokenizer):
    return dataset, cache, tokenizer


@pytest.fixture
def features(dataset, cache):
    """The features of three images."""
    paths = [str(cache.path(example.image_path)) for example in dataset.split("val")[:3]]
    return cache.read(tf.constant(paths))


def follow_step(caption_model, features, tokens):
    """Runs the decoder's step, without the code of captioning; returns log p and attention of each token."""
    decoder = caption_model.decoder
    images = decoder.attention.encode(caption_model.encoder(tf.cast(features, tf.float32)))
    state = decoder.initial_state(images)
    forbidden = forbidden_tokens(caption_model.config.vocab_size)
    previous, log_probs, attention = START_ID, [], []
    for token in tokens:
        dec_input = decoder.embedding(tf.constant([previous]))
        output, state, attention_weights = decoder.step(dec_input, images, state)
        logits = tf.where(forbidden, -np.inf, decoder.to_logits(output))
        log_probs.append(tf.nn.log_softmax(logits)[0, token])
        attention.append(attention_weights[0])
        previous = token
    return np.array(log_probs), np.array(attention)


def assert_captions_follow_step(run, features, config):
    """Compares probabilities and attention of captions with `follow_step`."""
    caption_model, tokenizer, _ = inference.load_run(run)
    captions = inference.decode_captions(caption_model, tokenizer, features, config)
    for number, caption in enumerate(captions):
        tokens = [tokenizer.word_index[word] for word in caption.words]
        log_probs, attention = follow_step(caption_model, features[number : number + 1], tokens)
        assert len(caption.words) > 0
        np.testing.assert_allclose(np.log(caption.probabilities), log_probs, rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(caption.attention, attention, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_gated_decoder_trains_and_captions(data, features, tmp_path, monkeypatch, capsys):
    """The gate of section 4.2.1 has weights, which are trained, saved and restored."""
    monkeypatch.setattr(model, "RNNDecoder", GatedDecoder)
    assert not model.fused_decoder_matches(ModelConfig())
    run = run_training(tmp_path / "run", data, epochs=2, dropout=0.2, ema_decay=0.5)
    log = capsys.readouterr().err
    assert "fused_decoder.py differs from GatedDecoder.step in model.py: training with the plain loop" in log
    rows = read_history(run)
    assert float(rows[-1]["val_loss"]) < float(rows[0]["val_loss"])

    caption_model, _, _ = inference.load_run(run)
    assert np.abs(caption_model.decoder.gate.bias).max() > 0, "the gate is not trained"
    for config in (DecodeConfig(), DecodeConfig(beam_size=3)):
        assert_captions_follow_step(run, features, config)
