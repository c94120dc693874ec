"""Features of all training images in the memory of the device."""

import numpy as np
import pytest
from helpers.runs import LossRecorder, assert_same_checkpoint, read_checkpoint, run_training

from captioning.base import devices
from captioning.base.cli import InputError, Verbosity
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.training import resident_features
from captioning.training.resident_features import load_features


@pytest.fixture
def load(dataset, cache, monkeypatch):
    """Loads the features of all images with a setting of features_on_gpu, in chunks of 5."""
    monkeypatch.setattr(resident_features, "CHUNK", 5)
    paths = np.array([str(cache.path(example.image_path)) for example in dataset.examples])

    def load(features_on_gpu="auto", strategy=None):
        config = TrainConfig(features_on_gpu=features_on_gpu, strategy="mirrored" if strategy else "none")
        return load_features(paths, cache.read, config, strategy or tf.distribute.get_strategy())

    return load


@pytest.mark.parametrize("quiet", [False, True])
def test_load_features_has_those_of_the_cache(load, dataset, cache, monkeypatch, quiet):
    monkeypatch.setattr(Verbosity, "quiet", quiet)  # which hides the progress bar
    loaded = load("on")
    assert loaded.dtype == tf.float16 and loaded.shape == (len(dataset.examples), 64, 2048)
    for features, example in zip(loaded.numpy(), dataset.examples, strict=True):
        np.testing.assert_array_equal(features, np.load(cache.path(example.image_path)))
    assert load() is None, "on a CPU they stay on the disk"
    with pytest.raises(InputError, match="--features-on-gpu on: expected --strategy none, found mirrored"):
        load("on", tf.distribute.MirroredStrategy(["CPU:0"]))


def test_features_stay_on_the_disk_where_they_take_too_much_memory(load, monkeypatch, capsys):
    monkeypatch.setattr(devices, "has_gpu", lambda: True)
    monkeypatch.setattr(devices, "free_gpu_memory", lambda: 12_000_000)
    assert load("off") is None and capsys.readouterr().err == ""
    assert load("auto") is None
    assert capsys.readouterr().err.startswith(
        "the features of 24 images stay on the disk: they take 7 MB, and 12 MB of the GPU's memory are free; "
    )


@pytest.mark.slow
def test_training_with_features_on_the_device_is_the_same(data, tmp_path, compare_decoders_once):
    losses = {choice: LossRecorder() for choice in ("off", "on")}
    for choice, recorder in losses.items():
        run_training(tmp_path / choice, data, recorder, epochs=2, dropout=0.3, features_on_gpu=choice)
    assert losses["on"].losses == losses["off"].losses
    assert_same_checkpoint(read_checkpoint(tmp_path / "on"), read_checkpoint(tmp_path / "off"))
