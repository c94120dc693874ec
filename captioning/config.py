"""The settings of the project: each with its default, its help text and its bounds, in one place.

A setting is a field of one of the frozen dataclasses below. From the field come the option of the command line
(`add_options`), the checks of its value (`Settings`), and those of a run's config.json (`from_json`).
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from captioning.cli import InputError

SEED_LIMIT = 2**32  # NumPy's seeds are smaller


def option(
    default: Any,
    help: str,
    *,
    minimum: float = -math.inf,
    above: float = -math.inf,
    maximum: float = math.inf,
    below: float = math.inf,
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    words: Mapping[str, Any] | None = None,
    may_change: bool = False,
) -> Any:
    """Declares a setting as a dataclass field.

    Args:
        default: its value if nothing is said.
        help: what it does, for `--help`.
        minimum: the smallest value.
        above: values must be larger than this.
        maximum: the largest value.
        below: values must be smaller than this.
        choices: the values there are, of a setting that is a word.
        metavar: what `--help` calls the value; N for whole numbers and X for others if not given.
        words: words of the command line that stand for a value, such as `all`.
        may_change: whether a run may be resumed with another value.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "minimum": minimum,
            "above": above,
            "maximum": maximum,
            "below": below,
            "choices": choices,
            "metavar": metavar,
            "words": words or {},
            "may_change": may_change,
        },
    )


class Settings:
    """Checks the values of the dataclasses below when they are made, from a command line, a file or code alike."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if not is_valid(field, value):
                raise InputError(f"{field.name}: expected {describe(field)}, found {str(value)[:60]!r}")

    def to_json(self) -> dict[str, Any]:
        """Returns the values by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Makes the settings from what `to_json` returned.

        Raises:
            InputError: a value is missing, unknown, or not what its field allows.
        """
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if not isinstance(values, dict) or (missing := [name for name in names if name not in values]):
            raise InputError(f"{missing[0]} is missing" if isinstance(values, dict) else f"expected {', '.join(names)}")
        if unknown := [name for name in values if name not in names]:
            raise InputError(f"{unknown[0]} is not a setting")
        return cls(**values)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Makes the settings from a parsed command line that has the options of `add_options`."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def value_type(field: dataclasses.Field) -> type:
    """Returns a field's type: int, float, bool or str, also where None is allowed."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not types.NoneType)
    return typing.cast(type, field.type)


def is_valid(field: dataclasses.Field, value: Any) -> bool:
    """Tells whether a field may have a value: one of its type (a float may be whole), within its bounds."""
    bounds = field.metadata
    if value is None:
        return isinstance(field.type, types.UnionType)
    kind = value_type(field)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float if kind is float else kind):
        return False
    if bounds["choices"] is not None and value not in bounds["choices"]:
        return False
    if kind not in (int, float):
        return True
    # A number that is not finite is never above -inf and below inf.
    return bounds["minimum"] <= value <= bounds["maximum"] and bounds["above"] < value < bounds["below"]


def describe(field: dataclasses.Field) -> str:
    """Says which values a field may have: `a whole number of at least 1`."""
    bounds, kind = field.metadata, value_type(field)
    if bounds["choices"]:
        return " or ".join(bounds["choices"])
    if kind in (bool, str):
        return "true or false" if kind is bool else "text"
    texts = {"minimum": "of at least", "above": "above", "maximum": "of at most", "below": "below"}
    limits = [f"{text} {bounds[name]:g}" for name, text in texts.items() if math.isfinite(bounds[name])]
    words = "".join(f", or {word}" for word in bounds["words"])
    return " ".join(["a whole number" if kind is int else "a number", " and ".join(limits)]).strip() + words


# The command line.


def add_options(
    parser: argparse._ActionsContainer,
    settings: type[Settings],
    defaults: Mapping[str, Any] | None = None,
    only: tuple[str, ...] | None = None,
    skip: tuple[str, ...] = (),
) -> None:
    """Adds an option for every field of a settings class.

    Args:
        parser: a parser, or a group of one.
        settings: the class.
        defaults: values that take the place of the fields' own defaults.
        only: the names of the fields to add; None for all.
        skip: the names of fields to leave out.
    """
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        if (only is not None and field.name not in only) or field.name in skip:
            continue
        default = (defaults or {}).get(field.name, field.default)
        text, kind = field.metadata["help"], value_type(field)
        if default is not None and kind is not bool:
            text += " (default: %(default)s)"
        keywords: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction
        elif field.metadata["choices"]:
            keywords["choices"] = field.metadata["choices"]
        else:
            letter = {int: "N", float: "X"}.get(kind, "TEXT")
            keywords |= {"type": _parser_of(field), "metavar": field.metadata["metavar"] or letter}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **keywords)


def _parser_of(field: dataclasses.Field) -> typing.Callable[[str], Any]:
    """Returns an argparse type that reads a field's value and names what is allowed."""

    def parse(text: str) -> Any:
        if text in field.metadata["words"]:
            return field.metadata["words"][text]
        try:
            value = value_type(field)(text)
        except ValueError:
            value = math.nan
        if not is_valid(field, value) or value in field.metadata["words"].values():
            raise argparse.ArgumentTypeError(f"expected {describe(field)}, found {text!r}")
        return value

    return parse


# The settings.


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Which images and captions are used; saved with a run, so that the same split can be made again."""

    dataset: str | None = option("coco", "a known dataset", choices=("coco", "flickr8k", "shapes"))
    annotations: str | None = option(
        None,
        "your own captions instead: COCO JSON, Karpathy's JSON, CSV with the header image,caption, or lines of "
        "name#0<TAB>caption",
        metavar="FILE",
        may_change=True,
    )
    images: str | None = option(
        None, "the folder of the images that --annotations names", metavar="DIR", may_change=True
    )
    num_captions: int | None = option(
        None,
        "captions to use, of whole images chosen at random (default: 30000 of coco, all of the others)",
        minimum=0,
        words={"all": 0},
        metavar="N|all",
    )
    train_list: str | None = option(None, "names of the training images, one a line", metavar="FILE")
    val_list: str | None = option(None, "names of the validation images, one a line", metavar="FILE")
    test_list: str | None = option(None, "names of the test images, one a line", metavar="FILE")
    val_fraction: float = option(0.1, "fraction of the images for validation, if no lists are given")
    test_fraction: float = option(0.1, "fraction of the images for testing, if no lists are given")
    split_seed: int = option(0, "seed of the split and of the choice of captions", minimum=0, below=SEED_LIMIT)
    data_dir: str = option("data", "folder for downloaded datasets", metavar="DIR", may_change=True)


@dataclasses.dataclass(frozen=True)
class FeatureConfig(Settings):
    """How the features of the images are computed and stored."""

    cnn_weights: str = option(
        "imagenet",
        "weights of InceptionV3: imagenet (88 MB, downloaded by Keras on first use), random, or a file",
        metavar="imagenet|random|FILE",
    )
    features_dir: str | None = option(
        None, "folder of the cached features (default: features/<name of the dataset>)", metavar="DIR"
    )
    dtype: str = option(
        "float16", "number format of the stored features: 256 or 512 KB an image", choices=("float16", "float32")
    )
    cnn_batch_size: int = option(32, "images in a batch of the CNN", minimum=1)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The sizes of the model; the defaults are the tutorial's."""

    vocab_size: int = option(5000, "words in the vocabulary, the 4 special ones included", minimum=5)
    embedding_dim: int = option(256, "size of a word embedding, and of an encoded image location", minimum=1)
    units: int = option(512, "size of the GRU's state and of the attention", minimum=1)
    dropout: float = option(0.0, "dropout rate of the word embeddings and of the GRU's outputs", minimum=0, below=1)
    attention: str = option(
        "soft", "soft: a weighted mean of all locations; hard: one location for each word", choices=("soft", "hard")
    )


# What each recipe sets instead of the defaults below. "best" scored best on Flickr8k.
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {
        "dropout": 0.3,
        "ema_decay": 0.998,
        "label_smoothing": 0.1,
        "learning_rate_decay": 0.9,
        "shuffle_by": "caption",
    },
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained; the defaults are the tutorial's, with gradient clipping and early stopping."""

    epochs: int = option(20, "largest number of epochs", minimum=1, may_change=True)
    batch_size: int = option(64, "captions in a training step", minimum=1)
    learning_rate: float = option(1e-3, "learning rate of Adam", above=0)
    learning_rate_decay: float = option(
        1.0, "factor of the learning rate after every epoch; 1 keeps it", above=0, maximum=1
    )
    clip_norm: float = option(5.0, "largest global norm of the gradients; larger ones are scaled down", above=0)
    ema_decay: float = option(
        0.0,
        "decay of the moving average of the weights, such as 0.999, that is validated and captions; 0: no average",
        minimum=0,
        below=1,
    )
    label_smoothing: float = option(0.0, "share of the target spread evenly over all words", minimum=0, below=1)
    doubly_stochastic: float = option(
        0.0, "weight of the penalty on uneven attention (Xu et al. 2015, section 4.2.1)", minimum=0
    )
    reinforce_weight: float = option(0.1, "weight of the REINFORCE term of hard attention", minimum=0)
    entropy_weight: float = option(0.002, "weight of the attention's entropy in hard attention", minimum=0)
    patience: int = option(
        3, "epochs without a better CIDEr before training stops; 0: never stop early", minimum=0, may_change=True
    )
    max_length: int = option(
        50, "longest caption in tokens, <start> and <end> included; longer ones are cut", minimum=3
    )
    max_val_images: int = option(1000, "largest number of images to validate with", minimum=1)
    checkpoint_minutes: float = option(5.0, "minutes between checkpoints within an epoch", minimum=0, may_change=True)
    seed: int = option(
        0, "seed of the initial weights, of dropout and of the order of the data", minimum=0, below=SEED_LIMIT
    )
    shuffle_by: str = option(
        "image",
        "image: all captions of an image come in one batch, which is faster; caption: captions are shuffled one by one",
        choices=("image", "caption"),
    )
    fused: bool = option(
        True,
        "train soft attention with captioning/fused_decoder.py; --no-fused trains with the plain loop in model.py, "
        "which is slower",
        may_change=True,
    )
    mixed_precision: bool = option(False, "compute in float16 on a GPU; weights stay float32")
    jit: str = option(
        "auto",
        "compile the training step with XLA; auto: on a GPU where XLA works",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    strategy: str = option(
        "none",
        "devices that share the work: one, all GPUs of this machine, or those of the machines in TF_CONFIG",
        choices=("none", "mirrored", "multiworker"),
        may_change=True,
    )
    recipe: str = option(
        "tutorial",
        "settings to start from: the tutorial's, or those that scored best on Flickr8k, "
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPES["best"].items()),
        choices=tuple(RECIPES),
        may_change=True,
    )


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Settings):
    """How captions are searched for."""

    beam_size: int = option(1, "width of the beam search; 1 takes the most probable word at every step", minimum=1)
    length_penalty: float = option(
        1.0, "captions of a beam compete by log p / length ** this; larger values prefer longer ones", minimum=0
    )


# The file that a run is saved with.


FORMAT = 2  # of config.json and of the checkpoints; changed whenever their names change


@dataclasses.dataclass(frozen=True)
class RunConfig:
    """All that a run was trained with, as its config.json keeps it."""

    model: ModelConfig
    train: TrainConfig
    data: DataConfig
    features: dict[str, Any]  # the manifest of the feature cache, and its `folder`
    unreadable_images: tuple[str, ...]  # left out, with their captions
    data_fingerprint: str  # of the images, their splits and their captions
    vocabulary_sha256: str  # of vocabulary.json

    def to_json(self) -> dict[str, Any]:
        """Returns the content of config.json."""
        return {
            "format": FORMAT,
            "model": self.model.to_json(),
            "train": self.train.to_json(),
            "data": self.data.to_json(),
            "features": self.features,
            "unreadable_images": list(self.unreadable_images),
            "data_fingerprint": self.data_fingerprint,
            "vocabulary_sha256": self.vocabulary_sha256,
        }

    def difference(self, other: "RunConfig") -> tuple[str, Any, Any] | None:
        """Finds a setting in which another run differs, of those that may not change when a run is resumed.

        Returns:
            The setting's name, its value here and its value there; None if there is none.
        """
        for section in ("model", "train", "data"):
            ours, theirs = getattr(self, section), getattr(other, section)
            for field in dataclasses.fields(ours):
                values = getattr(ours, field.name), getattr(theirs, field.name)
                if not field.metadata["may_change"] and values[0] != values[1]:
                    return field.name, *values
        for name in ("unreadable_images", "data_fingerprint"):
            if getattr(self, name) != getattr(other, name):
                return name, getattr(self, name), getattr(other, name)
        for name in self.features.keys() | other.features.keys():
            # A weights file is what it holds (its SHA-256), not what it is called.
            if name == "folder" or (name == "weights" and "sha256" in self.features):
                continue
            if self.features.get(name) != other.features.get(name):
                return name, self.features.get(name), other.features.get(name)
        return None
