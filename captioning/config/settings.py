"""The settings of the project: each with its default, its help text and its bounds, in one place.

A setting is a field of one of the frozen dataclasses below; `options` makes options and checks from it.
"""

import dataclasses
from typing import Any

from captioning.base.cli import InputError
from captioning.config.cnns import CNN, CNNS
from captioning.config.options import Settings, option, path_option

SEEDS = "[0, 4294967296)"  # NumPy's are below 2 ** 32
MAX_TOKENS = 10_000  # of a caption
CONSENSUS_BEAM = 20  # of --choose consensus, which needs captions to choose from
MAX_MEGAPIXELS = 179  # Pillow's own limit against decompression bombs


@dataclasses.dataclass(frozen=True)
class DataConfig(Settings):
    """Which images and captions are used; saved with a run, so that the same split can be made again."""

    dataset: str | None = option(
        "coco", "a known dataset", choices=("coco", "coco2017", "flickr8k", "flickr30k", "shapes")
    )
    annotations: str | None = path_option(
        "your own captions instead: a file, or a folder of images with their captions", "PATH"
    )
    images: str | None = path_option("the folder of their images (default: the folder of the annotations)", "DIR")
    val_annotations: str | None = path_option("captions for validation", "PATH")
    val_images: str | None = path_option("the folder of their images (default: --images)", "DIR")
    test_annotations: str | None = path_option("captions for testing", "PATH")
    test_images: str | None = path_option("the folder of their images (default: --images)", "DIR")
    official_val: bool = option(
        False, "for coco and coco2017: validate and test with images of the official validation set"
    )
    num_captions: int | None = option(
        None,
        "captions to use, of whole images chosen at random (default: 30000 for coco and coco2017, else all)",
        bounds="[0, inf)",
        words={"all": 0},
        metavar="N|all",
    )
    train_list: str | None = path_option("names of the training images, one a line", "FILE")
    val_list: str | None = path_option("names of the validation images, one a line", "FILE")
    test_list: str | None = path_option("names of the test images, one a line", "FILE")
    val_fraction: float = option(0.1, "fraction of the images for validation, if no lists or files are given")
    test_fraction: float = option(0.1, "fraction of the images for testing, if no lists or files are given")
    split_seed: int = option(0, "seed of the split and of the choice of captions", bounds=SEEDS)
    data_dir: str | None = path_option("folder for downloaded datasets (default: data)", "DIR")
    image_column: str | None = option(
        None, "column or field with the images' names, if it is not found", metavar="NAME"
    )
    caption_column: str | None = option(None, "column or field with the captions, if it is not found", metavar="NAME")
    separator: str | None = option(
        None, "separator of the columns: a character, or `tab` (default: detected: comma, tab, semicolon or bar)"
    )
    encoding: str | None = option(
        None, "encoding of annotations and lists (default: UTF-8, or UTF-16 with a byte order mark)", metavar="NAME"
    )
    words: str = option(
        "spaces",
        "how captions are split into words: by spaces, or by characters (Chinese, Japanese, Thai)",
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
        "side in pixels of the square that an image is resized to (default: the CNN's own, 299 for inception_v3)",
        bounds="[1, inf)",
    )
    cnn_weights: str = option(
        "imagenet",
        "weights of the CNN: imagenet (Keras downloads them once, 88 MB for inception_v3), random, or a file",
        metavar="imagenet|random|FILE",
    )
    features_dir: str | None = option(
        None,
        "folder of the cached features (default: features/<dataset>, with _<CNN> and _<size> unless they are defaults)",
        metavar="DIR",
    )
    dtype: str = option(
        "float16",
        "number format of the stored features: 256 or 512 KB an image for inception_v3",
        choices=("float16", "float32"),
    )
    cnn_batch_size: int | None = option(
        None, "number of images in a batch of the CNN (default: 32; features.py on a GPU: 128)", bounds="[1, inf)"
    )
    cnn_precision: str = option(
        "float32",
        "what the CNN computes in; tf32 and float16 are faster on a GPU, and change the features a little",
        choices=("float32", "tf32", "float16"),
    )
    max_megapixels: int = option(
        MAX_MEGAPIXELS, "largest image that is read, in millions of pixels (3 bytes of memory each)", bounds="[1, inf)"
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

    vocab_size: int = option(5000, "number of words in the vocabulary, the 4 special ones included", bounds="[5, inf)")
    embedding_dim: int = option(256, "size of a word embedding, and of an encoded image location", bounds="[1, inf)")
    units: int = option(512, "size of the GRU's state and of the attention", bounds="[1, inf)")
    dropout: float = option(0.0, "dropout rate of the word embeddings and of the GRU's outputs", bounds="[0, 1)")
    feature_dropout: float = option(0.0, "dropout rate of the encoded features", bounds="[0, 1)")
    attention: str = option(
        "soft", "soft: a weighted mean of all locations; hard: one location for each word", choices=("soft", "hard")
    )
    decoder: str = option(
        "tutorial",
        "the tutorial's decoder; or the paper's, with a gate and a deep output layer, and a GRU or an LSTM",
        choices=("tutorial", "paper", "paper-lstm"),
    )

    @property
    def can_be_fused(self) -> bool:
        """Whether captioning/decoder/fused_decoder.py computes this model."""
        return self.decoder == "tutorial" and self.attention == "soft"


# What a recipe sets instead of the defaults below. "best" scored best on Flickr8k.
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
}


@dataclasses.dataclass(frozen=True)
class TrainConfig(Settings):
    """How the model is trained; the defaults are the tutorial's, with gradient clipping and early stopping."""

    epochs: int = option(20, "largest number of epochs", bounds="[1, inf)", may_change=True)
    batch_size: int = option(64, "number of captions in a training step", bounds="[1, inf)")
    learning_rate: float = option(1e-3, "learning rate of Adam", bounds="(0, inf)")
    learning_rate_decay: float = option(1.0, "factor of the learning rate after every epoch; 1 = off", bounds="(0, 1]")
    clip_norm: float = option(5.0, "largest global norm of the gradients; more is scaled down", bounds="(0, inf)")
    ema_decay: float = option(
        0.0,
        "decay of the exponential moving average of the weights (e.g. 0.999), used for validation and captioning; "
        "0 = off",
        bounds="[0, 1)",
    )
    label_smoothing: float = option(0.0, "share of the target that is spread evenly over all words", bounds="[0, 1)")
    patience: int = option(
        3, "stop after so many epochs without a better score; 0 = never", bounds="[0, inf)", may_change=True
    )
    max_length: int = option(
        50, "longest caption in tokens, <start> and <end> included; longer ones are cut", bounds=f"[3, {MAX_TOKENS}]"
    )
    max_val_images: int = option(1000, "largest number of images to validate with", bounds="[1, inf)")
    checkpoint_minutes: float = option(
        5.0, "minutes between checkpoints within an epoch", bounds="[0, inf)", may_change=True
    )
    seed: int = option(0, "seed of the initial weights, of dropout and of the order of the data", bounds=SEEDS)
    shuffle_by: str = option(
        "image",
        "image: all captions of an image come in one batch, which is faster; caption: captions are shuffled one by one",
        choices=("image", "caption"),
    )
    fused: bool = option(
        True,
        "train with fused_decoder.py, or with the plain loop in model.py, which is slower on a CPU",
        may_change=True,
    )
    mixed_precision: bool = option(False, "compute in float16 on a GPU; weights stay float32")
    jit: str = option(
        "auto",
        "compile the training step with XLA, which takes seconds for each of three shapes; auto: where one GPU trains, "
        "unless --deterministic; on a CPU it is slower",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    features_on_gpu: str = option(
        "auto",
        "keep the features of all training images on the device; auto: on a GPU of which they take at most half of the "
        "free memory",
        choices=("auto", "on", "off"),
        may_change=True,
    )
    deterministic: bool = option(
        False, "make runs on a GPU repeatable: operations add in one order, which is slower", may_change=True
    )
    strategy: str = option(
        "none",
        "devices that share the work: one, all GPUs of this machine, or the machines in TF_CONFIG",
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

    beam_size: int = option(1, "width of the beam search; 1 = greedy search", bounds="[1, inf)")
    length_penalty: float = option(
        1.0, "beam search ranks captions by log p / length^X; larger values give longer captions", bounds="[0, inf)"
    )
    max_words: int | None = option(
        None,
        "number of words after which a caption that has not ended is cut (default: the run's --max-length)",
        bounds=f"[1, {MAX_TOKENS}]",
    )
    min_words: int = option(0, "number of words before which a caption may not end", bounds=f"[0, {MAX_TOKENS}]")
    no_repeat: bool = option(False, "allow no word twice in a row, and no three words twice")
    captions: int = option(
        1,
        "number of captions per image (the beam is widened if needed; with --sample, that many samples)",
        bounds="[1, 100]",
    )
    sample: bool = option(False, "draw every word at random by its probability, instead of searching for the best ones")
    temperature: float = option(
        1.0, "sampling temperature: below 1 favours probable words, above 1 rare ones", bounds="[0.01, 100]"
    )
    top_p: float = option(
        1.0, "sample from the most probable words that together have this probability", bounds="(0, 1]"
    )
    decode_seed: int = option(0, "seed of --sample: the same image and seed give the same captions", bounds=SEEDS)
    choose: str = option(
        "probability",
        "which caption of a beam is the best: the most probable one, or by consensus the one that agrees best with the "
        f"captions of similar training images (the beam is {CONSENSUS_BEAM} wide unless --beam-size is 2 or more)",
        choices=("probability", "consensus"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sample and self.choose != "probability":
            raise InputError(f"--choose {self.choose} is for the captions of a beam search; omit --sample")
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
            f"_penalty{self.length_penalty:g}": is_beam and self.length_penalty != 1 and self.choose == "probability",
            f"_{self.choose}": self.choose != "probability",
            "_sample": self.sample,
            f"_t{self.temperature:g}": self.temperature != 1,
            f"_p{self.top_p:g}": self.top_p != 1,
            f"_seed{self.decode_seed}": self.decode_seed != 0,
            f"_max{self.max_words}": self.max_words is not None,
            f"_min{self.min_words}": self.min_words > 0,
            "_norepeat": self.no_repeat,
        }
        return "".join(part for part, is_set in parts.items() if is_set)

    def describe(self) -> str:
        """Says in a few words how captions are searched for."""
        if self.sample:
            return f"words drawn at random, temperature {self.temperature:g}, top-p {self.top_p:g}"
        if self.num_beams == 1:
            return "greedy search"
        chosen = "" if self.choose == "probability" else f", chosen by {self.choose}"
        return f"beam search, {self.num_beams} wide{chosen}"

    @property
    def num_beams(self) -> int:
        """The width of the beam search, which is at least the number of captions that are asked for."""
        is_default = self.choose == "consensus" and self.beam_size == 1
        return max(CONSENSUS_BEAM if is_default else self.beam_size, self.captions)

    @property
    def num_candidates(self) -> int:
        """The number of captions of each image that the search returns: all of a beam where another choice follows."""
        return self.captions if self.choose == "probability" else self.num_beams
