"""Compares the speed of training with that of the tutorial's code, in captions per second.

    python -m benchmarks.training                                          # lengths like those of COCO's captions
    python -m benchmarks.training --annotations captions_train2014.json
    python -m benchmarks.training --variants tutorial,fused,plain --dropout 0.3

The variants train the same model on the same features, with the same batch size:

    tutorial  the tutorial's code. Every batch is padded to the longest caption of the data, the loop over words is
              unrolled in a tf.function, every step applies W1 to the features and the vocabulary layer to the state,
              and the loss is a mean over padding too. It has no dropout.
    fused     train.py's step, with captioning/decoder/fused_decoder.py (the default of train.py).
    plain     train.py's step, with the plain loop of model.py (--no-fused).
    paper     the plain loop with --decoder paper; paper-lstm: with --decoder paper-lstm.

They are measured alternately, and compilation is not counted. The last line is JSON. Its `ratio` is the rate of the
first variant but the tutorial's, divided by the tutorial's.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import model
import train
from benchmarks.timing import add_counts, interleaved_median_rates, items_per_second
from captioning.base.cli import InputError, log, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import add_options
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.data.annotations import Example, read_annotations
from captioning.images.feature_cache import FeatureCache, make_manifest
from captioning.training.input_pipeline import Batch, EncodedCaptions, TrainBatches, encode_captions
from captioning.training.objective import CrossEntropy
from captioning.training.resident_features import load_features
from tokenizer import START_ID, Tokenizer

layers = tf.keras.layers

# The variants, and what each changes in the settings of the model.
VARIANTS: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "fused": {},
    "plain": {},
    "paper": {"decoder": "paper"},
    "paper-lstm": {"decoder": "paper-lstm"},
}
MAX_LENGTH, MEAN_LENGTH = 49, 12.5  # tokens of COCO's captions, <start> and <end> included


# The data.


class TrainingData(NamedTuple):
    """What all variants train on."""

    captions: EncodedCaptions
    cache: FeatureCache
    config: ModelConfig


def sample_lengths(num_captions: int, rng: np.random.Generator) -> np.ndarray:
    """Samples lengths like those of COCO's captions: most have 10 to 14 tokens, a few are long, the longest has 49."""
    lengths = 10 + rng.negative_binomial(1.6, 1.6 / (1.6 + MEAN_LENGTH - 10), num_captions)
    lengths = lengths.clip(max=MAX_LENGTH)
    lengths[0] = MAX_LENGTH
    return lengths


def read_examples(annotations: str, num_images: int) -> list[Example]:
    """Reads the captions of some images of a file."""
    examples = read_annotations(annotations)
    subset = np.random.default_rng(0).permutation(len(examples))[:num_images]
    return [dataclasses.replace(examples[i], split="train") for i in subset]


def make_examples(num_captions: int, num_images: int) -> list[Example]:
    """Makes captions of random words, with the lengths of COCO's."""
    rng = np.random.default_rng(0)
    num_words = sample_lengths(num_captions, rng) - 2  # without <start> and <end>
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 4996, count)) for count in num_words]
    return [Example(f"{i}.jpg", tuple(texts[i::num_images]), i, "train") for i in range(min(num_images, len(texts)))]


def make_data(folder: Path, examples: list[Example], config: ModelConfig) -> TrainingData:
    """Encodes captions, and fills a cache in a folder with random features of their images.

    Args:
        folder: where the features are written.
        examples: images with captions.
        config: the settings of the model, of which `vocab_size` is the largest size.
    """
    tokenizer = Tokenizer.fit((text for example in examples for text in example.captions), config.vocab_size)
    cache = FeatureCache(folder, make_manifest(folder, folder, "imagenet", "float16"))
    rng = np.random.default_rng(0)
    for example in examples:
        cache.write(example.image_path, rng.random(cache.shape))
    captions = encode_captions(examples, tokenizer.encode, cache.path, MAX_LENGTH)
    return TrainingData(captions, cache, dataclasses.replace(config, vocab_size=len(tokenizer)))


# The tutorial's code.


def tutorial_batches(captions: EncodedCaptions, batch_size: int) -> Iterator[tuple[tf.Tensor, tf.Tensor]]:
    """Yields batches as the tutorial does: shuffled captions, padded to the longest of all, with their features."""

    def map_func(path: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.load(path.decode(), allow_pickle=False).astype(np.float32), tokens

    paths = captions.feature_paths[captions.image_index]  # (captions,)
    dataset = tf.data.Dataset.from_tensor_slices((paths, captions.tokens)).shuffle(1000).repeat()
    dataset = dataset.map(
        lambda path, tokens: tf.numpy_function(map_func, [path, tokens], [tf.float32, tf.int32]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    for img_tensor, target in dataset.batch(batch_size).prefetch(tf.data.AUTOTUNE):
        yield tf.ensure_shape(img_tensor, (batch_size, 64, 2048)), tf.ensure_shape(target, (batch_size, None))


class TutorialAttention(tf.keras.Model):
    """The tutorial's BahdanauAttention."""

    def __init__(self, units: int):
        super().__init__()
        self.W1 = layers.Dense(units)
        self.W2 = layers.Dense(units)
        self.V = layers.Dense(1)

    def call(self, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Maps features (B, 64, 256) and state (B, 512) to the context (B, 256) and the weights (B, 64, 1)."""
        score = self.V(tf.nn.tanh(self.W1(features) + self.W2(tf.expand_dims(hidden, 1))))  # (B, 64, 1)
        attention_weights = tf.nn.softmax(score, axis=1)
        return tf.reduce_sum(attention_weights * features, axis=1), attention_weights


class TutorialDecoder(tf.keras.Model):
    """The tutorial's RNN_Decoder, except that the GRU receives its state, which the tutorial forgets."""

    def __init__(self, embedding_dim: int, units: int, vocab_size: int):
        super().__init__()
        self.embedding = layers.Embedding(vocab_size, embedding_dim)
        self.gru = layers.GRU(units, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform")
        self.fc1 = layers.Dense(units)
        self.fc2 = layers.Dense(vocab_size)
        self.attention = TutorialAttention(units)

    def call(self, x: tf.Tensor, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Maps words (B, 1) to logits (B, vocab_size), the state (B, 512) and the weights (B, 64, 1)."""
        context_vector, attention_weights = self.attention(features, hidden)
        x = tf.concat([tf.expand_dims(context_vector, 1), self.embedding(x)], axis=-1)  # (B, 1, 512)
        output, state = self.gru(x, initial_state=hidden)
        x = self.fc1(output)  # (B, 1, 512)
        x = self.fc2(tf.reshape(x, (-1, x.shape[2])))  # (B, vocab_size)
        return x, state, attention_weights


class TutorialModel(tf.keras.Model):
    """The tutorial's encoder and decoder."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.units = config.units
        self.encoder = layers.Dense(config.embedding_dim, activation="relu")
        self.decoder = TutorialDecoder(config.embedding_dim, config.units, config.vocab_size)

    def call(self, img_tensor: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """Computes the tutorial's training loss: the sum over words of the mean over the batch, 0 at padding."""
        loss_object = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        loss = 0.0
        hidden = tf.zeros((target.shape[0], self.units))
        dec_input = tf.fill([target.shape[0], 1], START_ID)
        features = self.encoder(img_tensor)
        for i in range(1, target.shape[1]):
            predictions, hidden, _ = self.decoder(dec_input, features, hidden)
            loss_ = loss_object(target[:, i], predictions)
            loss += tf.reduce_mean(loss_ * tf.cast(target[:, i] != 0, loss_.dtype))
            dec_input = tf.expand_dims(target[:, i], 1)
        return loss


def make_tutorial_step(tutorial: TutorialModel) -> Callable[[tuple[tf.Tensor, tf.Tensor]], tf.Tensor]:
    """Makes the tutorial's `train_step`, which returns the loss."""
    optimizer = tf.keras.optimizers.Adam()

    @tf.function
    def train_step(batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tutorial(*batch)
        variables = tutorial.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return train_step


# The project's code.


def project_batches(batches: TrainBatches) -> Iterator[Batch]:
    """Yields the batches of train.py, epoch after epoch, without the last one, which is not full."""
    for epoch in itertools.count():
        yield from batches.load([rows for rows in batches.order(epoch) if len(rows) == batches.config.batch_size])


def make_project_step(
    caption_model: model.CaptionModel,
    settings: TrainConfig,
    batch_spec: Batch,
    image_features: tf.Variable | None = None,
) -> Callable[[Batch], tf.Tensor]:
    """Makes the training step of train.py, which here returns the sum of the losses so far.

    Args:
        caption_model: the model; `settings.fused` decides which way through its decoder is taken.
        settings: those of train.py.
        batch_spec: the shapes of the batches.
        image_features: (images, L, C), the features of all images, if the batches bring none.
    """
    caption_model.decoder.fused = settings.fused
    state = train.make_train_state(caption_model, CrossEntropy(settings), settings)
    train_step = train.make_train_step(state, settings, tf.distribute.get_strategy(), batch_spec, image_features)

    def step(batch: Batch) -> tf.Tensor:
        train_step(batch)
        return state.progress.loss_sum

    return step


# The measurement.


class Variant(NamedTuple):
    """One way to train."""

    step: Callable[..., tf.Tensor]  # takes a batch, returns a loss
    batches: Iterator[tuple]


def make_variant(name: str, data: TrainingData, settings: TrainConfig) -> Variant:
    """Makes a variant by its name, with a model of its own."""
    if name == "tutorial":
        tutorial_step = make_tutorial_step(TutorialModel(data.config))
        return Variant(tutorial_step, tutorial_batches(data.captions, settings.batch_size))
    config = dataclasses.replace(data.config, **VARIANTS[name])
    settings = dataclasses.replace(settings, fused=name == "fused")
    caption_model = model.build(config, mixed_precision=settings.mixed_precision)
    strategy = tf.distribute.get_strategy()
    image_features = load_features(data.captions.feature_paths, data.cache.read, settings, strategy)
    read_features = data.cache.read if image_features is None else None
    batches = TrainBatches(data.captions, read_features, settings, strategy)
    step = make_project_step(caption_model, settings, batches.spec, image_features)
    return Variant(step, project_batches(batches))


def run_steps(variant: Variant, num_steps: int) -> float:
    """Runs training steps, reading included; returns the last step's loss, and so waits for it."""
    for batch in itertools.islice(variant.batches, num_steps):
        loss = variant.step(batch)
    return float(loss)


# The command line.


def parse_variants(text: str) -> tuple[str, ...]:
    """Parses the value of --variants: names separated by commas, at least one of them the project's."""
    names = tuple(text.split(","))
    if not set(names) <= VARIANTS.keys() or len(set(names)) < len(names) or names == ("tutorial",):
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(VARIANTS)}, at least one of them not tutorial, found {text!r}"
        )
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    parser.add_argument("--annotations", metavar="FILE", help="train on these captions (default: random words)")
    text = "compare these (default: %(default)s)"
    parser.add_argument("--variants", type=parse_variants, metavar="NAMES", default="tutorial,fused", help=text)
    counts = {
        "captions": (12_800, "make so many random captions, if no file is given"),
        "images": (2560, "take so many images, 256 KB of features each"),
        "rounds": (3, "measure each variant so often"),
        "steps": (50, "take so many of the project's steps in a round"),
        "tutorial-steps": (5, "take so many of the tutorial's steps in a round"),
    }
    add_counts(parser, counts)
    add_options(parser, ModelConfig, only=("vocab_size", "embedding_dim", "units", "dropout"))
    add_options(parser, TrainConfig, only=("batch_size", "mixed_precision", "jit"))
    args = parser.parse_args(argv)
    if args.jit == "on" and "fused" in args.variants:
        parser.error(
            "--jit: expected off for the fused decoder, which XLA cannot compile; add --variants tutorial,plain"
        )
    return args


def measure(data: TrainingData, args: argparse.Namespace) -> dict[str, Any]:
    """Measures the variants that the command line names; returns what the benchmark prints."""
    settings = TrainConfig(batch_size=args.batch_size, mixed_precision=args.mixed_precision, jit=args.jit)
    measurements, first_step = {}, {}
    for name in args.variants:
        variant = make_variant(name, data, settings)
        first_step[name] = round(1 / items_per_second(functools.partial(run_steps, variant, 1), 1), 1)
        log(f"{name}: the first step, compilation included, took {first_step[name]} s")
        num_steps = args.tutorial_steps if name == "tutorial" else args.steps
        run = functools.partial(run_steps, variant, num_steps)
        measurements[name] = functools.partial(items_per_second, run, num_steps * args.batch_size)
    rates = interleaved_median_rates(measurements, args.rounds, "captions")
    ratios = {}
    if "tutorial" in rates:
        ratios = {name: round(rate / rates["tutorial"], 2) for name, rate in rates.items() if name != "tutorial"}
    return {
        "captions": len(data.captions.lengths),
        "mean_tokens": round(float(data.captions.lengths.mean()), 2),
        "longest": int(data.captions.lengths.max()),
        "batch_size": args.batch_size,
        "captions_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": next(iter(ratios.values()), None),
        "ratios": ratios,
        "first_step_seconds": first_step,
    }


def main(argv: list[str] | None = None) -> None:
    """Measures the variants and prints their rates and ratios."""
    args = parse(argv)
    if args.annotations:
        examples = read_examples(args.annotations, args.images)
    else:
        examples = make_examples(args.captions, args.images)
    num_captions = sum(len(example.captions) for example in examples)
    if num_captions < args.batch_size:
        raise InputError(f"--batch-size: expected at most the {num_captions} captions, found {args.batch_size}")
    with tempfile.TemporaryDirectory() as folder:
        config = ModelConfig(args.vocab_size, args.embedding_dim, args.units, args.dropout)
        print(json.dumps(measure(make_data(Path(folder), examples, config), args)))


if __name__ == "__main__":
    run_main(main)
