"""The exported model captions as inference.py does, without this project."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_graph_images import EQUAL, draw, encode

import features
import inference
from beyond.export.exported_model import ExportedModel, save
from captioning.base.cli import InputError
from captioning.base.files import read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.decoding import DecodedBatch
from captioning.output.captions import to_captions
from inference import Captioner
from tokenizer import Tokenizer

# What a process runs that has only TensorFlow and NumPy: it may import neither this project nor Pillow.
PROGRAM = """
import json, sys
for name in ("PIL", "captioning", "inference", "features", "model", "tokenizer"):
    sys.modules[name] = None
import tensorflow as tf
results = []
for folder in sys.argv[1:3]:
    model = tf.saved_model.load(folder).signatures["serving_default"]
    for path in sys.argv[3:]:
        result = model(image=tf.constant([open(path, "rb").read()]))
        results.append({name: tensor.numpy()[0].tolist() for name, tensor in result.items()})
print(json.dumps(results, default=bytes.decode))
"""


def build_small_cnn(cnn_weights="imagenet", cnn=None):
    """Stands for InceptionV3, with variables: the mean colours on an 8x8 grid, times random numbers."""
    tf.keras.utils.set_random_seed(1)
    pixels = tf.keras.Input((299, 299, 3), dtype="uint8")
    x = tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)
    x = tf.keras.layers.AveragePooling2D(37)(x)
    x = tf.keras.layers.Conv2D(2048, 1, activation="relu")(x)
    return tf.keras.Model(pixels, tf.keras.layers.Reshape((64, 2048))(x))


@pytest.fixture
def captioner(run, monkeypatch):
    """The untrained run, with a small CNN; its features are those of JPEGs that were scaled."""
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    config = read_json(run / "config.json")
    config["features"]["jpeg_decoding"] = "scaled"
    write_json(run / "config.json", config)
    return Captioner.load(run, DecodeConfig(max_words=6))


def export(captioner):
    parts = captioner.extractor, captioner.model, captioner.tokenizer, captioner.decode_config
    return ExportedModel(*parts, captioner.config.features["dtype"], captioner.min_jpeg_side, captioner.image_size)


def compare(result, caption, tolerance=1e-4):
    """Compares what the exported model gave for an image, with NumPy arrays, with a caption and its alternatives."""
    captions = [caption, *caption.alternatives]
    num_words = max(len(each.words) for each in captions)
    for rank, each in enumerate(captions):
        length = len(each.words)
        assert result["caption"][rank] == each.text
        assert list(result["words"][rank])[:num_words] == [*each.words, *[""] * (num_words - length)]
        assert result["finished"][rank] == each.finished
        for name in ("probabilities", "attention"):
            values = np.asarray(result[name][rank])
            np.testing.assert_allclose(values[:length], getattr(each, name), atol=tolerance)
            assert not values[length:].any()
        np.testing.assert_allclose(result["log_prob"][rank], each.log_prob, atol=3e-3)
        np.testing.assert_allclose(result["confidence"][rank], each.confidence, atol=tolerance)


def to_python(result, row):
    """Returns the results of an image with texts instead of bytes."""
    values = {name: tensor.numpy()[row] for name, tensor in result.items()}
    return values | {name: np.vectorize(bytes.decode, otypes=[object])(values[name]) for name in ("caption", "words")}


@pytest.mark.slow
def test_exported_model_in_a_process_without_the_project(captioner, tmp_path):
    paths = []
    for number, (name, content) in enumerate(sorted(EQUAL.items())[:-4:2] + sorted(EQUAL.items())[-4:]):
        paths.append(tmp_path / f"{number}.{name.split()[0].lower()}")
        paths[-1].write_bytes(content)
    Image.effect_noise((640, 480), 90).convert("RGB").save(tmp_path / "large.jpg")
    paths.append(tmp_path / "large.jpg")
    Image.effect_noise((2000, 1500), 90).convert("RGB").save(tmp_path / "larger.jpg")  # decoded at half its size
    paths.append(tmp_path / "larger.jpg")
    assert len(paths) >= 20
    beam = DecodeConfig(beam_size=4, captions=3, length_penalty=0.7, max_words=9, min_words=2, no_repeat=True)
    captioners = {"greedy": captioner, "beam": captioner.with_decoding(beam)}
    for name, each in captioners.items():
        save(export(each), tmp_path / name)
    (tmp_path / "empty").mkdir()
    command = [sys.executable, "-I", "-c", PROGRAM, *(str(tmp_path / name) for name in captioners), *map(str, paths)]
    output = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=120)
    assert output.returncode == 0, output.stderr[-2000:]
    results = iter(json.loads(output.stdout.splitlines()[-1]))
    for each in captioners.values():
        for path in paths:
            compare(next(results), each.caption(path))
    assert next(results, None) is None


@pytest.mark.slow
def test_exported_model_captions_batches_and_pixels(captioner):
    captioner = captioner.with_decoding(DecodeConfig(beam_size=3, captions=2, max_words=4))
    model = export(captioner)
    contents = [EQUAL["JPEG turned 6"], EQUAL["PNG with alpha"], EQUAL["GIF"]]
    result = model.caption(tf.constant(contents))
    assert {name: tensor.shape.as_list()[:2] for name, tensor in result.items()} == {key: [3, 2] for key in result}
    assert sorted(result) == sorted(
        ["caption", "words", "probabilities", "attention", "finished", "log_prob", "confidence"]
    )
    pixels = np.stack([features.load_image(content) for content in contents])
    of_pixels = model.caption_pixels(pixels)
    for row, content in enumerate(contents):
        compare(to_python(result, row), captioner.caption(content))
        compare(to_python(of_pixels, row), captioner.caption(content))
    large = encode(draw(size=(2000, 1500)), "JPEG")  # decoded at half its size
    np.testing.assert_array_equal(model.load(tf.constant(large)), captioner.load_image(large))
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected the content of a JPEG"):
        model.caption(tf.constant([EQUAL["PNG"], b"text"]))


def test_exported_model_rounds_features_as_the_cache(captioner, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "beyond.export.exported_model.decode", lambda model, features, config: seen.append(features.dtype)
    )
    export(captioner).decode_pixels(np.zeros((1, 299, 299, 3), np.uint8))
    assert seen == [tf.float16]


def test_exported_model_refuses_random_words(captioner):
    with pytest.raises(InputError, match="--sample cannot be exported"):
        export(captioner.with_decoding(DecodeConfig(sample=True)))


# Words.


class Decoded:
    """Stands for the CNN and the search: ids that are given."""

    def __init__(self, tokens, vocabulary, num_captions=1):
        rng = np.random.default_rng(0)
        self.batch = DecodedBatch(
            tf.constant(tokens, tf.int32),
            tf.constant(rng.uniform(0.1, 1, np.shape(tokens)), tf.float32),
            tf.constant(rng.uniform(size=(*np.shape(tokens), 64)), tf.float32),
        )
        config = DecodeConfig(captions=num_captions)
        self.model = ExportedModel(lambda pixels, training: pixels, None, vocabulary, config, "float32", None, 299)
        self.model.decode_pixels = lambda pixels: self.batch
        self.num_images = len(tokens) // num_captions

    def run(self):
        return self.model.caption_pixels(np.zeros((self.num_images, 299, 299, 3), np.uint8))


@pytest.mark.parametrize("words", ["spaces", "characters"])
def test_exported_model_joins_words_as_the_tokenizer(words, rng):
    vocabulary = Tokenizer.fit(["一只 iphone 手机 です ร้าน dog's 3 x한국 カー"], words=words)
    assert len(vocabulary) > 10
    tokens = rng.integers(4, len(vocabulary), (40, 9))
    tokens[:, 8] = 3
    for row, length in enumerate(rng.integers(0, 9, 40)):
        tokens[row, length:] = [3, *[0] * (8 - length)]
    decoded = Decoded(tokens, vocabulary)
    result = decoded.run()
    for row, caption in enumerate(to_captions(decoded.batch, vocabulary)):
        compare(to_python(result, row), caption, tolerance=1e-6)


@pytest.mark.parametrize("tokens", [[[3]], [[3], [3]], [[4, 5, 4]]])
def test_exported_model_of_captions_without_words_or_end(tokens):
    vocabulary = Tokenizer.fit(["a dog"])
    decoded = Decoded(tokens, vocabulary)
    result = decoded.run()
    for row, caption in enumerate(to_captions(decoded.batch, vocabulary)):
        compare(to_python(result, row), caption, tolerance=1e-6)


def test_exported_model_tells_that_there_is_no_further_caption():
    decoded = Decoded([[4, 5, 3], [0, 0, 0]], Tokenizer.fit(["a dog"]), num_captions=2)
    result = to_python(decoded.run(), 0)
    assert result["caption"].tolist() == ["a dog", ""] and result["confidence"][1] == 0 < result["confidence"][0]
    assert result["log_prob"][1] == -np.inf and result["finished"].tolist() == [True, False]


def test_exported_model_survives_a_probability_of_zero():
    vocabulary = Tokenizer.fit(["a dog"])
    decoded = Decoded([[4, 3]], vocabulary)
    decoded.batch = decoded.batch._replace(probabilities=tf.constant([[0.0, 1.0]]))
    result = to_python(decoded.run(), 0)
    expected = to_captions(decoded.batch, vocabulary)[0]
    np.testing.assert_allclose(result["log_prob"], expected.log_prob, rtol=1e-6)


# Saving.


class SmallModule(tf.Module):
    """Stands for the model."""

    def __init__(self, value):
        super().__init__()
        self.variable = tf.Variable(value)
        self.caption = self.caption_pixels = tf.function(
            lambda image: {"value": self.variable + tf.size(image)}, input_signature=[tf.TensorSpec([None], tf.string)]
        )


def test_save_replaces_an_earlier_model(tmp_path):
    folder = tmp_path / "a/model"
    for value in (1, 5):
        save(SmallModule(value), folder)
        loaded = tf.saved_model.load(folder)
        assert loaded.caption(tf.constant(["x"]))["value"] == value + 1
        assert sorted(loaded.signatures) == ["pixels", "serving_default"]
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    (tmp_path / "empty").mkdir()
    save(SmallModule(2), tmp_path / "empty")
    assert (tmp_path / "empty/saved_model.pb").exists()


def test_save_refuses_a_folder_with_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    for path in (tmp_path / "photos", tmp_path / "photos/a.jpg"):
        with pytest.raises(InputError, match="expected a new folder, or that of an earlier SavedModel"):
            save(SmallModule(1), path)
    assert (tmp_path / "photos/a.jpg").exists()


def test_save_that_fails_keeps_the_earlier_model(tmp_path, monkeypatch):
    save(SmallModule(1), tmp_path / "model")

    def fail(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    monkeypatch.setattr(tf.saved_model, "save", fail)
    with pytest.raises(OSError, match=r"cannot write .*No space left on device"):
        save(SmallModule(2), tmp_path / "model")
    monkeypatch.undo()
    loaded = tf.saved_model.load(tmp_path / "model")
    assert loaded.caption(tf.constant(["x"]))["value"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_inference_uses_the_same_decoding():
    assert ExportedModel.__init__.__globals__["decode"] is inference.decode
