"""What the tests share: small data of their own, made in a temporary folder. No network, no GPU."""

import random

import numpy as np
import pytest

import features
import model
from data_utils import Dataset, Example
from tokenizer import Tokenizer

COLOURS = ("red", "green", "blue")
NOUNS = ("dog", "cat", "bird", "horse")


@pytest.fixture
def cache(tmp_path):
    """An empty cache of float16 features."""
    return features.FeatureCache(
        tmp_path / "cache",
        {"cnn": "InceptionV3", "weights": "imagenet", "image_size": 299, "dtype": "float16", "images": "../images"},
    )


@pytest.fixture
def dataset(tmp_path, cache):
    """24 pictures with two captions each and cached features: one location tells the colour, another the noun."""
    dice, noise = random.Random(0), np.random.default_rng(0)
    examples = []
    for number in range(24):
        colour, noun = dice.randrange(3), dice.randrange(4)
        name = f"picture_{number:02}.jpg"
        values = noise.uniform(0, 0.1, (64, 2048))
        values[10, 100 * colour : 100 * colour + 100] = values[20, 1000 + 100 * noun : 1100 + 100 * noun] = 1
        cache.write(name, values)
        captions = (f"a {COLOURS[colour]} {NOUNS[noun]}", f"there is a {COLOURS[colour]} {NOUNS[noun]} in the picture")
        examples.append(Example(name, captions, number, "train" if number < 16 else "val" if number < 20 else "test"))
    return Dataset("small", tmp_path / "images", tuple(examples))


@pytest.fixture
def words(dataset):
    return Tokenizer.fit(caption for example in dataset.split("train") for caption in example.captions)


@pytest.fixture
def small_model(words):
    import tensorflow as tf

    tf.keras.utils.set_random_seed(0)
    return model.build(model.ModelConfig(vocabulary_size=len(words), embedding_dim=8, units=16))
