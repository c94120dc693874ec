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
    paper, paper-plain        the same two with --decoder paper.
    paper-lstm                the plain loop with --decoder paper --cell lstm.

They are measured alternately, and compilation is not counted. The last line is JSON. Its `ratio` is that of the first
variant that is not the tutorial's to the tutorial.
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
from benchmarks.timing import interleaved_median_rates, items_per_second
from captioning.base.cli import int_at_least, log, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import INCEPTION_V3
from captioning.config.options import add_options
from captioning.config.settings import ModelConfig, TrainConfig
from captioning.data.annotations import Example, read_annotations
from captioning.images.feature_cache import FeatureCache, make_manifest
from captioning.training.checkpoints import TrainProgress
from captioning.training.input_pipeline import Batch, EncodedCaptions, encode_captions, make_dataset, make_epoch_batches
from captioning.training.optimizer import WeightEMA, make_optimizer
from tokenizer import START_ID, Tokenizer

layers = tf.keras.layers

# Of each variant of the project, the settings of the model, and whether it takes the fused decoder.
PROJECT_VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "fused": ({}, True),
    "plain": ({}, False),
    "paper": ({"decoder": "paper"}, True),
    "paper-plain": ({"decoder": "paper"}, False),
    "paper-lstm": ({"decoder": "paper", "cell": "lstm"}, False),
}
VARIANTS = ("tutorial", *PROJECT_VARIANTS)
MAX_LENGTH, MEAN_LENGTH = 49, 12.5  # tokens of COCO's captions, <start> and <end> included


# The data.


def sample_lengths(num_captions: int, rng: np.random.Generator) -> np.ndarray:
    """Samples lengths like those of COCO's captions: most have 10 to 14 tokens, a few are long, the longest has 49."""
    lengths = 10 + rng.negative_binomial(1.6, 1.6 / (1.6 + MEAN_LENGTH - 10), num_captions)
    lengths = lengths.clip(max=MAX_LENGTH)
    lengths[0] = MAX_LENGTH
    return lengths


def make_examples(num_captions: int, annotations: str | None, num_images: int) -> list[Example]:
    """Makes the captions to train on: those of some images of a file, or random words if there is no file."""
    rng = np.random.default_rng(0)
    if annotations:
        examples = read_annotations(annotations)
        subset = [examples[i] for i in rng.permutation(len(examples))[:num_images]]
        return [dataclasses.replace(example, split="train") for example in subset]
    num_words = sample_lengths(num_captions, rng) - 2  # without <start> and <end>
    texts = [" ".join(f"word{i}" for i in rng.integers(0, 4996, count)) for count in num_words]
    return [Example(f"{i}.jpg", tuple(texts[i::num_images]), i, "train") for i in range(min(num_images, len(texts)))]


def write_random_features(folder: Path, examples: list[Example]) -> FeatureCache:
    """Fills a cache with random features."""
    cache = FeatureCache(folder, make_manifest(folder, folder, "imagenet", "float16"))
    rng = np.random.default_rng(0)
    for example in examples:
        cache.write(example.image_path, rng.random(cache.shape))
    return cache


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


def project_batches(
    captions: EncodedCaptions, cache: FeatureCache, batch_size: int, static_shapes: bool
) -> Iterator[Batch]:
    """Yields the batches of train.py, epoch after epoch, without the last one, which is not full."""
    for epoch in itertools.count():
        batches = make_epoch_batches(captions, batch_size, seed=0, epoch=epoch)
        full_batches = [rows for rows in batches if len(rows) == batch_size]
        yield from make_dataset(captions, full_batches, cache.read, static_shapes)


def make_project_step(
    caption_model: model.CaptionModel, config: TrainConfig, batch_spec: Batch
) -> Callable[[Batch], tf.Tensor]:
    """Makes the training step of train.py, and returns the sum of the losses so far from it."""
    optimizer = make_optimizer(config.learning_rate, config.clip_norm, config.mixed_precision)
    optimizer.build(caption_model.trainable_variables)
    ema = WeightEMA(caption_model.trainable_variables, config.ema_decay)
    state = train.TrainState(caption_model, optimizer, ema, TrainProgress())
    train_step = train.make_train_step(state, config, tf.distribute.get_strategy(), batch_spec)

    def step(batch: Batch) -> tf.Tensor:
        train_step(batch)
        return state.progress.loss_sum

    return step


# The measurement.


class Variant(NamedTuple):
    """One way to train."""

    step: Callable[..., tf.Tensor]  # takes a batch, returns a loss
    batches: Iterator[tuple]
    num_steps: int  # in a round


def make_variant(
    name: str, args: argparse.Namespace, config: ModelConfig, captions: EncodedCaptions, cache: FeatureCache
) -> Variant:
    """Makes a variant by its name, with a model of its own."""
    if name == "tutorial":
        tutorial_step = make_tutorial_step(TutorialModel(config))
        return Variant(tutorial_step, tutorial_batches(captions, args.batch_size), args.tutorial_steps)
    model_settings, fused = PROJECT_VARIANTS[name]
    train_config = TrainConfig(
        batch_size=args.batch_size, jit=args.jit, mixed_precision=args.mixed_precision, fused=fused
    )
    caption_model = model.build(dataclasses.replace(config, **model_settings), mixed_precision=args.mixed_precision)
    caption_model.decoder.fused = train_config.fused
    batch_spec = make_dataset(captions, [], cache.read).element_spec
    step = make_project_step(caption_model, train_config, batch_spec)
    batches = project_batches(captions, cache, args.batch_size, args.jit == "on")
    return Variant(step, batches, args.steps)


def run_steps(variant: Variant, num_steps: int) -> None:
    """Runs training steps, reading included."""
    for batch in itertools.islice(variant.batches, num_steps):
        loss = variant.step(batch)
    float(loss)  # waits for the last step


def measure_variants(
    variants: dict[str, Variant], batch_size: int, rounds: int
) -> tuple[dict[str, float], dict[str, float]]:
    """Measures the variants.

    Returns:
        By variant, the captions per second, and the seconds of the first step, compilation included.
    """
    first_step = {
        name: 1 / items_per_second(functools.partial(run_steps, variant, 1), 1) for name, variant in variants.items()
    }
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in first_step.items())
    log(f"first step, compilation included: {seconds}")

    def measure(variant: Variant) -> float:
        return items_per_second(lambda: run_steps(variant, variant.num_steps), variant.num_steps * batch_size)

    measurements = {name: functools.partial(measure, variant) for name, variant in variants.items()}
    return interleaved_median_rates(measurements, rounds, "captions"), first_step


def matrix_product_rate(size: int = 2048, repeats: int = 5) -> float:
    """Measures the machine's rate of large matrix products, in FLOP/s."""
    a = tf.random.normal((size, size))
    product = tf.function(lambda: tf.matmul(a, a)[0, 0])
    product()
    return max(items_per_second(lambda: product().numpy(), 2 * size**3) for _ in range(repeats))


def flop_per_caption(config: ModelConfig, num_steps: float) -> float:
    """Counts the floating-point operations of the matrix products of training, forward and backward.

    Args:
        config: the sizes of the model.
        num_steps: the decoder's steps for a caption.
    """
    num_locations, num_channels = INCEPTION_V3.features_shape
    encoder_size = num_channels * config.embedding_dim  # of fc, applied at each location
    key_size = config.embedding_dim * config.units  # of W1, too
    num_gates = 4 if config.cell == "lstm" else 3
    step_size = config.units**2 + (2 * config.embedding_dim + config.units) * num_gates * config.units  # W2, the cell
    first_state_size = 0
    if config.decoder == "paper":  # f_beta, L_h, L_z and L_o; and f_init
        step_size += config.units + config.embedding_dim * (config.units + config.embedding_dim + config.vocab_size)
        first_state_size = config.embedding_dim * config.units * (num_gates - 2)
    else:
        step_size += config.units * (config.units + config.vocab_size)  # fc1 and fc2
    # Backward, each product has two: for the weights and for the input; but the features need no gradient.
    per_image = 2 * 2 * num_locations * encoder_size + 3 * 2 * (num_locations * key_size + first_state_size)
    return per_image + 3 * 2 * num_steps * step_size


# The command line.


def parse_variants(text: str) -> tuple[str, ...]:
    """Parses the value of --variants: names separated by commas, at least one of them the project's."""
    names = tuple(text.split(","))
    if not set(names) <= set(VARIANTS) or len(set(names)) < len(names) or not set(names) & PROJECT_VARIANTS.keys():
        raise argparse.ArgumentTypeError(
            f"expected some of {','.join(VARIANTS)}, at least one of them not tutorial, found {text!r}"
        )
    return names


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, prog="python -m benchmarks.training")
    count = int_at_least(1)
    parser.add_argument("--annotations", metavar="FILE", help="captions to train on (default: random words)")
    parser.add_argument(
        "--variants",
        type=parse_variants,
        metavar="NAMES",
        default="tutorial,fused",
        help="what is compared (default: %(default)s)",
    )
    parser.add_argument(
        "--captions",
        type=int_at_least(2),
        metavar="N",
        default=12_800,
        help="random captions, if no file is given (default: %(default)s)",
    )
    parser.add_argument(
        "--images", type=count, metavar="N", default=2560, help="images, 256 KB of features each (default: %(default)s)"
    )
    parser.add_argument(
        "--rounds", type=count, metavar="N", default=3, help="measurements of each variant (default: %(default)s)"
    )
    parser.add_argument(
        "--steps", type=count, metavar="N", default=50, help="the project's steps in a round (default: %(default)s)"
    )
    parser.add_argument(
        "--tutorial-steps",
        type=count,
        metavar="N",
        default=5,
        help="the tutorial's steps in a round (default: %(default)s)",
    )
    add_options(parser, ModelConfig, only=("vocab_size", "embedding_dim", "units", "dropout"))
    add_options(parser, TrainConfig, only=("batch_size", "mixed_precision", "jit"))
    args = parser.parse_args(argv)
    if args.jit == "on" and any(PROJECT_VARIANTS[name][1] for name in args.variants if name != "tutorial"):
        parser.error(
            "--jit: expected off for the fused decoder, which XLA cannot compile; add --variants tutorial,plain"
        )
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures the variants and prints their rates and ratios."""
    args = parse(argv)
    examples = make_examples(args.captions, args.annotations, args.images)
    tokenizer = Tokenizer.fit((text for example in examples for text in example.captions), args.vocab_size)
    config = ModelConfig(len(tokenizer), args.embedding_dim, args.units, args.dropout)
    with tempfile.TemporaryDirectory() as folder:
        cache = write_random_features(Path(folder), examples)
        captions = encode_captions(examples, tokenizer.encode, cache.path, MAX_LENGTH)
        variants = {name: make_variant(name, args, config, captions, cache) for name in args.variants}
        rates, first_step = measure_variants(variants, args.batch_size, args.rounds)
    project_rates = {name: rate for name, rate in rates.items() if name in PROJECT_VARIANTS}
    first = next(iter(project_rates))
    ratios = {}
    if "tutorial" in rates:
        ratios = {name: round(rate / rates["tutorial"], 2) for name, rate in project_rates.items()}
    mean_length = float(captions.lengths.mean())
    used = flop_per_caption(dataclasses.replace(config, **PROJECT_VARIANTS[first][0]), mean_length - 1) * rates[first]
    result = {
        "captions": len(captions.lengths),
        "mean_tokens": round(mean_length, 2),
        "longest": int(captions.lengths.max()),
        "batch_size": args.batch_size,
        "captions_per_second": {name: round(value, 1) for name, value in rates.items()},
        "ratio": ratios.get(first),
        "ratios": ratios,
        "first_step_seconds": {name: round(value, 1) for name, value in first_step.items()},
        "share_of_matrix_product_rate": round(used / matrix_product_rate(), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
