"""What the checks of benchmarks/gpu.py share: their sizes, their data, and the rows of their table."""

from pathlib import Path
from typing import Any, NamedTuple

from benchmarks import training
from captioning.config.settings import ModelConfig
from captioning.images.feature_cache import FeatureCache, make_manifest
from captioning.training.input_pipeline import EncodedCaptions, encode_captions
from tokenizer import Tokenizer

Row = dict[str, Any]  # what, value, expected and passed, the last two None where nothing is expected


class Sizes(NamedTuple):
    """How much work the checks do."""

    num_captions: int = 12_800
    num_images: int = 1600
    model: tuple[int, int] = (256, 512)  # embedding_dim, units
    batch_sizes: tuple[int, ...] = (64, 256, 1024)
    num_steps: int = 30  # in a measurement
    num_pictures: int = 256  # that the CNN sees


SMALL = Sizes(num_captions=64, num_images=16, model=(8, 16), batch_sizes=(8,), num_steps=2, num_pictures=4)


class Data(NamedTuple):
    """Random captions and features, the same on every device."""

    captions: EncodedCaptions
    cache: FeatureCache
    config: ModelConfig


def row(what: str, value: Any, expected: str | None = None, passed: bool | None = None) -> Row:
    """Makes a row of the table."""
    return {"what": what, "value": value, "expected": expected, "passed": passed}


def make_data(folder: Path, sizes: Sizes, attention: str = "soft") -> Data:
    """Makes random captions, with the lengths of COCO's, and random features of their images."""
    examples = training.make_examples(sizes.num_captions, None, sizes.num_images)
    tokenizer = Tokenizer.fit((text for example in examples for text in example.captions), 5000)
    cache = FeatureCache(folder / "features", make_manifest(folder / "features", folder, "imagenet", "float16"))
    if not cache.folder.exists():
        cache = training.write_random_features(cache.folder, examples)
    embedding_dim, units = sizes.model
    config = ModelConfig(len(tokenizer), embedding_dim, units, attention=attention)
    return Data(encode_captions(examples, tokenizer.encode, cache.path, training.MAX_LENGTH), cache, config)
