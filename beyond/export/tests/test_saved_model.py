"""The SavedModel captions as inference.py does, without this project."""

import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

import beyond.export.__main__ as export
import features
from beyond.export.saved_model import ExportedModel, read_pixels, save
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.decoder.decoding import DecodedBatch
from captioning.output.captions import to_captions
from inference import Captioner
from tokenizer import Tokenizer

# What a process runs that has only TensorFlow and NumPy: it can import neither this project nor Pillow.
PROGRAM = """
import json, sys
for name in ("PIL", "beyond", "captioning", "inference", "features", "model", "tokenizer"):
    sys.modules[name] = None
import numpy as np
import tensorflow as tf
folder, signature, path = sys.argv[1:]
function = tf.saved_model.load(folder).signatures[signature]
if signature == "caption_files":
    results = function(content=tf.constant([open(path, "rb").read()] * 2))
else:
    results = function(pixels=tf.constant(np.load(path)))
print(json.dumps({name: tensor.numpy().tolist() for name, tensor in results.items()}, default=bytes.decode))
"""


def build_small_cnn(cnn_weights="imagenet", cnn=None):
    """Stands for InceptionV3, with variables: the mean colours on an 8x8 grid, times random numbers."""
    tf.keras.utils.set_random_seed(1)
    pixels = tf.keras.Input((299, 299, 3), dtype="uint8")
    x = tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)
    x = tf.keras.layers.AveragePooling2D(37)(x)
    x = tf.keras.layers.Conv2D(2048, 1, activation="relu")(x)
    return tf.keras.Model(pixels, tf.keras.layers.Reshape((64, 2048))(x))


def encode(image, image_format, **options):
    """Returns the content of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def compare(result, caption, tolerance=1e-4):
    """Compares what the exported model returned for an image with a caption and its alternatives."""
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
def test_saved_model_in_a_process_without_the_project(run, monkeypatch, tmp_path, rng, capsys):
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    monkeypatch.chdir(tmp_path)
    pixels = rng.integers(0, 256, (3, 299, 299, 3), dtype=np.uint8)
    np.save("pixels.npy", pixels)
    Image.fromarray(pixels[0]).resize((400, 300)).save("photo.jpg")
    of_file = read_pixels(tf.constant(Path("photo.jpg").read_bytes()), 299).numpy()
    beam = DecodeConfig(beam_size=4, captions=3, length_penalty=0.7, max_words=9, min_words=2, no_repeat=True)
    options = shlex.split("--beam-size 4 --captions 3 --length-penalty 0.7 --max-words 9 --min-words 2 --no-repeat")

    def caption_elsewhere(folder, signature, path):
        (tmp_path / "empty").mkdir(exist_ok=True)
        arguments = [str(tmp_path / folder), signature, str(tmp_path / path)]
        command = [sys.executable, "-I", "-c", PROGRAM, *arguments]
        output = subprocess.run(command, cwd=tmp_path / "empty", capture_output=True, text=True, timeout=120)
        assert output.returncode == 0, output.stderr[-2000:]
        results = json.loads(output.stdout.splitlines()[-1])
        return [dict(zip(results, values, strict=True)) for values in zip(*results.values(), strict=True)]

    export.main(["--run", str(run), "--with-decoder", "--max-words", "6"])
    printed = capsys.readouterr()
    assert printed.out == "small_saved_model\n"
    assert "decoding (fixed): greedy search, at most 6 words" in printed.err and "size: " in printed.err
    export.main(["--run", str(run), "--output", "out/beam", *options])
    greedy = Captioner.load(run, DecodeConfig(max_words=6))
    for folder, captioner in (("small_saved_model", greedy), ("out/beam", greedy.with_decoding(beam))):
        results = caption_elsewhere(folder, "serving_default", "pixels.npy")
        for result, caption in zip(results, captioner.caption_pixels(pixels), strict=True):
            compare(result, caption)
    for result in caption_elsewhere("small_saved_model", "caption_files", "photo.jpg"):
        compare(result, greedy.caption_pixels(of_file[np.newaxis])[0])
    assert sorted(tf.saved_model.load("out/beam").signatures) == ["caption", "serving_default"]
    project = str(Path(export.__file__).parents[2]).encode()
    for path in tmp_path.glob("small_saved_model/**/*.*"):
        assert project not in path.read_bytes() and b".py" not in path.read_bytes()


def test_read_pixels_are_nearly_those_of_the_training(rng):
    noise = rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((400, 330), Image.Resampling.BICUBIC)
    contents = [encode(image, name) for name in ("JPEG", "PNG", "GIF", "BMP")]
    contents.append(encode(image.resize((1500, 1300)), "JPEG"))  # training decodes it at half its size
    for content in contents:
        expected = features.load_image(content).astype(int)
        difference = np.abs(read_pixels(tf.constant(content), 299).numpy() - expected)
        assert difference.mean() < 0.3 and difference.max() <= 3
    for content in (b"text", encode(image, "TIFF"), contents[0][:2000]):
        with pytest.raises(tf.errors.InvalidArgumentError):
            read_pixels(tf.constant(content), 299)


# Words.


class Decoded(ExportedModel):
    """An exported model without a CNN or a decoder: its ids are given."""

    def __init__(self, tokens, vocabulary, num_captions=1):
        rng = np.random.default_rng(0)
        self.batch = DecodedBatch(
            tf.constant(tokens, tf.int32),
            tf.constant(rng.uniform(0.1, 1, np.shape(tokens)), tf.float32),
            tf.constant(rng.uniform(size=(*np.shape(tokens), 64)), tf.float32),
        )
        captioner = SimpleNamespace(
            extractor=None,
            model=None,
            tokenizer=vocabulary,
            decode_config=DecodeConfig(captions=num_captions),
            image_size=2,
        )
        super().__init__(captioner)
        self.pixels = np.zeros((len(tokens) // num_captions, 2, 2, 3), np.uint8)

    def run(self):
        self.decode_pixels = lambda pixels: self.batch
        return self.caption(self.pixels)


@pytest.mark.parametrize("words", ["spaces", "characters"])
def test_exported_model_joins_words_as_the_tokenizer(words, rng):
    vocabulary = Tokenizer.fit(["一只 iphone 手机 です ร้าน dog's 3 x한국 カー"], words=words)
    assert len(vocabulary) > 10
    tokens = rng.integers(4, len(vocabulary), (40, 9))
    for row, length in enumerate(rng.integers(0, 9, 39)):  # the last caption has no <end>
        tokens[row, length:] = [3, *[0] * (8 - length)]
    decoded = Decoded(tokens, vocabulary)
    result = decoded.run()
    for row, caption in enumerate(to_captions(decoded.batch, vocabulary)):
        compare(to_python(result, row), caption, tolerance=1e-6)


def test_exported_model_tells_that_there_is_no_further_caption():
    result = to_python(Decoded([[4, 5, 3], [0, 0, 0]], Tokenizer.fit(["a dog"]), num_captions=2).run(), 0)
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
        spec = tf.TensorSpec([None], tf.string)
        self.caption = tf.function(lambda x: {"value": self.variable + tf.size(x)}, input_signature=[spec])
        self.caption_files = None


def load_value(folder):
    model = tf.saved_model.load(folder)
    return model.caption(tf.constant(["x"]))["value"] - 1


def test_save_replaces_an_earlier_model(tmp_path):
    folder = tmp_path / "a/model"
    for value in (1, 5):
        save(SmallModule(value), folder)
        assert load_value(folder) == value
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_save_refuses_a_folder_with_something_else(tmp_path):
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos/a.jpg").touch()
    for path in (tmp_path / "photos", tmp_path / "photos/a.jpg"):
        with pytest.raises(InputError, match="expected a new folder or one with an earlier SavedModel"):
            save(SmallModule(1), path)
    assert (tmp_path / "photos/a.jpg").exists()


def test_save_that_fails_keeps_the_earlier_model(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    save(SmallModule(1), tmp_path / "model")

    def fail(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(tf.saved_model, "save", fail)
        with pytest.raises(OSError, match=r"cannot write .*No space left on device"):
            save(SmallModule(2), tmp_path / "model")
    assert load_value(tmp_path / "model") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
