"""The settings of the project: each with its default, its help text and its bounds, in one place.

A setting is a field of one of the frozen dataclasses below; `options` makes options and checks from it.
"""

import dataclasses
from typing import Any, Self

from captioning.base.cli import InputError
from captioning.config.cnns import CNN, CNNS
from captioning.config.options import Settings, option

SEED_LIMIT = 2**32  # NumPy's seeds are smaller
MAX_TOKENS = 10_000  # of a caption
MAX_MEGAPIXELS = 179  # Pillow's own limit against decompression bombs


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Which images and captions are used; saved with a run, so that the same split can be made again."""

    dataset: str | None = option(
        "coco", "a known dataset", choices=("coco", "coco2017", "flickr8k", "flickr30k", "shapes")
    )
    annotations: str | None = option(
        None,
        "your own captions instead: a file, or a folder of images with their captions",
        metavar="PATH",
        is_path=True,
    )
    images: str | None = option(
        None,
        "the folder of the images that --annotations names (default: the folder of the annotations)",
        metavar="DIR",
        is_path=True,
    )
    val_annotations: str | None = option(None, "captions for validation", metavar="PATH", is_path=True)
    val_images: str | None = option(None, "the folder of their images (default: --images)", metavar="DIR", is_path=True)
    test_annotations: str | None = option(None, "captions for testing", metavar="PATH", is_path=True)
    test_images: str | None = option(
        None, "the folder of their images (default: --images)", metavar="DIR", is_path=True
    )
    official_val: bool = option(
        False, "of coco and coco2017: take the images for validation and testing from the official validation images"
    )
    num_captions: int | None = option(
        None,
        "captions to use, of whole images chosen at random (default: 30000 of coco and coco2017, all of the others)",
        minimum=0,
        words={"all": 0},
        metavar="N|all",
    )
    train_list: str | None = option(None, "names of the training images, one a line", metavar="FILE", is_path=True)
    val_list: str | None = option(None, "names of the validation images, one a line", metavar="FILE", is_path=True)
    test_list: str | None = option(None, "names of the test images, one a line", metavar="FILE", is_path=True)
    val_fraction: float = option(0.1, "fraction of the images for validation, if no lists or files are given")
    test_fraction: float = option(0.1, "fraction of the images for testing, if no lists or files are given")
    split_seed: int = option(0, "seed of the split and of the choice of captions", minimum=0, below=SEED_LIMIT)
    data_dir: str | None = option(None, "folder for downloaded datasets (default: data)", metavar="DIR", is_path=True)
    image_column: str | None = option(
        None, "the column or field with the images' names, if it has none of the usual names", metavar="NAME"
    )
    caption_column: str | None = option(
        None, "the column or field with the captions, if it has none of the usual names", metavar="NAME"
    )
    separator: str | None = option(
        None, "what separates the columns: a character, or `tab` (default: comma, tab, semicolon or bar, as found)"
    )
    encoding: str | None = option(
        None, "of the annotations, such as windows-1252 (default: UTF-8, or UTF-16 by its mark)", metavar="NAME"
    )
    words: str = option(
        "spaces",
        "what a word is: what stands between spaces, or every character of scripts without spaces, such as Chinese",
        choices=("spaces", "characters"),
    )


DATA_PATHS = tuple(field.name for field in dataclasses.fields(DataConfig) if field.metadata["is_path"])


@dataclasses.dataclass(frozen=True)
class FeatureConfig(Settings):
    """How the features of the images are computed and stored."""

    cnn: str = option(
        "inception_v3", "the CNN that computes the features; docs/use.md compares them", choices=tuple(CNNS)
    )
    image_size: int | None = option(
        None,
        "pixels of both sides of the square that an image is squeezed to, which give the CNN's grid of locations "
        "(default: the CNN's own, 299 of inception_v3)",
        minimum=1,
    )
    cnn_weights: str = option(
        "imagenet",
        "weights of the CNN: imagenet (downloaded by Keras on first use, 88 MB of inception_v3), random, or a file",
        metavar="imagenet|random|FILE",
    )
    features_dir: str | None = option(
        None,
        "folder of the cached features (default: features/<name of the dataset>, and of other CNNs or image sizes "
        "features/<name>_<CNN>_<size>)",
        metavar="DIR",
    )
    dtype: str = option(
        "float16",
        "number format of the stored features: 256 or 512 KB an image with inception_v3",
        choices=("float16", "float32"),
    )
    cnn_batch_size: int = option(32, "images in a batch of the CNN", minimum=1)
    max_megapixels: int = option(
        MAX_MEGAPIXELS,
        "largest image that is read, in millions of pixels, which take 3 bytes of memory each",
        minimum=1,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.sized_cnn  # which raises InputError if the CNN does not take images of this size

    @property
    def sized_cnn(self) -> CNN:
        """The CNN, for images of the size that is asked for."""
        return CNNS[self.cnn].at(self.image_size)


@dataclasses.dataclass(frozen=True)
class ModelConfig(Settings):
    """The sizes of the model; the defaults are the tutorial's."""

    vocab_size: int = option(5000, "words in the vocabulary, the 4 special ones included", minimum=5)
    embedding_dim: int = option(256, "size of a word embedding, and of an encoded image location", minimum=1)
    units: int = option(512, "size of the GRU's state and of the attention", minimum=1)
    dropout: float = option(0.0, "dropout rate of the word embeddings and of the GRU's outputs", minimum=0, below=1)
    feature_dropout: float = option(0.0, "dropout rate of the encoded features", minimum=0, below=1, is_new=True)
    attention: str = option(
        "soft", "soft: a weighted mean of all locations; hard: one location for each word", choices=("soft", "hard")
    )
    decoder: str = option(
        "tutorial",
        "the tutorial's; or that of the paper, with a gate, a first state from the image, and deep output",
        choices=("tutorial", "paper"),
        is_new=True,
    )
    cell: str = option("gru", "recurrent cell; lstm is for --decoder paper", choices=("gru", "lstm"), is_new=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.cell == "lstm" and self.decoder != "paper":
            raise InputError(f"cell: lstm is only for the paper's decoder, found the {self.decoder}'s")

    @property
    def can_be_fused(self) -> bool:
        """Whether captioning/decoder/fused_decoder.py has this attention and this cell."""
        return self.attention == "soft" and self.cell == "gru"


# What each recipe sets instead of the defaults below. "best" scored best on Flickr8k, "best-cider" after it.
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {
        "dropout": 0.3,
        "feature_dropout": 0.3,
        "ema_decay": 0.998,
        "label_smoothing": 0.1,
        "learning_rate_decay": 0.9,
        "shuffle_by": "caption",
    },
    "best-cider": {
        "recipe": "best-cider",
        "self_critical": True,
        "epochs": 3,
        "learning_rate": 4e-5,
        "clip_norm": 0.5,
        "ema_decay": 0.998,
        "dropout": 0.3,
        "feature_dropout": 0.5,
        "bleu_weight": 1.0,
        "cross_entropy_weight": 0.1,
    },
}
CNN_SETTINGS = ("cnn_learning_rate",)
SELF_CRITICAL_SETTINGS = ("samples", "baseline", "bleu_weight", "cross_entropy_weight")


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
        3,
        "epochs that are not better than the best one, before training stops; 0: never stop early",
        minimum=0,
        may_change=True,
    )
    max_length: int = option(
        50, "longest caption in tokens, <start> and <end> included; longer ones are cut", minimum=3, maximum=MAX_TOKENS
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
    self_critical: bool = option(
        False,
        "train on the CIDEr of captions that the model samples: from the best weights of --run, which is not changed, "
        "into a run of the same name with _cider added",
        is_new=True,
    )
    samples: int = option(5, "captions that are sampled of each image", minimum=2, is_new=True)
    baseline: str = option(
        "others",
        "what a caption's reward is compared with: the mean of the image's other samples, or its greedy caption",
        choices=("others", "greedy"),
        is_new=True,
    )
    bleu_weight: float = option(0.0, "how much of a caption's BLEU-4 is added to its CIDEr", minimum=0, is_new=True)
    cross_entropy_weight: float = option(
        0.0, "weight of the cross-entropy of the true captions, beside that of the rewards", minimum=0, is_new=True
    )
    train_cnn: int = option(
        0,
        "train the CNN too, from its block N on, of 1 to 5: a block begins where the grid gets smaller (inception_v3: "
        "mixed0 to 2 are block 3, mixed3 to 7 block 4, mixed8 to 10 block 5); from the best weights of --run, which is "
        "not changed, into a run of the same name with _cnn added; 0: the CNN stays as it is",
        minimum=0,
        is_new=True,
    )
    cnn_learning_rate: float = option(
        1e-5, "learning rate of the CNN in --train-cnn; --learning-rate is that of the decoder", above=0, is_new=True
    )
    fused: bool = option(
        True,
        "train soft attention with fused_decoder.py; --no-fused trains with the plain loop in model.py, "
        "which is slower",
        may_change=True,
    )
    mixed_precision: bool = option(False, "compute in float16 on a GPU; weights stay float32")
    jit: str = option(
        "off",
        "compile the training step with XLA: on a GPU twice as fast, after minutes of compiling; on a CPU slower",
        choices=("off", "on"),
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
        + " ".join(f"--{name.replace('_', '-')} {value}" for name, value in RECIPES["best"].items())
        + "; best-cider is that of --self-critical",
        choices=tuple(RECIPES),
        may_change=True,
    )

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Makes the settings from what `to_json` returned; `jit` may be `auto`, as it was when this was a choice."""
        if isinstance(values, dict) and values.get("jit") == "auto":
            values = values | {"jit": "off"}
        return super().from_json(values)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.self_critical:
            unused = ("label_smoothing", "doubly_stochastic", "train_cnn")
            self._expect_defaults(unused, "not for self-critical training")
            if self.jit == "on":
                raise InputError("jit on: not for self-critical training, whose rewards are computed on the CPU")
        else:
            self._expect_defaults(SELF_CRITICAL_SETTINGS, "only for self-critical training")
        if self.train_cnn:
            self._expect_defaults(("jit", "strategy"), "not for training the CNN")
        else:
            self._expect_defaults(CNN_SETTINGS, "only for training the CNN")

    def _expect_defaults(self, names: tuple[str, ...], reason: str) -> None:
        """Raises InputError if a setting that this kind of training does not have is not its default."""
        for name in names:
            if (value := getattr(self, name)) != (default := self.__dataclass_fields__[name].default):
                raise InputError(f"{name}: {reason}; expected {default}, found {value}")

    @property
    def suffix(self) -> str:
        """What the name of the new run has more than that of the run whose weights it starts from; often nothing."""
        return "_cider" if self.self_critical else "_cnn" if self.train_cnn else ""


@dataclasses.dataclass(frozen=True)
class DecodeConfig(Settings):
    """How captions are searched for."""

    beam_size: int = option(1, "width of the beam search; 1 takes the most probable word at every step", minimum=1)
    length_penalty: float = option(
        1.0, "captions of a beam compete by log p / length ** this; larger values prefer longer ones", minimum=0
    )
    max_words: int | None = option(
        None,
        "words after which a caption that has not ended is cut (default: the run's --max-length)",
        minimum=1,
        maximum=MAX_TOKENS,
    )
    min_words: int = option(0, "words before which a caption may not end", minimum=0, maximum=MAX_TOKENS)
    no_repeat: bool = option(False, "never the same word twice in a row, and never the same three words twice")
    captions: int = option(
        1,
        "captions of each image: the best of the beam, which is made at least this wide, or as many random ones",
        minimum=1,
        maximum=100,
    )
    sample: bool = option(False, "draw every word at random by its probability, instead of searching for the best ones")
    temperature: float = option(
        1.0, "of --sample: below 1 probable words are drawn more often, above 1 rare ones", minimum=0.01, maximum=100
    )
    top_p: float = option(
        1.0, "of --sample: draw from the most probable words that together have this probability", above=0, maximum=1
    )
    decode_seed: int = option(
        0, "of --sample: the same image and seed give the same captions", minimum=0, below=SEED_LIMIT
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.beam_size > 1:
            raise InputError("--sample draws words at random, --beam-size searches for the best: expected only one")
        if not self.sample and (self.temperature, self.top_p, self.decode_seed) != (1.0, 1.0, 0):
            raise InputError("--temperature, --top-p and --decode-seed are for --sample")
        if self.max_words is not None and self.min_words > self.max_words:
            raise InputError(f"--min-words {self.min_words}: expected at most --max-words, which is {self.max_words}")

    @property
    def suffix(self) -> str:
        """What the names of files with captions end in: `_beam5_penalty0.85`, or nothing for greedy search."""
        is_beam = self.num_beams > 1 and not self.sample
        parts = {
            f"_beam{self.num_beams}": is_beam,
            f"_penalty{self.length_penalty:g}": is_beam and self.length_penalty != 1,
            "_sample": self.sample,
            f"_min{self.min_words}": self.min_words > 0,
            "_norepeat": self.no_repeat,
        }
        return "".join(part for part, is_set in parts.items() if is_set)

    def describe(self) -> str:
        """Says in a few words how captions are searched for."""
        if self.sample:
            return f"words drawn at random, temperature {self.temperature:g}, top-p {self.top_p:g}"
        return "greedy search" if self.num_beams == 1 else f"beam search, {self.num_beams} wide"

    @property
    def num_beams(self) -> int:
        """The width of the beam search, which is at least the number of captions that are asked for."""
        return max(self.beam_size, self.captions)
