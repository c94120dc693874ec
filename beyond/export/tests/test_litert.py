"""The LiteRT file captions as inference.py does; what the command refuses."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_saved_model import build_small_cnn

import beyond.export.__main__ as export
import features
from beyond.export import litert
from captioning.base.cli import InputError, run_main
from captioning.base.files import read_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.decoding import decode, expand_beams
from inference import Captioner


def caption_with_litert(path, pixels):
    """Returns the results of a LiteRT file."""
    with pytest.warns(UserWarning, match=r"tf\.lite\.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_path=str(path))
    return interpreter.get_signature_runner("caption")(pixels=pixels)


@pytest.mark.slow
def test_export_writes_a_litert_file_and_its_vocabulary(run, monkeypatch, tmp_path, rng, capsys):
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    monkeypatch.chdir(tmp_path)
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save("photo.png")
    arguments = ["--run", str(run), "--litert", "--max-words", "6"]
    export.main([*arguments, "--beam-size", "3", "--captions", "2"])
    printed = capsys.readouterr()
    assert printed.out == "small.tflite\n" and "vocabulary: small_vocabulary.json" in printed.err
    words = read_json("small_vocabulary.json")
    result = caption_with_litert("small.tflite", features.load_image("photo.png")[np.newaxis])
    captioner = Captioner.load(run, DecodeConfig(beam_size=3, captions=2, max_words=6))
    caption = captioner.caption("photo.png")
    for rank, expected in enumerate((caption, *caption.alternatives)):
        ids = [index for index in result["tokens"][rank] if index > 3]
        assert " ".join(words[index] for index in ids) == expected.text
        np.testing.assert_allclose(result["probabilities"][rank, : len(ids)], expected.probabilities, atol=1e-3)
        np.testing.assert_allclose(result["attention"][rank, : len(ids)], expected.attention, atol=1e-3)
    export.main([*arguments, "--weights", "float16", "--output", "half/small.tflite"])
    sizes = [(tmp_path / path).stat().st_size for path in ("small.tflite", "half/small.tflite")]
    assert sizes[1] < 0.75 * sizes[0]
    assert read_json("half/small_vocabulary.json") == words
    pixels = features.load_image("photo.png")[np.newaxis]
    expected = decode(captioner.model, captioner.extract_features(pixels), DecodeConfig(max_words=6))  # greedy search
    for name, value in caption_with_litert("half/small.tflite", pixels).items():
        np.testing.assert_allclose(value, getattr(expected, name), atol=2e-2)


def test_convert_repeats_the_converters_reason_in_one_line(monkeypatch):
    class Converter:
        def convert(self):
            raise ValueError("no such operation: tf.Magic\nand more")

    model = tf.Module()
    model.caption = tf.function(lambda x: {"y": x}, input_signature=[tf.TensorSpec([1], tf.float32, "x")])
    monkeypatch.setattr(litert, "LiteRTModel", lambda captioner: model)
    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_saved_model", lambda *_, **__: Converter())
    expected = r"cannot take this model with these settings \(no such operation: tf\.Magic\)$"
    with pytest.raises(InputError, match=expected):
        litert.convert(None, "float32")


@pytest.mark.parametrize("token", [0, 10_006])
def test_expand_beams_finds_the_beams_of_a_large_vocabulary(token):
    """The indices are divided in float32, since LiteRT has no division of int64."""
    beam_size, vocab_size = 37, 10_007
    log_probs = np.full((1, beam_size, vocab_size), -np.inf, np.float32)
    log_probs[0, :, token] = -np.arange(beam_size)  # the first beam's is the most probable
    expansion = expand_beams(tf.zeros((1, beam_size)), tf.constant(log_probs), tf.zeros((1, beam_size), tf.bool))
    np.testing.assert_array_equal(expansion.parent, [np.arange(beam_size)])
    np.testing.assert_array_equal(expansion.token, [[token] * beam_size])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "float16"], "--weights is only for --litert"),
        (["--sample"], "--sample cannot be exported"),
        (["--choose", "consensus"], "--choose consensus cannot be exported"),
        (["--litert", "--no-repeat"], "--no-repeat needs"),
        (["--litert", "--output", "."], "expected a file, found a folder"),
        (["--litert", "--output", __file__], "an earlier one of its kind, found something else"),
        (["--litert", "--output", "notes"], "notes_vocabulary.json: expected a new file, or an earlier one"),
        ([], "not a run folder"),
    ],
)
def test_export_refuses_in_one_line(options, message, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("notes_vocabulary.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["beyond.export", "--run", "none", *options])
    with pytest.raises(SystemExit) as end:
        run_main(export.main)
    lines = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]
