"""Training of the CNN: its blocks, images with their augmentation, and runs from the command to a caption.

Keras's MobileNetV3 is replaced by a small CNN; all else is real.
"""

import functools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers.runs import SimulatedKill, assert_same_checkpoint, read_checkpoint, read_history, stop_after

import evaluate
import features
import inference
import model
import train
from beyond.cider import __main__ as cider
from beyond.finetune import __main__ as finetune
from beyond.finetune.cnn_blocks import TrainedCNN, find_blocks, trainable_from
from beyond.finetune.images import augment, find_images_with, mirror
from captioning.base.cli import InputError
from captioning.base.files import file_sha256, read_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNNS
from captioning.data import shapes
from captioning.images.cnn_loader import find_cnn
from captioning.images.feature_cache import open_run_cache
from captioning.runs.run_folder import VOCABULARY_FILE
from captioning.scores import metrics
from captioning.training import training_log
from captioning.training.input_pipeline import Batch
from tokenizer import Tokenizer

layers = tf.keras.layers
CNN = ["--cnn", "mobilenet_v3_large", "--image-size", "64", "--cnn-weights", "random"]
DATA = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes"]
MODEL = ["--embedding-dim", "8", "--units", "16", "--dropout", "0.1", "--max-length", "9"]
SETTINGS = ["--epochs", "2", "--batch-size", "6", "--learning-rate", "1e-2", "--cnn-learning-rate", "1e-3"]
RUN = Path("runs/shapes_cnn")


def build_small_cnn(include_top, weights, input_shape):
    """A CNN of five blocks, each with a strided convolution and batch normalisation: `b1_conv` and so on."""
    pixels = x = tf.keras.Input(input_shape)
    for number, channels in enumerate((4, 4, 8, 8, 960), start=1):
        x = layers.Conv2D(channels, 3, strides=2, padding="same", name=f"b{number}_conv")(x)
        x = layers.BatchNormalization(name=f"b{number}_norm")(x)
        x = layers.ReLU(name=f"b{number}_relu")(x)
    return tf.keras.Model(pixels, x, name="small")


@pytest.fixture(scope="module", autouse=True)
def _small_and_quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tf.keras.applications, "MobileNetV3Large", build_small_cnn)
        patch.setattr(model, "fused_decoder_matches", functools.cache(model.fused_decoder_matches))
        patch.setattr(training_log, "plot_history", lambda *_: None)
        patch.setattr(metrics, "has_java", lambda: False)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with runs/shapes, trained for an epoch with the CNN fixed."""
    folder = tmp_path_factory.mktemp("folder")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        shapes.draw_dataset("shapes", num_images=24)
        train.main([*DATA, *CNN, *MODEL, "--epochs", "1", "--label-smoothing", "0.1", "--run", "runs/shapes"])
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    """The same as the current folder."""
    monkeypatch.chdir(folder)
    return folder


def train_cnn(*argv, block=4, run="runs/shapes", on_step=None):
    finetune.main(["--block", str(block), "--run", str(run), *SETTINGS, *argv], on_step)


def variables_of(state):
    """Returns the values of all variables of the CNN and of the decoder by their paths."""
    return {v.path: v.numpy() for v in find_cnn(state.model.cnn.extractor).variables}, {
        v.path: v.numpy() for each in (state.model.encoder, state.model.decoder) for v in each.trainable_variables
    }


@pytest.fixture(scope="module")
def trained(folder):
    """runs/shapes_cnn, and the variables of the CNN and of the decoder after each step."""
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        train_cnn("--ema-decay", "0.5", on_step=lambda state: steps.append(variables_of(state)))
    return steps


# Blocks.


def test_blocks_begin_with_strides():
    cnn = build_small_cnn(False, None, (64, 64, 3))
    names = [[layer.name for layer in block] for block in find_blocks(cnn)]
    assert names == [[f"b{n}_conv", f"b{n}_norm", f"b{n}_relu"] for n in range(1, 6)]
    trainable_from(cnn, 4)
    expected = [f"b{n}_conv/{name}" for n in (4, 5) for name in ("kernel", "bias")]
    assert [variable.path for variable in cnn.trainable_variables] == expected
    assert len(find_blocks(cnn)) == 5, "also of a CNN that is not all trained"


@pytest.mark.slow
def test_blocks_of_inception_v3():
    blocks = find_blocks(tf.keras.applications.InceptionV3(weights=None, include_top=False))
    number = {layer.name: number for number, block in enumerate(blocks, 1) for layer in block}
    assert [number[f"mixed{i}"] for i in range(11)] == [3] * 3 + [4] * 5 + [5] * 3 and len(blocks) == 5


def test_blocks_of_branches_and_of_layers_in_layers():
    pixels = tf.keras.Input((32, 32, 3))
    first = layers.Conv2D(4, 3, padding="same", name="first")(pixels)
    pooled = layers.MaxPooling2D(name="pool")(first)
    branch = layers.Conv2D(4, 1, name="branch")(first)  # before the strides of its branch
    down = tf.keras.Sequential([layers.LayerNormalization(name="norm"), layers.Conv2D(4, 2, strides=2, name="down")])
    last = layers.Conv2D(4, 1, name="last")(layers.Concatenate(name="both")([pooled, down(branch)]))
    blocks = find_blocks(tf.keras.Model(pixels, last))
    assert [{layer.name for layer in block} for block in blocks] == [
        {"first", "branch"},
        {"pool", "norm", "down", "both", "last"},
    ]


@pytest.mark.parametrize("block", [0, 6])
def test_blocks_that_a_cnn_lacks_are_refused(block):
    with pytest.raises(InputError, match=f"--block {block}: expected 1 to 5, the blocks of small"):
        trainable_from(build_small_cnn(False, None, (64, 64, 3)), block)


# Images.


def test_augment_keeps_shape_range_and_sides(rng):
    pixels = np.zeros((40, 32, 32, 3), np.uint8)
    pixels[:, :, 16:] = rng.integers(100, 256, (40, 32, 16, 3))  # the right half is bright
    pixels[:8], pixels[8:16] = 0, 255
    images = augment(tf.constant(pixels), tf.constant([3, 5], tf.int64)).numpy()
    assert images.shape == pixels.shape and images.dtype == np.uint8
    assert (images[16:, :, 20:].mean((1, 2, 3)) > images[16:, :, :12].mean((1, 2, 3)) + 50).all(), "a mirror image"
    assert images[:8].max() <= 26 and images[8:16].min() >= 229, "neither wraps around nor changes much"
    assert len({image.tobytes() for image in images[16:]}) == 24
    again = augment(tf.constant(pixels), tf.constant([3, 5], tf.int64)).numpy()
    np.testing.assert_array_equal(again, images)
    assert (augment(tf.constant(pixels), tf.constant([3, 6], tf.int64)).numpy() != images).any((1, 2, 3))[16:].all()


def test_words_of_sides_that_no_caption_has_are_refused(tmp_path):
    Tokenizer.fit(["a dog left of a cat"]).save(tmp_path / VOCABULARY_FILE)
    assert len(finetune.find_side_words(tmp_path, "left, right")) == 1
    with pytest.raises(InputError, match="such as left,right; found 'left right'"):
        finetune.find_side_words(tmp_path, "left right")


def test_images_are_mirrored_unless_a_caption_names_a_side(rng):
    left, dog = 7, 8
    tokens = tf.constant([[2, dog, 3, 0], [2, left, dog, 3], [2, dog, dog, 3]])
    batch = Batch(None, tf.constant([2, 0, 0]), tokens, tf.constant([5, 6, 7]), None)
    assert find_images_with(tf.constant([left, 9]), batch).numpy().tolist() == [True, False, False]
    pixels, allowed = rng.integers(0, 256, (40, 4, 4, 3), np.uint8), np.arange(40) % 2 == 0
    mirrored = mirror(tf.constant(pixels), tf.constant(allowed), tf.constant([3, 5], tf.int64)).numpy()
    is_mirrored = (mirrored == pixels[:, :, ::-1]).all((1, 2, 3))
    assert (is_mirrored | (mirrored == pixels).all((1, 2, 3))).all()
    assert not is_mirrored[~allowed].any() and 4 < is_mirrored[allowed].sum() < 16


@pytest.mark.slow
def test_trained_cnn_rounds_features_as_inference_does(rng):
    extractor = features.build_feature_extractor("random", CNNS["mobilenet_v3_large"].at(64))
    pixels = tf.constant(rng.integers(0, 256, (2, 64, 64, 3)), tf.uint8)
    cnn = TrainedCNN(extractor, "float16")
    with tf.GradientTape() as tape:
        values = cnn(pixels)
        loss = tf.reduce_sum(values**2)
    exact = extractor(pixels)
    np.testing.assert_array_equal(values, tf.cast(tf.cast(exact, tf.float16), tf.float32))
    assert (values.numpy() != exact.numpy()).any() and values.dtype == tf.float32
    assert all(
        np.abs(gradient).max() > 0 for gradient in tape.gradient(loss, find_cnn(extractor).trainable_variables[-2:])
    )


# Runs.


@pytest.mark.slow
def test_mixed_precision_trains_the_cnn_in_float16(inside, tmp_path, capsys):
    dtypes = []

    def on_step(state):
        cnn = find_cnn(state.model.cnn.extractor)
        dtypes.append((cnn.output.dtype, cnn.trainable_variables[0].dtype, state.model.cnn.extractor.output.dtype))

    start = copy_run("runs/shapes", tmp_path / "start")
    train_cnn("--mixed-precision", "--epochs", "1", "--mirror-unless", "left,norden", run=start, on_step=on_step)
    assert "the vocabulary has no 'norden'" in capsys.readouterr().err
    assert set(dtypes) == {("float16", "float32", "float32")}
    before, now = (inference.Captioner.load(run).extractor for run in (start, tmp_path / "start_cnn"))
    kernels = [find_cnn(extractor).get_layer("b5_conv").kernel for extractor in (before, now)]
    assert kernels[1].dtype == "float32" and find_cnn(now).output.dtype == "float32"
    assert np.isfinite(kernels[1]).all() and (kernels[0].numpy() != kernels[1].numpy()).any()


@pytest.mark.slow
def test_only_the_blocks_from_n_on_are_trained_each_at_its_rate(inside, trained):
    start = features.build_feature_extractor("runs/shapes/cnn.weights.h5", CNNS["mobilenet_v3_large"].at(64))
    before = {variable.path: variable.numpy() for variable in find_cnn(start).variables}
    cnn, _ = trained[-1]
    changed = {path for path, value in cnn.items() if (value != before[path]).any()}
    assert changed == {f"b{n}_conv/{name}" for n in (4, 5) for name in ("kernel", "bias")}
    # Adam's first step changes a weight by the learning rate.
    kernel = "b5_conv/kernel"
    assert np.abs(trained[0][0][kernel] - before[kernel]).max() == pytest.approx(1e-3, rel=0.01)
    _, decoder = trained[0]
    saved = read_checkpoint(Path("runs/shapes"), "best")
    embedding = next(value for key, value in saved.items() if "decoder/embedding/" in key)
    now = next(value for path, value in decoder.items() if value.shape == embedding.shape and "embedding" in path)
    assert np.abs(now - embedding).max() == pytest.approx(1e-2, rel=0.01)


@pytest.mark.slow
def test_settings_come_from_the_start(inside, trained):
    start, config = (read_json(Path(run) / "config.json") for run in ("runs/shapes", RUN))
    assert config["model"] == start["model"] and config["data"] == start["data"]
    assert config["train"]["label_smoothing"] == 0.1 and config["train"]["shuffle_by"] == finetune.RECIPE["shuffle_by"]
    assert config["objective"] == {"block": 4, "cnn_learning_rate": 1e-3, "mirror_unless": None}
    assert config["features"]["weights"] == "cnn.weights.h5" and config["features"]["folder"] == "features"
    assert config["features"]["sha256"] == file_sha256(RUN / "cnn.weights.h5") != start["features"]["sha256"]
    assert len(read_history(RUN)) == 2


@pytest.mark.slow
def test_the_new_run_captions_with_its_trained_cnn(inside, trained, monkeypatch, capsys):
    assert "best: epoch 0" not in capsys.readouterr().err
    captioner, start = inference.Captioner.load(RUN), inference.Captioner.load("runs/shapes")
    image = "shapes/images/shapes_00000.png"
    pixels = captioner.load_image(image)[np.newaxis]
    assert (captioner.extract_features(pixels).numpy() != start.extract_features(pixels).numpy()).any()
    # The best weights are the moving average of some epoch, and the CNN's file is of the same one.
    best = read_checkpoint(RUN, "best")
    kernel = next(v for v in find_cnn(captioner.extractor).variables if v.path == "b5_conv/kernel").numpy()
    assert any(value.shape == kernel.shape and (value == kernel).all() for value in best.values())
    evaluate.main(["--run", str(RUN), "--split", "test"])
    images = train.data_utils.load_run_dataset(captioner.config).split("test")
    texts = [result["caption"] for result in json.loads((RUN / "captions_test.json").read_text())]
    assert texts == [captioner.caption(Path("shapes") / example.image_path).text for example in images]
    evaluate.main(["--run", str(RUN), "--split", "test", "--beam-size", "2"])
    assert (RUN / "metrics_test_beam2.json").exists() and not (RUN / "features").exists()


@pytest.mark.slow
def test_a_run_that_is_stopped_in_many_ways_resumes_exactly(inside, trained, tmp_path, monkeypatch):
    run, new_run, photo = copy_run("runs/shapes", tmp_path / "again"), tmp_path / "again_cnn", "images/shapes_00020.png"
    settings = ["--ema-decay", "0.5", "--checkpoint-minutes", "0"]
    with pytest.raises(KeyboardInterrupt):
        train_cnn(*settings, run=run, on_step=stop_after(3, KeyboardInterrupt))
    assert inference.Captioner.load(new_run).extractor, "the start is the best so far, and complete"

    content = Path("shapes", photo).read_bytes()
    Path("shapes", photo).unlink()
    try:
        with pytest.raises(InputError, match=r"shapes_00020\.png: no such image"):
            train_cnn(*settings, run=run)
    finally:
        Path("shapes", photo).write_bytes(content)

    def write_config(*_):
        raise SimulatedKill

    with monkeypatch.context() as patch, pytest.raises(SimulatedKill):
        patch.setattr(finetune, "write_config", write_config)  # of the second epoch, which is the best
        train_cnn(*settings, run=run)
    with pytest.raises(InputError, match=r"cnn\.weights\.h5: not the weights of the CNN that computed the features"):
        _ = inference.Captioner.load(new_run).extractor

    train_cnn(*settings, run=run)
    assert_same_checkpoint(read_checkpoint(new_run), read_checkpoint(RUN))
    assert read_history(new_run) == read_history(RUN)


@pytest.mark.slow
def test_self_critical_training_continues_with_the_trained_cnn(inside, trained, tmp_path):
    start = copy_run(RUN, tmp_path / "start")
    cider.main(["--run", str(start), "--epochs", "1"])
    captioner = inference.Captioner.load(tmp_path / "start_cider")
    assert "samples" in captioner.config.objective
    cache = open_run_cache(captioner.config.features)
    image = "images/shapes_00000.png"
    pixels = captioner.load_image(f"shapes/{image}")[np.newaxis]
    of_start = inference.Captioner.load(RUN).extract_features(pixels)
    np.testing.assert_allclose(np.load(cache.path(image)), of_start[0], atol=1e-3)
    np.testing.assert_array_equal(captioner.extract_features(pixels), of_start)


def copy_run(source, target):
    """Copies what a training starts from into another folder, so that its new run lies there, too."""
    config = read_json(Path(source) / "config.json")
    for section, names in (("data", ("annotations", "images", "data_dir")), ("features", ("folder",))):
        for name in names:
            path = config[section].get(name)
            config[section][name] = path and str((Path(source) / path).resolve())
    shutil.copytree(source, target)
    (target / "config.json").write_text(json.dumps(config))
    return target


# What is refused.


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--features-dir", "other"], "--features-dir: not for the training of the CNN"),
        (["--cnn-weights", "shapes/dataset_shapes.json"], "not the weights of the CNN that computed the features"),
        (["--mirror-unless", "norden"], "--mirror-unless: expected words of the captions"),
    ],
)
def test_what_does_not_fit_the_start_is_refused(inside, argv, message):
    before = sorted(Path("runs").iterdir())
    with pytest.raises(InputError, match=message):
        train_cnn(*argv)
    assert sorted(Path("runs").iterdir()) == before
