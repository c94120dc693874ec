import argparse
import dataclasses
import errno
import json
import os
import shutil
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import features
from captioning.base.cli import Command, InputError
from captioning.config.cnns import INCEPTION_V3
from captioning.config.settings import FeatureConfig
from captioning.data.annotations import Example
from captioning.images import cnn_loader
from captioning.images.feature_cache import FeatureCache, read_manifest
from captioning.images.image_records import RECORDS_FILE, ImageRecords
from captioning.images.random_cnn import calibrate
from data_utils import CaptionDataset

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
def test_calibrate_keeps_activations_alive(random_extractor, rng):
    pixels = rng.integers(0, 256, (4, 299, 299, 3), dtype=np.uint8)
    calibrate(random_extractor, pixels, INCEPTION_V3)
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
    with pytest.raises(InputError, match=r"cannot be downloaded \(URL fetch failure\); put the file \S+ into \S+$"):
        features.build_feature_extractor("imagenet")
    monkeypatch.setattr(Command, "options", frozenset({"--cnn-weights"}))
    with pytest.raises(InputError, match=r"into \S+, or give --cnn-weights FILE, or try the pipeline with"):
        features.build_feature_extractor("imagenet")


def test_load_cnn_computes_in_float32_on_a_gpu_too(monkeypatch):
    policies = []
    monkeypatch.setattr(cnn_loader.devices, "check_gpus", lambda: None)
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda *_: ["GPU"])
    monkeypatch.setattr(
        tf.keras.applications, "InceptionV3", lambda **_: policies.append(tf.keras.config.dtype_policy().name)
    )
    cnn_loader.load_cnn(INCEPTION_V3, "imagenet")
    assert policies == ["float32"]


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
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extractor)
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


def test_cache_features_reads_the_next_batch_while_the_cnn_computes(tmp_path, image_dir, image_paths, monkeypatch):
    taken, next_is_read, waited = [], threading.Event(), []
    load_image = features.load_image

    def load(path, size):
        taken.append(path.name)
        if path.name == "3.png":
            next_is_read.set()
        return load_image(path, size)

    def extract(pixels, training=False):
        wait = tf.numpy_function(lambda: waited.append(next_is_read.wait(10)) or np.float32(0), [], tf.float32)
        return tf.zeros((tf.shape(pixels)[0], 64, 2048)) + wait

    monkeypatch.setattr(features, "load_image", load)
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extract)
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    features.cache_features(cache, image_dir, image_paths, batch_size=2)
    assert waited == [True] * 5, "the second batch was read only when the CNN had computed the first one"


def test_cache_features_reads_the_first_batch_while_the_cnn_is_built(tmp_path, image_dir, image_paths, monkeypatch):
    is_read, waited = threading.Event(), []
    load_image, build = features.load_image, features.build_feature_extractor
    monkeypatch.setattr(features, "load_image", lambda *args: is_read.set() or load_image(*args))
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: waited.append(is_read.wait(10)) or build())
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    features.cache_features(cache, image_dir, image_paths)
    assert waited == [True]


def test_cache_features_gives_a_gpu_batches_of_one_size(tmp_path, image_dir, image_paths, monkeypatch):
    sizes = []

    def extract(pixels, training=False):
        tf.numpy_function(lambda batch: sizes.append(len(batch)), [pixels], [])
        return tf.ones((tf.shape(pixels)[0], 64, 2048)) * tf.cast(pixels[:, :1, :1, 0], tf.float32)

    monkeypatch.setattr(features.devices, "has_gpu", lambda: True)
    monkeypatch.setattr(features, "GPU_BATCH_SIZE", 4)
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: extract)
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    features.cache_features(cache, image_dir, image_paths)
    assert sizes == [4, 4, 4], "a new shape is slow the first time"
    assert [cached_value(cache, f"{number}.png") for number in range(10)] == [10 * number for number in range(10)]


@pytest.mark.parametrize(
    ("precision", "computed"),
    [("float32", ("float32", False)), ("tf32", ("float32", True)), ("float16", ("mixed_float16", False))],
)
def test_extract_features_computes_in_the_precision_that_it_records(
    tmp_path, image_dir, mean_extractor, monkeypatch, precision, computed
):
    def state():
        return tf.keras.config.dtype_policy().name, tf.config.experimental.tensor_float_32_execution_enabled()

    states = []
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: states.append(state()) or mean_extractor)
    dataset = CaptionDataset("greys", image_dir, (Example("1.png", ("a",), 1),))
    config = FeatureConfig(features_dir=str(tmp_path / "cache"), cnn_precision=precision)
    cache, _ = features.extract_features(dataset, config)
    assert states == [computed] and state() == ("float32", False)
    assert read_manifest(cache.folder).get("precision", "float32") == precision
    features.extract_features(dataset, config)
    other = "float16" if precision == "float32" else "float32"
    with pytest.raises(InputError, match=f"made with precision {precision}, expected {other}"):
        features.extract_features(dataset, dataclasses.replace(config, cnn_precision=other))


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


def test_cache_features_raises_error_of_writing(tmp_path, image_dir, image_paths, monkeypatch):
    def fail(self, image_path, values):
        raise OSError(errno.ENOSPC, "No space left on device")

    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    monkeypatch.setattr(FeatureCache, "write", fail)
    for batch_size in (4, 32):  # an error in an early batch, and in the last one
        with pytest.raises(OSError, match="No space left"):
            features.cache_features(cache, image_dir, image_paths, batch_size)


@pytest.mark.parametrize("length", [250, 200])
def test_cache_features_writes_long_names(tmp_path, image_dir, length):
    name = "é" * (length // 2 - 2) + ".png"
    Image.new("L", (8, 8), 70).save(image_dir / name)
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, [name], "imagenet", "float16")
    assert features.cache_features(cache, image_dir, [name], batch_size=4) == {}
    assert cache.missing([name]) == []


def test_cache_features_skips_names_that_are_too_long(tmp_path, image_dir, image_paths, capsys):
    name = "x" * 248 + ".png"  # .npy does not fit any more
    shutil.copy(image_dir / "3.png", image_dir / name)
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    unreadable = features.cache_features(cache, image_dir, [name, *image_paths], batch_size=4)
    assert unreadable.keys() == {"bad.png", name}
    line = f"skipped {image_dir / name}: its features cannot be written (file name too long)"
    assert capsys.readouterr().err.splitlines().count(line) == 1
    assert cache.missing([*image_paths, name]) == ["bad.png", name]
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]


def test_cache_features_announces_disk_space_and_time(
    tmp_path, image_dir, image_paths, mean_extractor, monkeypatch, capsys
):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=5e6))
    with pytest.raises(InputError, match=r"caching them needs 6 MB in .*, found 5 MB free; use --features-dir"):
        features.cache_features(cache, image_dir, image_paths, batch_size=32)
    assert mean_extractor.num_traces == 0
    output = capsys.readouterr().err
    assert "0 of 11 images are cached" in output and "computing 11 (6 MB, about 1 s on two CPU cores)" in output


def test_cache_features_tells_the_time_left_at_the_measured_rate(tmp_path, image_dir, image_paths, monkeypatch, capsys):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    monkeypatch.setattr(features.FirstRate, "measure", lambda _, done: 0.05 * (done == 6))
    features.cache_features(cache, image_dir, image_paths[:10], batch_size=2)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.endswith(" left")]
    assert lines == ["features: 0.1 images/s, 2 min left"]


def test_two_processes_cannot_fill_an_empty_cache_with_other_features(tmp_path, image_dir, image_paths):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    other = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float32")
    with pytest.raises(InputError, match="another process computes features there with dtype float32, expected float1"):
        features.cache_features(cache, image_dir, image_paths)
    features.cache_features(other, image_dir, image_paths)
    assert other.missing(image_paths) == ["bad.png"]


def test_cache_features_without_readable_image_is_an_error(tmp_path, image_dir):
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, [], "imagenet", "float16")
    with pytest.raises(InputError, match="none of the 2 images can be read"):
        features.cache_features(cache, image_dir, ["bad.png", "none.png"], batch_size=32)


# Images that change.


@pytest.fixture
def full_cache(tmp_path, image_dir, image_paths):
    """A cache with the features of the ten readable images."""
    cache = features.open_or_create_cache(tmp_path / "cache", image_dir, image_paths, "imagenet", "float16")
    features.cache_features(cache, image_dir, image_paths[:10], batch_size=4)
    return cache


def cached_value(cache, name):
    return np.load(cache.path(name))[0, 0]


def test_cache_features_computes_changed_images_again(full_cache, image_dir, image_paths, capsys):
    assert len((full_cache.folder / RECORDS_FILE).read_text().split("\n")) == 1 + 10
    before = {name: full_cache.path(name).stat().st_mtime_ns for name in image_paths[:10]}
    Image.new("L", (8, 8), 99).save(image_dir / "2.png")
    Image.new("L", (50, 9), 199).save(image_dir / "5.png")
    os.utime(image_dir / "5.png", (1, 1))  # an old file, of another size
    os.utime(image_dir / "7.png")  # the same file, touched
    for _ in range(2):
        features.cache_features(full_cache, image_dir, image_paths[:10], batch_size=4)
    assert cached_value(full_cache, "2.png") == 99 and cached_value(full_cache, "5.png") == 199
    computed = {name for name, mtime in before.items() if full_cache.path(name).stat().st_mtime_ns != mtime}
    assert computed == {"2.png", "5.png"}
    message = "features: 2 images have changed and will be computed again, the first: 5.png"
    assert capsys.readouterr().err.splitlines().count(message) == 1


def test_open_or_create_cache_keeps_features_of_images_that_were_moved(full_cache, image_dir, image_paths, capsys):
    moved = image_dir.rename(image_dir.parent / "moved")
    Image.new("L", (8, 8), 99).save(moved / "2.png")
    with pytest.raises(InputError, match="dtype"):  # which leaves the cache as it is
        features.open_or_create_cache(full_cache.folder, image_dir.parent, image_paths, "imagenet", "float32")
    cache = features.open_or_create_cache(full_cache.folder, moved, image_paths, "imagenet", "float16")
    features.cache_features(cache, moved, image_paths[:10], batch_size=4)
    assert "9 of 10 images are cached" in (messages := capsys.readouterr().err) and cached_value(cache, "2.png") == 99
    assert messages.count("have moved") == 1 and f"are now in {moved}/" in messages
    assert json.loads((cache.folder / "features.json").read_text())["images"] == "../moved"


def test_cache_features_computes_again_what_was_replaced_while_it_ran(full_cache, image_dir, monkeypatch):
    load_image = features.load_image

    def load_and_replace(path, *size):
        pixels = load_image(path, *size)
        Image.new("L", (8, 8), 150).save(path)
        return pixels

    Image.new("L", (8, 8), 50).save(image_dir / "2.png")
    with monkeypatch.context() as patch:
        patch.setattr(features, "load_image", load_and_replace)
        features.cache_features(full_cache, image_dir, ["2.png"], batch_size=4)
    assert cached_value(full_cache, "2.png") == 50
    features.cache_features(full_cache, image_dir, ["2.png"], batch_size=4)
    assert cached_value(full_cache, "2.png") == 150


def test_cache_features_stopped_before_the_record_computes_the_image_again(full_cache, image_dir, monkeypatch):
    def stop(self, *_):
        raise KeyboardInterrupt

    Image.new("L", (8, 8), 150).save(image_dir / "2.png")
    with monkeypatch.context() as patch:
        patch.setattr(ImageRecords, "add", stop)
        with pytest.raises(KeyboardInterrupt):
            features.cache_features(full_cache, image_dir, ["2.png"], batch_size=4)
    assert cached_value(full_cache, "2.png") == 150, "its features were written"
    full_cache.write("2.png", np.zeros((64, 2048)))
    features.cache_features(full_cache, image_dir, ["2.png"], batch_size=4)
    assert cached_value(full_cache, "2.png") == 150


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


def test_open_or_create_cache_needs_image_for_random_weights(tmp_path, image_dir):
    with pytest.raises(InputError, match="random needs an image that can be read"):
        features.open_or_create_cache(tmp_path / "cache", image_dir, ["bad.png"], "random", "float16")


@pytest.mark.slow
def test_open_or_create_cache_keeps_random_weights(tmp_path, image_dir, image_paths, random_extractor, monkeypatch):
    monkeypatch.setattr(features, "build_feature_extractor", lambda *_: random_extractor)
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


@pytest.mark.usefixtures("all_options")
def test_extract_features_limits_the_size_of_images(tmp_path, image_dir, image_paths, monkeypatch, capsys):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # to be restored
    Image.new("1", (1001, 1000)).save(image_dir / "0.png")
    dataset = CaptionDataset("greys", image_dir, (Example("0.png", ("a",), 0), Example("1.png", ("a",), 1)))
    config = FeatureConfig(features_dir=str(tmp_path / "cache"), max_megapixels=1)
    _, readable = features.extract_features(dataset, config)
    assert [example.image_path for example in readable.examples] == ["1.png"]
    assert "0.png: 2 megapixels, expected at most 1; if you trust it, use --max-megapixels 2" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["3/2", "0/2", "a/b"])
def test_parse_shard_rejects_wrong_values(text):
    assert features.parse_shard("2/3") == slice(1, None, 3)
    with pytest.raises(argparse.ArgumentTypeError, match="expected I/N with I from 1 to N"):
        features.parse_shard(text)


@pytest.fixture
def squares(tmp_path, mean_extractor):
    """The options for a dataset of five images, whose features are in `cache`."""
    image_dir = tmp_path / "images"
    image_dir.mkdir()
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        Image.new("L", (8, 8)).save(image_dir / name)
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a square\n" for name in names))
    (tmp_path / "weights.h5").write_text("stands for weights")
    args = ["--annotations", str(tmp_path / "captions.csv"), "--images", str(image_dir), "--val-fraction", "0"]
    args += ["--test-fraction", "0", "--features-dir", str(tmp_path / "cache")]
    return [*args, "--cnn-weights", str(tmp_path / "weights.h5")]


def test_main_shards_share_the_work(tmp_path, squares, capsys):
    def cached():
        return sorted(path.name for path in (tmp_path / "cache").glob("*.npy"))

    features.main([*squares, "--shard", "2/2"])
    assert cached() == ["1.png.npy", "3.png.npy"]
    features.main([*squares, "--shard", "1/2"])
    assert len(cached()) == 5
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]
    with pytest.raises(InputError, match="--shard needs weights"):
        features.main([*squares, "--shard", "1/2", "--cnn-weights", "random"])


def test_main_verifies_features_and_deletes_damaged_ones(tmp_path, squares, capsys):
    folder = tmp_path / "cache"
    features.main([*squares, "--shard", "1/2"])
    features.main([*squares, "--verify"])
    assert capsys.readouterr().out.splitlines()[1] == f"3 of 5 images have their features in {folder}/, as written"
    features.main(squares)
    content = (folder / "2.png.npy").read_bytes()
    (folder / "2.png.npy").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the same size
    (folder / "3.png.npy").write_bytes(content[:-1])
    with pytest.raises(
        InputError, match=r"2 of 5 files of features were damaged, the first: 2\.png\.npy; they are deleted"
    ):
        features.main([*squares, "--verify"])
    features.main(squares)
    assert (folder / "2.png.npy").read_bytes() == content
    features.main([*squares, "--verify"])


def test_main_verifies_features_of_1_0_by_their_size(tmp_path, squares, capsys):
    features.main(squares)
    records = tmp_path / "cache" / RECORDS_FILE
    lines = [json.dumps(json.loads(line)[:4]) for line in records.read_text().splitlines() if line]
    records.write_text("\n".join(lines))
    capsys.readouterr()
    features.main([*squares, "--verify"])
    assert capsys.readouterr().out.endswith("as written (5 have no checksum: only their size was compared)\n")
    features.main(squares)
    assert "computing" not in capsys.readouterr().err, "they stay valid"
