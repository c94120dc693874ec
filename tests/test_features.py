import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import features
from common import InputError

rng = np.random.default_rng(0)


def picture(mode="RGB", size=(40, 30)):
    """A smooth picture with a dark left and a bright right."""
    ramp = np.linspace(30, 220, size[0]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(ramp, size[::-1]).copy()).convert(mode)


@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("RGB", "png"), ("L", "jpg"), ("CMYK", "jpg"), ("P", "gif"), ("1", "png"), ("LA", "png")],
)
def test_every_kind_of_picture_becomes_rgb(tmp_path, mode, suffix):
    path = tmp_path / f"a.{suffix}"
    picture(mode).save(path)
    pixels = features.load_image(path)
    assert (pixels.shape, pixels.dtype) == ((299, 299, 3), np.uint8)
    assert pixels[:, -50:].mean() > pixels[:, :50].mean() + 50, "left is dark and right is bright"


def test_transparency_becomes_white(tmp_path):
    Image.new("RGBA", (10, 10), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert (features.load_image(tmp_path / "a.png") == 255).all()


def test_sixteen_bits_keep_their_contrast(tmp_path):
    Image.fromarray(np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)).save(tmp_path / "a.png")
    pixels = features.load_image(tmp_path / "a.png")
    assert pixels.min() < 20 and 100 < pixels.mean() < 155 and pixels.max() > 235


def test_exif_orientation_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # taken upside down
    picture().save(tmp_path / "a.jpg", exif=exif)
    pixels = features.load_image(tmp_path / "a.jpg")
    assert pixels[:, :50].mean() > pixels[:, -50:].mean() + 50


def test_unreadable_pictures_get_one_line(tmp_path):
    picture().save(tmp_path / "whole.jpg")
    (tmp_path / "cut.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:300])
    (tmp_path / "text.jpg").write_text("hello")
    (tmp_path / "empty.png").write_bytes(b"")
    for name in ("cut.jpg", "text.jpg", "empty.png", "none.jpg"):
        with pytest.raises(InputError, match=name) as error:
            features.load_image(tmp_path / name)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def random_cnn():
    return features.build_cnn("random")


def test_pixels_are_scaled_as_keras_scales_them(random_cnn):
    pixels = rng.integers(0, 256, (1, 299, 299, 3), dtype=np.uint8)
    expected = tf.keras.applications.inception_v3.preprocess_input(pixels.astype(np.float32))
    ours = random_cnn.layers[1](pixels)
    np.testing.assert_allclose(ours, expected, atol=1e-6)
    blocks = random_cnn.get_layer("inception_v3")(expected)  # (1, 8, 8, 2048)
    np.testing.assert_allclose(random_cnn(pixels), tf.reshape(blocks, (1, 64, 2048)), atol=1e-5)


def test_calibration_keeps_activations_alive(random_cnn):
    pixels = rng.integers(0, 256, (4, 299, 299, 3), dtype=np.uint8)
    features.calibrate(random_cnn, pixels)
    found = random_cnn(pixels).numpy()
    assert found.std() > 0.1 and (found > 0).mean() > 0.2
    assert np.abs(found[0] - found[1]).mean() > 0.01, "different pictures must have different features"


def test_tensorflow_reads_what_numpy_wrote(cache):
    values = rng.normal(size=(64, 2048)).astype(np.float16)
    cache.write("sub/a.jpg", values)
    np.testing.assert_array_equal(np.load(cache.path("sub/a.jpg"), allow_pickle=False), values)
    np.testing.assert_array_equal(cache.read(tf.constant([str(cache.path("sub/a.jpg"))])), [values])


def test_half_a_file_counts_as_missing(cache):
    cache.write("a.jpg", np.zeros((64, 2048)))
    assert cache.missing(["a.jpg", "b.jpg"]) == ["b.jpg"]
    cache.path("a.jpg").write_bytes(cache.path("a.jpg").read_bytes()[:-1])
    assert cache.missing(["a.jpg"]) == ["a.jpg"]


class FakeCNN:
    """Features that tell the picture: its mean. Counts the pictures it saw."""

    seen = 0

    def __call__(self, pixels, training=False):
        FakeCNN.seen += 1
        mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))
        return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis]


@pytest.fixture
def pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(features, "build_cnn", lambda weights: FakeCNN())
    folder = tmp_path / "pictures"
    folder.mkdir()
    for grey in range(10):
        Image.new("L", (8, 8), 10 * grey).save(folder / f"{grey}.png")
    (folder / "bad.png").write_text("no picture")
    return folder, [*(f"{grey}.png" for grey in range(10)), "bad.png"]


def test_caching_names_what_it_skips_and_continues(tmp_path, pictures, capsys):
    folder, names = pictures
    cache = features.open_cache(tmp_path / "cache", folder, names, "imagenet", "float16")
    assert list(features.cache_features(cache, folder, names[:4], batch_size=3)) == []
    before = cache.path("0.png").stat().st_mtime_ns
    unreadable = features.cache_features(cache, folder, names, batch_size=4)
    assert list(unreadable) == ["bad.png"] and "bad.png" in capsys.readouterr().err
    assert cache.path("0.png").stat().st_mtime_ns == before, "what is cached must not be computed again"
    for grey in range(10):
        values = np.load(cache.path(f"{grey}.png"))
        assert values.dtype == np.float16 and (values == 10 * grey).all(), "a picture has another's features"
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.name.endswith(".part")]


def test_what_it_takes_is_said_before_and_must_fit(tmp_path, pictures, monkeypatch, capsys):
    folder, names = pictures
    cache = features.open_cache(tmp_path / "cache", folder, names, "imagenet", "float32")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5e6))
    monkeypatch.setattr(FakeCNN, "seen", 0)
    with pytest.raises(InputError, match=r"caching them needs 6 MB in .*, found 5 MB free; use --features-dir"):
        features.cache_features(cache, folder, names)
    assert FakeCNN.seen == 0
    found = capsys.readouterr().err
    assert "0 of 11 pictures are cached" in found and "computing 11 (6 MB, about 1 min on two CPU cores)" in found


def test_no_readable_picture_is_an_error(tmp_path, pictures):
    folder, _ = pictures
    cache = features.open_cache(tmp_path / "cache", folder, [], "imagenet", "float16")
    with pytest.raises(InputError, match="none of the 2 pictures can be read"):
        features.cache_features(cache, folder, ["bad.png", "none.png"])


def test_a_cache_of_other_pictures_weights_or_dtype_is_refused(tmp_path, pictures):
    folder, names = pictures
    (tmp_path / "one.h5").write_text("1")
    (tmp_path / "same.h5").write_text("1")
    (tmp_path / "two.h5").write_text("2")
    make = lambda weights="imagenet", dtype="float16", images=folder, name="cache": features.open_cache(
        tmp_path / name, images, names, weights, dtype
    )
    make(str(tmp_path / "two.h5"))
    make().write("0.png", np.zeros((64, 2048)))  # an empty cache may begin again with other weights, this one no more
    make()
    for other, message in [
        ({"weights": str(tmp_path / "one.h5")}, "sha256 None"),
        ({"dtype": "float32"}, "dtype float16, expected float32"),
        ({"images": tmp_path}, "images"),
    ]:
        with pytest.raises(InputError, match=message):
            make(**other)
    make(str(tmp_path / "one.h5"), name="own").write("0.png", np.zeros((64, 2048)))
    make(str(tmp_path / "same.h5"), name="own")  # the same bytes under another name
    with pytest.raises(InputError, match="sha256"):
        make(str(tmp_path / "two.h5"), name="own")
    with pytest.raises(InputError, match=r"none\.h5: no such weights file"):
        make(str(tmp_path / "none.h5"))


def test_a_moved_project_keeps_its_cache(tmp_path, pictures):
    folder, names = pictures
    features.open_cache(tmp_path / "a/features", folder, names, "imagenet", "float16")
    manifest = json.loads((tmp_path / "a/features/features.json").read_text())
    assert manifest["images"] == "../../pictures"


def test_weights_of_another_model_are_refused(tmp_path):
    tf.keras.Sequential([tf.keras.Input((3,)), tf.keras.layers.Dense(2)]).save_weights(tmp_path / "other.weights.h5")
    with pytest.raises(InputError, match="not the weights of InceptionV3"):
        features.build_cnn(str(tmp_path / "other.weights.h5"))


def test_shards_share_the_work(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    names = [f"{i}.png" for i in range(5)]
    for name in names:
        picture().save(folder / name)
    (tmp_path / "captions.csv").write_text("image,caption\n" + "".join(f"{name},a ramp\n" for name in names))
    (tmp_path / "weights.h5").write_text("stands for weights")
    monkeypatch.setattr(
        features, "build_cnn", lambda weights: lambda pixels, training: tf.zeros((len(pixels), 64, 2048))
    )
    arguments = ["--annotations", str(tmp_path / "captions.csv"), "--images", str(folder), "--val-fraction", "0"]
    arguments += ["--test-fraction", "0", "--features-dir", str(tmp_path / "cache")]
    arguments += ["--weights", str(tmp_path / "weights.h5")]
    cached = lambda: sorted(path.name for path in (tmp_path / "cache").glob("*.npy"))
    features.main([*arguments, "--shard", "2/2"])
    assert cached() == ["1.png.npy", "3.png.npy"]
    features.main([*arguments, "--shard", "1/2"])
    assert len(cached()) == 5
    assert [line[0] for line in capsys.readouterr().out.splitlines()] == ["2", "3"]
    with pytest.raises(SystemExit):
        features.main([*arguments, "--shard", "3/2"])
    with pytest.raises(InputError, match="--shard needs weights"):
        features.main([*arguments, "--shard", "1/2", "--weights", "random"])
