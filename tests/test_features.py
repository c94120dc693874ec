import argparse
import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import features
from captioning.annotations import Example
from captioning.cli import InputError
from captioning.config import FeatureConfig
from captioning.feature_cache import FeatureCache
from data_utils import CaptionDataset


def ramp(mode="RGB", size=(40, 30)):
    """A smooth image that is dark on the left and bright on the right."""
    row = np.linspace(30, 220, size[0]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, size[::-1]).copy()).convert(mode)


# load_image.


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"), ("1", "png"), ("LA", "png")],
)
def test_load_image_converts_every_format_to_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    ramp(mode).save(path)
    pixels = features.load_image(path)
    assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)
    assert pixels[:, -50:].mean() > pixels[:, :50].mean() + 50, "left is dark and right is bright"


def test_load_image_makes_transparency_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (features.load_image(tmp_path / "a.png") == 255).all()


def test_load_image_keeps_contrast_of_16_bit_images(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)).save(tmp_path / "a.png")
    pixels = features.load_image(tmp_path / "a.png")
    assert pixels.min() < 20 and 100 < pixels.mean() < 155 and pixels.max() > 235


def test_load_image_applies_exif_orientation(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    ramp().save(tmp_path / "a.jpg", exif=exif)
    pixels = features.load_image(tmp_path / "a.jpg")
    assert pixels[:, :50].mean() > pixels[:, -50:].mean() + 50


def test_load_image_reports_unreadable_file_in_one_line(tmp_path):
    ramp().save(tmp_path / "complete.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "complete.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png", "none.jpg"):
        with pytest.raises(InputError, match=name) as error:
            features.load_image(tmp_path / name)
        assert "\n" not in str(error.value)


# The feature extractor.


@pytest.fixture(scope="session")
def random_inception():
    """The extractor with random weights, and those weights. It is built once, since that takes seconds."""
    extractor = features.build_feature_extractor("random")
    return extractor, extractor.get_weights()


@pytest.fixture
def random_extractor(random_inception):
    """The extractor as it was built, whatever another test did to its weights."""
    extractor, weights = random_inception
    extractor.set_weights(weights)
    return extractor


@pytest.mark.slow
def test_build_feature_extractor_scales_pixels_like_keras(random_extractor, rng):
    pixels = rng.integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    expected = tf.keras.applications.inception_v3.preprocess_input(pixels.astype(np.float32))
    np.testing.assert_allclose(random_extractor.layers[1](pixels), expected, atol=1e-6)
    blocks = random_extractor.get_layer("inception_v3")(expected)  # (1, 8, 8, 2048)
    np.testing.assert_allclose(random_extractor(pixels), tf.reshape(blocks, (1, 64, 2048)), atol=1e-5)


@pytest.mark.slow
def test_calibrate_batch_norm_keeps_activations_alive(random_extractor, rng):
    pixels = rng.integers(0, 256, (4, 299, 299, 3), dtype=np.uint8)
    features.calibrate_batch_norm(random_extractor, pixels)
    values = random_extractor(pixels).numpy()
    assert values.std() > 0.1 and (values > 0).mean() > 0.2
    assert np.abs(values[0] - values[1]).mean() > 0.01, "different images must have different features"
    norms = [layer for layer in random_extractor.get_layer("inception_v3").layers if hasattr(layer, "momentum")]
    assert len(norms) == 94 and all(layer.momentum > 0.9 for layer in norms), "the momentum must be restored"


@pytest.mark.slow
def test_build_feature_extractor_rejects_weights_of_another_model(tmp_path, random_extractor, monkeypatch):
    tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    inception = random_extractor.get_layer("inception_v3")
    monkeypatch.setattr(tf.keras.applications, "InceptionV3", lambda **kwargs: inception)  # built once is enough
    with pytest.raises(InputError, match="not the weights of InceptionV3"):
        features.build_feature_extractor(str(tmp_path / "other.weights.h5"))


def test_build_feature_extractor_explains_failed_download(monkeypatch):
    def fail(**kwargs):
        raise Exception("URL fetch failure\nand more")

    monkeypatch.setattr(tf.keras.applications, "InceptionV3", fail)
    policy = tf.keras.config.dtype_policy().name
    with pytest.raises(InputError, match=r"cannot be downloaded \(URL fetch failure\); put the file \S+ into \S+$"):
        features.build_feature_extractor("imagenet")
    assert tf.keras.config.dtype_policy().name == policy


# Caching.


class MeanExtractor:
    """Stands for InceptionV3: all features of an image are its mean."""

    def __init__(self):
        self.num_traces = 0

    def __call__(self, pixels, training=False):
        self.num_traces += 1
        mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))
        return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis]


@pytest.fixture
def mean_extractor(monkeypatch):
    extractor = MeanExtractor()
    monkeypatch.setattr(features, "build_feature_extractor", lambda cnn_weights: extractor)
    return extractor


@pytest.fixture
def image_dir(tmp_path, mean_extractor):
    """Ten grey images, 0.png to 9.png, and one that is damaged."""
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(10):
        Image.new("L", (8, 8), 10 * number).save(folder / f"{number}.png")
    (folder / "bad.png").write_text("no image")
    return folder


@pytest.fixture
def image_paths():
    return [*(f"{number}.png" for number in range(10)), "bad.png"]


def test_load_images_keeps_order_and_returns_errors(image_dir, image_paths):
    loaded = dict(features.load_images(image_dir, image_paths))
    assert list(loaded) == image_paths
    assert isinstance(loaded.pop("bad.png"), InputError)
    assert [int(pixels.mean()) for pixels in loaded.values()] == list(range(0, 100, 10))


def test_cache_features_skips_unreadable_images_and_continues(tmp_path, image_dir, image_paths, capsys):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    assert list(features.cache_features(cache, image_dir, image_paths[:4], batch_size=3)) == []
    mtime = cache.path("0.png").stat().st_mtime_ns
    unreadable = features.cache_features(cache, image_dir, image_paths, batch_size=4)
    assert list(unreadable) == ["bad.png"] and "bad.png" in capsys.readouterr().err
    assert cache.path("0.png").stat().st_mtime_ns == mtime, "what is cached must not be computed again"
    for number in range(10):
        values = np.load(cache.path(f"{number}.png"))
        assert values.dtype == np.float16 and (values == 10 * number).all(), "an image has the features of another"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]


def test_cache_features_computes_damaged_file_again(tmp_path, image_dir, image_paths, capsys):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    cache.path("3.png").write_bytes(b"damaged")
    features.cache_features(cache, image_dir, ["3.png"], batch_size=4)
    assert (np.load(cache.path("3.png")) == 30).all()
    assert f"{cache.path('3.png')} is damaged" in capsys.readouterr().err


def test_cache_features_raises_error_of_writing(tmp_path, image_dir, image_paths, monkeypatch):
    def fail(self, image_path, values):
        raise OSError(28, "No space left on device")

    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    monkeypatch.setattr(FeatureCache, "write", fail)
    for batch_size in (4, 32):  # an error in an early batch, and in the last one
        with pytest.raises(OSError, match="No space left"):
            features.cache_features(cache, image_dir, image_paths, batch_size)


def test_cache_features_announces_disk_space_and_time(
    tmp_path, image_dir, image_paths, mean_extractor, monkeypatch, capsys
):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e6))
    with pytest.raises(InputError, match=r"caching them needs 6 MB in .*, found 5 MB free; use --features-dir"):
        features.cache_features(cache, image_dir, image_paths, batch_size=32)
    assert mean_extractor.num_traces == 0
    output = capsys.readouterr().err
    assert "0 of 11 images are cached" in output and "computing 11 (6 MB, about 1 min on two CPU cores)" in output


def test_cache_features_without_readable_image_is_an_error(tmp_path, image_dir):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, [], "imagenet", "float16")
    with pytest.raises(InputError, match="none of the 2 images can be read"):
        features.cache_features(cache, image_dir, ["bad.png", "none.png"], batch_size=32)


def test_open_or_create_cache_rejects_other_images_weights_or_dtype(tmp_path, image_dir, image_paths):
    (tmp_path / "one.h5").write_text("1")
    (tmp_path / "same.h5").write_text("1")
    (tmp_path / "two.h5").write_text("2")

    def open_cache(cnn_weights="imagenet", dtype="float16", image_dir=image_dir, name="cache"):
        return features.open_or_create_cache(tmp_path / name, image_dir, image_paths, cnn_weights, dtype)

    open_cache(str(tmp_path / "two.h5"))
    open_cache().write("0.png", np.zeros((64, 2048)))  # only an empty cache is created again with other weights
    open_cache()
    for changes, message in [
        ({"cnn_weights": str(tmp_path / "one.h5")}, "sha256 None"),
        ({"dtype": "float32"}, "dtype float16, expected float32"),
        ({"image_dir": tmp_path}, "images"),
    ]:
        with pytest.raises(InputError, match=message):
            open_cache(**changes)
    open_cache(str(tmp_path / "one.h5"), name="file_cache").write("0.png", np.zeros((64, 2048)))
    open_cache(str(tmp_path / "same.h5"), name="file_cache")  # the same bytes under another name
    with pytest.raises(InputError, match="sha256"):
        open_cache(str(tmp_path / "two.h5"), name="file_cache")
    with pytest.raises(InputError, match=r"none\.h5: no such weights file"):
        open_cache(str(tmp_path / "none.h5"))


def test_open_or_create_cache_stores_relative_image_dir(tmp_path, image_dir, image_paths):
    features.open_or_create_cache(tmp_path / "a/features", image_dir, image_paths, "imagenet", "float16")
    manifest = json.loads((tmp_path / "a/features/features.json").read_text())
    assert manifest["images"] == "../../images"


def test_open_or_create_cache_needs_image_for_random_weights(tmp_path, image_dir):
    with pytest.raises(InputError, match="none of the first 1 images can be read"):
        features.open_or_create_cache(tmp_path / "cache", image_dir, ["bad.png"], "random", "float16")


@pytest.mark.slow
def test_open_or_create_cache_keeps_random_weights(tmp_path, image_dir, image_paths, random_extractor, monkeypatch):
    monkeypatch.setattr(features, "build_feature_extractor", lambda cnn_weights: random_extractor)
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths[:2], "random", "float16")
    features.check_cnn_weights(cache.cnn_weights, cache.manifest["sha256"])
    cache.write("0.png", np.zeros((64, 2048)))
    again = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths[:2], "random", "float16")
    assert again.manifest == cache.manifest
    same = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, cache.cnn_weights, "float16")
    assert same.manifest["sha256"] == cache.manifest["sha256"]


# extract_features and the command line.


def test_extract_features_excludes_unreadable_images(tmp_path, image_dir, image_paths, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    examples = tuple(Example(image_path, ("grey",), number) for number, image_path in enumerate(image_paths))
    dataset = CaptionDataset("greys", image_dir, examples)
    cache, readable = features.extract_features(dataset, FeatureConfig())
    assert [example.image_path for example in readable.examples] == image_paths[:-1]
    assert str(cache.folder) == "features/greys" and cache.missing(image_paths) == ["bad.png"]
    assert "1 of 11 images cannot be read: left out, with their captions" in capsys.readouterr().err


def test_extract_features_computes_only_shard(tmp_path, image_dir, image_paths):
    examples = tuple(Example(image_path, ("grey",), number) for number, image_path in enumerate(image_paths[:5]))
    dataset = CaptionDataset("greys", image_dir, examples)
    config = FeatureConfig(features_dir=str(tmp_path / "cache"), cnn_batch_size=1)
    cache, _ = features.extract_features(dataset, config, slice(1, None, 2))
    assert cache.missing(image_paths[:5]) == ["0.png", "2.png", "4.png"]


@pytest.mark.parametrize("text", ["3/2", "0/2", "1", "a/b", "-1/2", "1/0"])
def test_parse_shard_rejects_wrong_values(text):
    assert features.parse_shard("2/3") == slice(1, None, 3)
    with pytest.raises(argparse.ArgumentTypeError, match="expected I/N with I from 1 to N"):
        features.parse_shard(text)


def test_main_shards_share_the_work(tmp_path, mean_extractor, capsys):
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        ramp().save(image_dir / name)
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a ramp\n" for name in names))
    (tmp_path / "weights.h5").write_text("stands for weights")
    args = ["--annotations", str(tmp_path / "captions.csv"), "--images", str(image_dir), "--val-fraction", "0"]
    args += ["--test-fraction", "0", "--features-dir", str(tmp_path / "cache")]
    args += ["--cnn-weights", str(tmp_path / "weights.h5")]

    def cached():
        return sorted(path.name for path in (tmp_path / "cache").glob("*.npy"))

    features.main([*args, "--shard", "2/2"])
    assert cached() == ["1.png.npy", "3.png.npy"]
    features.main([*args, "--shard", "1/2"])
    assert len(cached()) == 5
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]
    with pytest.raises(SystemExit):
        features.main([*args, "--shard", "3/2"])
    with pytest.raises(InputError, match="--shard needs weights"):
        features.main([*args, "--shard", "1/2", "--cnn-weights", "random"])
