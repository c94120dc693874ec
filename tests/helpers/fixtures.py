"""Fixtures of all tests, those of the guests too: small data, made in a temporary folder."""

import functools
import os
import random

import numpy as np
import pytest
from PIL import Image

from captioning.base.cli import Command, Verbosity
from captioning.data.annotations import Example
from captioning.images.feature_cache import FeatureCache
from data_utils import CaptionDataset
from tokenizer import Tokenizer

COLOURS = ("red", "green", "blue")
NOUNS = ("dog", "cat", "bird", "horse")
MANIFEST = {
    "cnn": "InceptionV3",
    "weights": "imagenet",
    "image_size": 299,
    "shape": [64, 2048],
    "dtype": "float16",
    "images": "../images",
}


@pytest.fixture(autouse=True)
def no_command(monkeypatch):
    """Begins every test without --quiet and without the options of a command that another test ran."""
    monkeypatch.setattr(Verbosity, "quiet", False)
    monkeypatch.setattr(Command, "options", frozenset())


@pytest.fixture
def all_options(monkeypatch):
    """A command that has all options, so that messages name them."""

    class AllOptions(frozenset):
        def issuperset(self, _):
            return True

    monkeypatch.setattr(Command, "options", AllOptions())


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture
def cache(tmp_path):
    """An empty cache of float16 features."""
    return FeatureCache(tmp_path / "cache", MANIFEST)


@pytest.fixture(scope="session")
def examples_and_cache(tmp_path_factory):
    """24 images with two captions each and cached features: one location tells the colour, another the noun."""
    cache = FeatureCache(tmp_path_factory.mktemp("small"), MANIFEST)
    choice, noise = random.Random(0), np.random.default_rng(0)
    examples = []
    for number in range(24):
        colour, noun = choice.randrange(3), choice.randrange(4)
        name = f"image_{number:02}.jpg"
        features = noise.uniform(0, 0.1, (64, 2048))
        features[10, 100 * colour : 100 * colour + 100] = 1
        features[20, 1000 + 100 * noun : 1100 + 100 * noun] = 1
        cache.write(name, features)
        captions = (f"a {COLOURS[colour]} {NOUNS[noun]}", f"there is a {COLOURS[colour]} {NOUNS[noun]} in the picture")
        examples.append(Example(name, captions, number, "train" if number < 16 else "val" if number < 20 else "test"))
    return tuple(examples), cache


@pytest.fixture
def dataset(tmp_path, cache, examples_and_cache):
    """The small dataset; its features are in `cache`."""
    examples, source = examples_and_cache
    cache.folder.mkdir()
    for example in examples:
        os.link(source.path(example.image_path), cache.path(example.image_path))
    return CaptionDataset("small", tmp_path / "images", examples)


@pytest.fixture
def tokenizer(dataset):
    return Tokenizer.fit(caption for example in dataset.split("train") for caption in example.captions)


@pytest.fixture(scope="module")
def data(examples_and_cache, tmp_path_factory):
    """The small dataset with its cache and tokenizer, shared by all runs of a file."""
    examples, cache = examples_and_cache
    dataset = CaptionDataset("small", tmp_path_factory.mktemp("images"), examples)
    captions = (caption for example in dataset.split("train") for caption in example.captions)
    return dataset, cache, Tokenizer.fit(captions)


@pytest.fixture(scope="module")
def compare_decoders_once():
    """Lets all runs of a file share one comparison of the decoders, which takes half a second."""
    import model

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "fused_decoder_matches", functools.cache(model.fused_decoder_matches))
        yield


@pytest.fixture
def small_model(tokenizer):
    import model
    from captioning.base.quiet_tensorflow import tf
    from captioning.config.settings import ModelConfig

    tf.keras.utils.set_random_seed(0)
    return model.build(ModelConfig(vocab_size=len(tokenizer), embedding_dim=8, units=16))


@pytest.fixture
def run_config(small_model, dataset, cache):
    """The settings of a run with small_model on the small dataset."""
    from captioning.config.run_config import RunConfig
    from captioning.config.settings import DataConfig, TrainConfig

    return RunConfig(
        model=small_model.config,
        train=TrainConfig(),
        data=DataConfig(),
        objective={},
        features={**cache.manifest, "folder": str(cache.folder)},
        unreadable_images=(),
        data_fingerprint=dataset.fingerprint,
        vocabulary_sha256="",
    )


@pytest.fixture
def run(tmp_path, tokenizer, small_model, run_config):
    """The folder of a run with the untrained small_model."""
    from captioning.base.quiet_tensorflow import tf
    from captioning.runs.run_folder import init_run_dir

    run = tmp_path / "runs/small"
    init_run_dir(run, run_config, tokenizer.save, "imagenet")
    tf.train.CheckpointManager(tf.train.Checkpoint(model=small_model), str(run / "checkpoints/best"), 1).save()
    return run


@pytest.fixture
def saved_dataset(dataset, monkeypatch):
    """The dataset with images, which the run finds when it loads its dataset."""
    import data_utils

    dataset.image_dir.mkdir()
    for example in dataset.examples:
        Image.new("RGB", (8, 8), "blue").save(dataset.image_dir / example.image_path)
    monkeypatch.setattr(data_utils, "load_dataset", lambda config, with_images=True: dataset)
    return dataset
