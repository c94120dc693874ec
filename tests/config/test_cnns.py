"""The CNNs of cnns.py: their table, what Keras makes of it, and a run with another one than InceptionV3."""

import functools
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from helpers.fixtures import MANIFEST
from PIL import Image

import features
import inference
import model
import train
from captioning.base.cli import InputError, format_bytes
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNNS, INCEPTION_V3
from captioning.config.settings import FeatureConfig
from captioning.data import shapes
from captioning.data.annotations import Example
from captioning.images.cnn_loader import find_cnn, preprocess
from captioning.images.feature_cache import FeatureCache, check_manifest, make_manifest
from captioning.images.random_cnn import calibrate, make_local
from data_utils import CaptionDataset

KERAS_MODULES = {
    "inception_v3": "inception_v3",
    "vgg19": "vgg19",
    "resnet50": "resnet50",
    "resnet101_v2": "resnet_v2",
    "efficientnet_v2_s": "efficientnet_v2",
    "convnext_tiny": "convnext",
    "mobilenet_v3_large": "mobilenet_v3",
}

# The table.


@pytest.mark.parametrize(
    ("option", "image_size", "side"),
    [
        ("inception_v3", None, 8),
        ("inception_v3", 224, 5),
        ("vgg19", None, 14),
        ("resnet50", 448, 14),
        ("resnet50", 449, 15),
        ("convnext_tiny", 479, 14),
    ],
)
def test_features_shape_has_the_locations_of_the_grid(option, image_size, side):
    cnn = CNNS[option].at(image_size)
    assert cnn.features_shape == (side**2, CNNS[option].num_channels)


@pytest.mark.parametrize(("option", "smallest"), [("inception_v3", 107), ("resnet50", 33), ("convnext_tiny", 64)])
def test_at_refuses_sizes_that_the_cnn_does_not_take(option, smallest):
    assert CNNS[option].at(smallest).features_shape[0] == 4 and CNNS[option].at(1024).image_size == 1024
    for size in (smallest - 1, 1025):
        with pytest.raises(InputError, match=rf"image size {size}: expected {smallest} to 1024 pixels for "):
            CNNS[option].at(size)
    with pytest.raises(InputError, match="image size 31: expected 32 to 1024 pixels for VGG19, whose own size is 224"):
        FeatureConfig(cnn="vgg19", image_size=31)


# Manifests.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cnn": "VGG16"}, "cnn: expected InceptionV3, VGG19, .*, found 'VGG16'"),
        ({"image_size": 2**40}, "image size 1099511627776: expected 107 to 1024 pixels for InceptionV3"),
        ({"cnn": "VGG19", "image_size": 224, "shape": [64, 2048]}, r"shape: expected \[196, 512\], found \[64, 2048\]"),
    ],
)
def test_check_manifest_refuses_another_cnn_size_or_shape(changes, message):
    with pytest.raises(InputError, match=message):
        check_manifest({**MANIFEST, **changes})


def test_cache_has_the_shape_of_its_cnn(tmp_path, rng):
    cnn = CNNS["convnext_tiny"].at(96)
    cache = FeatureCache(tmp_path / "cache", make_manifest(tmp_path, tmp_path, "imagenet", "float16", cnn))
    values = rng.normal(size=cnn.features_shape).astype(np.float16)
    cache.write("a.jpg", values)
    assert cache.missing(["a.jpg"]) == []
    read = cache.read(tf.constant([str(cache.path("a.jpg"))] * 2))
    np.testing.assert_array_equal(read, [values, values])
    assert FeatureCache(cache.folder, MANIFEST).missing(["a.jpg"]) == ["a.jpg"], "that is no file of InceptionV3"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (INCEPTION_V3, CNNS["vgg19"], "features made with cnn InceptionV3, expected VGG19; choose another"),
        (INCEPTION_V3, INCEPTION_V3.at(400), "features made with image_size 299, expected 400"),
    ],
)
def test_cache_of_another_cnn_is_refused(tmp_path, old, new, message):
    cache = features.open_or_create_cache(tmp_path / "cache", tmp_path, ["a.png"], "imagenet", "float16", old)
    cache.write("a.png", np.zeros(cache.shape))
    features.open_or_create_cache(tmp_path / "cache", tmp_path, ["a.png"], "imagenet", "float16", old)
    with pytest.raises(InputError, match=message):
        features.open_or_create_cache(tmp_path / "cache", tmp_path, ["a.png"], "imagenet", "float16", new)


@pytest.mark.parametrize(
    ("config", "folder", "shape"),
    [
        (FeatureConfig(), "features/greys", (64, 2048)),
        (FeatureConfig(cnn="mobilenet_v3_large", image_size=64), "features/greys_mobilenet_v3_large_64", (4, 960)),
    ],
)
def test_extract_features_gives_each_cnn_its_folder_and_pixels(tmp_path, monkeypatch, capsys, config, folder, shape):
    """The CNN is replaced by one that tells the size of its images."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        features,
        "build_feature_extractor",
        lambda _, cnn: lambda pixels, training: tf.ones((tf.shape(pixels)[0], *cnn.features_shape)) * pixels.shape[1],
    )
    Image.new("L", (8, 8)).save("a.png")
    cache, _ = features.extract_features(CaptionDataset("greys", tmp_path, (Example("a.png", ("grey",), 0),)), config)
    assert (str(cache.folder), cache.shape) == (folder, shape)
    assert json.loads((cache.folder / "features.json").read_text())["shape"] == list(shape)
    values = np.load(cache.path("a.png"))
    assert values.shape == shape and (values == config.sized_cnn.image_size).all()
    assert f"computing 1 ({format_bytes(2 * shape[0] * shape[1])}, about" in capsys.readouterr().err


# Keras's CNNs.


@pytest.mark.parametrize("option", CNNS)
def test_preprocess_is_that_of_keras(option, rng):
    pixels = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    expected = getattr(tf.keras.applications, KERAS_MODULES[option]).preprocess_input(pixels.astype(np.float32))
    values = preprocess(tf.constant(pixels), CNNS[option])
    assert values.dtype == tf.float32
    np.testing.assert_allclose(values, expected, atol=1e-4 if CNNS[option].preprocessing == "caffe" else 1e-6)


@pytest.fixture
def downloads(monkeypatch):
    """The names of the files that Keras would download; it keeps its random weights."""
    files = []
    keras = sys.modules["keras.src.utils.file_utils"]
    monkeypatch.setattr(keras, "get_file", lambda name, *_, **__: files.append(name) or name)
    monkeypatch.setattr(tf.keras.Model, "load_weights", lambda *_: None)
    return files


@pytest.mark.slow
@pytest.mark.parametrize("option", [option for option in CNNS if option != "inception_v3"])
def test_cnn_is_that_of_keras(option, downloads, recwarn, rng):
    """The size tells rounding up from rounding down. tests/test_features.py has the same for InceptionV3."""
    cnn = CNNS[option].at(65)
    extractor = features.build_feature_extractor("imagenet", cnn)
    assert downloads == [cnn.weights_file] and not [each for each in recwarn if each.category is UserWarning]
    assert (extractor.input_shape, extractor.output_shape) == ((None, 65, 65, 3), (None, *cnn.features_shape))
    scaling = {"convnext_tiny": "Normalization", "efficientnet_v2_s": "Rescaling", "mobilenet_v3_large": "Rescaling"}
    second_layer = type(find_cnn(extractor).layers[1]).__name__
    assert (cnn.preprocessing == "inside") == (option in scaling) and second_layer == scaling.get(option, second_layer)
    if option in ("vgg19", "convnext_tiny", "mobilenet_v3_large"):  # one of each kind: the others would take long
        check_random_features(extractor, cnn, rng)


def check_random_features(extractor, cnn, rng):
    pixels = rng.integers(0, 256, (4, *extractor.input_shape[1:]), dtype=np.uint8)
    make_local(find_cnn(extractor))
    calibrate(extractor, pixels, cnn)
    values = extractor(pixels).numpy()
    assert 0.3 < np.sqrt((values**2).mean()) < 5, "activations vanish or explode"
    assert np.abs(values[0] - values[1]).mean() > 0.1, "different images must have different features"
    preprocess_input = getattr(tf.keras.applications, KERAS_MODULES[cnn.option]).preprocess_input
    grid = find_cnn(extractor)(preprocess_input(pixels.astype(np.float32))).numpy()  # (4, H, W, C)
    np.testing.assert_allclose(values, grid.reshape(values.shape), rtol=1e-3, atol=1e-3)


def test_calibrate_does_not_leave_out_blocks_as_training_does(rng):
    layers = tf.keras.layers
    dropout, norm = layers.Dropout(0.9), layers.BatchNormalization()
    cnn = tf.keras.Sequential([tf.keras.Input((4, 4, 3)), dropout, norm])
    pixels = tf.keras.Input((4, 4, 3))
    images = rng.normal(size=(50, 4, 4, 3)).astype(np.float32)
    calibrate(tf.keras.Model(pixels, cnn(pixels)), images, INCEPTION_V3)
    np.testing.assert_allclose(norm.moving_variance, images.var(axis=(0, 1, 2)), rtol=1e-3)
    assert dropout.rate == 0.9 and norm.momentum == 0.99


@pytest.mark.slow
def test_run_with_another_cnn_from_drawings_to_a_caption(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(features, "build_feature_extractor", functools.cache(features.build_feature_extractor))
    monkeypatch.setattr(model, "build", functools.cache(model.build))
    shapes.draw_dataset("shapes", num_images=12)
    data = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes"]
    cnn = ["--cnn", "mobilenet_v3_large", "--image-size", "60", "--cnn-weights", "random"]
    features.main([*data, *cnn])
    folder = Path("features/shapes_mobilenet_v3_large_60")
    cached = sorted((folder / "images").iterdir())
    assert len(cached) == 12 and np.load(cached[0]).shape == (4, 960)
    settings = ["--embedding-dim", "8", "--units", "16", "--epochs", "1", "--max-length", "6", "--no-fused"]
    capsys.readouterr()
    train.main([*data, *cnn, *settings])
    assert "computing" not in capsys.readouterr().err
    with pytest.raises(
        InputError, match="runs/shapes was trained with cnn = MobileNetV3Large, expected InceptionV3; give"
    ):
        train.main([*data, *settings, "--run", "runs/shapes"])

    caption = inference.Captioner.load("runs/shapes").caption("shapes/images/shapes_00000.png")
    assert caption.words and caption.attention.shape[1] == 4
