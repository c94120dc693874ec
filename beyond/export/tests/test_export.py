"""The command: each form of an exported run, and what it refuses."""

import json
import sys
import zipfile

import numpy as np
import pytest
from PIL import Image
from test_exported_model import build_small_cnn

import beyond.export.__main__ as export
import features
import inference
from beyond.export.litert_model import LiteRTModel, check_convertible, convert
from captioning.base.cli import InputError, run_main
from captioning.base.files import read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from inference import Captioner


@pytest.fixture
def small_cnn(monkeypatch, tmp_path):
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photo(tmp_path, rng):
    path = tmp_path / "photo.png"
    Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


# A SavedModel.


@pytest.mark.slow
def test_export_writes_a_saved_model_of_the_settings(run, small_cnn, photo, capsys):
    options = ["--beam-size", "3", "--captions", "2", "--max-words", "5", "--min-words", "3"]
    export.main(["--run", str(run), *options])
    printed = capsys.readouterr()
    assert printed.out == "small_saved_model\n"
    assert "fixed in it: beam search, 3 wide, at most 5 words" in printed.err and "size: " in printed.err
    model = tf.saved_model.load("small_saved_model")
    result = model.caption(tf.constant([photo.read_bytes()]))
    config = DecodeConfig(beam_size=3, captions=2, max_words=5, min_words=3)
    caption = Captioner.load(run, config).caption(photo)
    expected = [caption.text, caption.alternatives[0].text]
    assert [text.decode() for text in result["caption"].numpy()[0]] == expected


def test_export_passes_what_the_run_was_trained_with(run, small_cnn, monkeypatch, capsys):
    calls = []
    monkeypatch.setattr(export, "ExportedModel", lambda *args: args)

    def save(model, folder):
        folder.mkdir(parents=True)
        calls.append((*model[2:], folder))

    monkeypatch.setattr(export, "save", save)
    settings = read_json(run / "config.json")
    settings["features"]["jpeg_decoding"] = "scaled"
    write_json(run / "config.json", settings)
    export.main(["--run", str(run), "--output", "out/model"])
    tokenizer, config, dtype, min_jpeg_side, image_size, folder = calls[0]
    assert (min_jpeg_side, image_size) == (598, 299)
    assert (config.max_words, config.num_beams, dtype) == (50, 1, "float16"), "the run's longest caption"
    assert tokenizer.index_word == inference.load_run(run)[1].index_word and str(folder) == "out/model"


# LiteRT.


def caption_with_litert(path, pixels):
    """Returns the results of a LiteRT file."""
    with pytest.warns(UserWarning, match=r"tf\.lite\.Interpreter is deprecated"):
        interpreter = tf.lite.Interpreter(model_path=str(path))
    return interpreter.get_signature_runner("caption")(pixels=pixels)


@pytest.mark.slow
def test_export_writes_a_litert_file_and_its_vocabulary(run, small_cnn, photo, capsys):
    arguments = ["--run", str(run), "--litert", "--beam-size", "3", "--captions", "2", "--max-words", "6"]
    export.main(arguments)
    assert capsys.readouterr().out == "small.tflite\n"
    words = read_json("small_vocabulary.json")
    result = caption_with_litert("small.tflite", features.load_image(photo)[np.newaxis])
    captioner = Captioner.load(run, DecodeConfig(beam_size=3, captions=2, max_words=6))
    caption = captioner.caption(photo)
    for rank, expected in enumerate((caption, *caption.alternatives)):
        ids = [index for index in result["tokens"][rank] if index > 3]
        assert " ".join(words[index] for index in ids) == expected.text
        np.testing.assert_allclose(result["probabilities"][rank, : len(ids)], expected.probabilities, atol=1e-3)
        np.testing.assert_allclose(result["attention"][rank, : len(ids)], expected.attention, atol=1e-3)
    export.main([*arguments, "--weights", "float16", "--output", "half/small.tflite"])
    sizes = [len(open(path, "rb").read()) for path in ("small.tflite", "half/small.tflite")]
    assert sizes[1] < 0.75 * sizes[0]
    assert read_json("half/small_vocabulary.json") == words


def test_check_convertible_refuses_what_litert_lacks():
    check_convertible(DecodeConfig(beam_size=3, min_words=2))
    with pytest.raises(InputError, match="--no-repeat needs TensorFlow's TensorScatterMin"):
        check_convertible(DecodeConfig(no_repeat=True))
    with pytest.raises(InputError, match="--sample cannot be exported"):
        check_convertible(DecodeConfig(sample=True))
    with pytest.raises(InputError, match="--no-repeat"):
        LiteRTModel(None, None, DecodeConfig(no_repeat=True), "float16", 299)


def test_convert_says_what_the_converter_says(monkeypatch):
    class Converter:
        def convert(self):
            raise ValueError("no such operation: tf.Magic\nand more")

    monkeypatch.setattr(tf.saved_model, "save", lambda *_, **__: None)
    monkeypatch.setattr(tf.lite.TFLiteConverter, "from_saved_model", lambda *_, **__: Converter())
    with pytest.raises(
        InputError, match=r"cannot take this model with these settings \(no such operation: tf\.Magic\)"
    ):
        convert(LiteRTModel(None, None, DecodeConfig(), "float16", 299), "float32")


# A packed run.


@pytest.mark.slow
def test_export_packs_a_run_that_inference_takes(run, small_cnn, photo, capsys):
    for weights, size in ((["--weights", "float32"], 4), ([], 2)):
        export.main(["--run", str(run), "--pack", *weights])
        assert capsys.readouterr().out == "small.zip\n"
        assert json.loads(read_member("small.zip", "small/config.json"))["model"]["units"] == 16
        assert f"stored as float{8 * size}" in read_member("small.zip", "small/MODEL_CARD.md")
    inference.main(["--run", "small.zip", "--max-words", "3", "--no-plots", str(photo)])
    assert len(capsys.readouterr().out.split()) >= 1
    export.main(["--run", "small.zip", "--pack", "--output", "again.zip"])
    assert open("again.zip", "rb").read() == open("small.zip", "rb").read()


def read_member(path, name):
    """Returns the text of a file in a .zip."""
    with zipfile.ZipFile(path) as archive:
        return archive.read(name).decode()


# What is refused.


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "float16"], "--weights is for --pack and --litert"),
        (["--pack", "--beam-size", "3"], "--pack leaves the search open"),
        (["--sample"], "--sample cannot be exported"),
        (["--litert", "--no-repeat"], "--no-repeat needs"),
        (["--pack", "--output", "."], "expected a file that ends in .zip, found a folder"),
        (["--litert", "--output", "."], "expected a file that ends in .tflite, found a folder"),
        (["--run", "none.zip"], "none.zip: no such file"),
        (["--run", "none"], "not a run folder"),
        (["--run", "none", "--pack"], "none/config.json: no such file"),
    ],
)
def test_export_refuses_in_one_line(run, small_cnn, options, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["beyond.export", "--run", str(run), *options])
    with pytest.raises(SystemExit) as end:
        run_main(export.main)
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("run: ")]
    assert end.value.code == 2 and len(lines) == 1 and message in lines[0]


def test_export_takes_one_form(run, capsys):
    with pytest.raises(SystemExit):
        export.main(["--run", str(run), "--pack", "--litert"])
    assert "not allowed with argument" in capsys.readouterr().err


def test_export_keeps_a_folder_of_something_else(run, small_cnn, photo):
    with pytest.raises(InputError, match="expected a new folder, or that of an earlier SavedModel"):
        export.main(["--run", str(run), "--output", str(photo.parent)])
