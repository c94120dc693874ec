"""How much faster training is than the tutorial's way: captions per second, for the same model and batch size.

    python benchmarks/training.py                         # lengths like those of COCO's captions
    python benchmarks/training.py --annotations captions_train2014.json

The reference is the tutorial's code: every batch is padded to the longest caption of the data, the loop over words is
unrolled in a tf.function, every step applies W1 to the features and the vocabulary layer to the state, and the
loss is a mean over padding too. Both read the same features and train by turns; compilation is not counted. The
last line is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import at_least, make_parser, run_command, say  # before TensorFlow

import dataclasses
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import features
import numpy as np
import tensorflow as tf

import data_utils
import devices
import model
import train
from batches import Batch, Captions, encode_captions, make_pipeline, order_batches
from checkpoints import Average, Progress
from tokenizer import START, Tokenizer
from turns import median_rates, rate_of

layers = tf.keras.layers
LONGEST, MEAN = 49, 12.5  # tokens of COCO's captions, <start> and <end> included


def draw_lengths(count: int, dice: np.random.Generator) -> np.ndarray:
    """Lengths like those of COCO's captions: most have 10 to 14 tokens, a few are long, the longest has 49."""
    lengths = 10 + dice.negative_binomial(1.6, 1.6 / (1.6 + MEAN - 10), count)
    lengths = lengths.clip(max=LONGEST)
    lengths[0] = LONGEST
    return lengths


def make_examples(count: int, annotations: str | None, pictures: int) -> list[data_utils.Example]:
    """Captions to train on: those of so many pictures of a file, or made ones, whose words do not matter."""
    dice = np.random.default_rng(0)
    if annotations:
        examples = data_utils.read_annotations(annotations)
        chosen = [examples[i] for i in dice.permutation(len(examples))[:pictures]]
        return [dataclasses.replace(example, split="train") for example in chosen]
    lengths = draw_lengths(count, dice) - 2
    texts = [" ".join(f"word{i}" for i in dice.integers(0, 4996, length)) for length in lengths]
    return [
        data_utils.Example(f"{i}.jpg", tuple(texts[i::pictures]), i, "train") for i in range(min(pictures, len(texts)))
    ]


def tutorial_pipeline(captions: Captions, cache: features.FeatureCache, batch_size: int) -> Iterator[tuple]:
    """The tutorial's: shuffled captions, padded to the longest of all, with their features."""

    def load(path: bytes, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.load(path.decode(), allow_pickle=False).astype(np.float32), tokens

    data = (
        tf.data.Dataset.from_tensor_slices((captions.paths[captions.picture], captions.tokens)).shuffle(1000).repeat()
    )
    data = data.map(
        lambda path, tokens: tf.numpy_function(load, [path, tokens], [tf.float32, tf.int32]),
        num_parallel_calls=tf.data.AUTOTUNE,
    )
    for pictures, tokens in data.batch(batch_size).prefetch(tf.data.AUTOTUNE):
        yield tf.ensure_shape(pictures, (batch_size, 64, 2048)), tf.ensure_shape(tokens, (batch_size, None))


class TutorialAttention(tf.keras.Model):
    """The tutorial's BahdanauAttention."""

    def __init__(self, units: int):
        super().__init__()
        self.W1, self.W2, self.V = layers.Dense(units), layers.Dense(units), layers.Dense(1)

    def call(self, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        """Features (B, 64, 256) and state (B, 512) -> context (B, 256), weights (B, 64, 1)."""
        score = self.V(tf.nn.tanh(self.W1(features) + self.W2(tf.expand_dims(hidden, 1))))
        attention_weights = tf.nn.softmax(score, axis=1)
        return tf.reduce_sum(attention_weights * features, axis=1), attention_weights


class TutorialDecoder(tf.keras.Model):
    """The tutorial's RNN_Decoder, but that the GRU is given its state, which the tutorial forgets."""

    def __init__(self, embedding_dim: int, units: int, vocabulary_size: int):
        super().__init__()
        self.embedding = layers.Embedding(vocabulary_size, embedding_dim)
        self.gru = layers.GRU(units, return_sequences=True, return_state=True, recurrent_initializer="glorot_uniform")
        self.fc1, self.fc2 = layers.Dense(units), layers.Dense(vocabulary_size)
        self.attention = TutorialAttention(units)

    def call(self, x: tf.Tensor, features: tf.Tensor, hidden: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        """Words (B, 1) -> logits (B, vocabulary), state (B, 512), weights (B, 64, 1)."""
        context_vector, attention_weights = self.attention(features, hidden)
        x = tf.concat([tf.expand_dims(context_vector, 1), self.embedding(x)], axis=-1)
        output, state = self.gru(x, initial_state=hidden)
        x = self.fc1(output)
        x = self.fc2(tf.reshape(x, (-1, x.shape[2])))
        return x, state, attention_weights


class Tutorial(tf.keras.Model):
    """Its encoder and decoder."""

    def __init__(self, config: model.ModelConfig):
        super().__init__()
        self.units = config.units
        self.encoder = layers.Dense(config.embedding_dim, activation="relu")
        self.decoder = TutorialDecoder(config.embedding_dim, config.units, config.vocabulary_size)

    def call(self, pictures: tf.Tensor, target: tf.Tensor) -> tf.Tensor:
        """The loss the tutorial trains with: the sum over words of the mean over the batch, 0 at padding."""
        cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="none")
        loss = 0.0
        hidden = tf.zeros((target.shape[0], self.units))
        word = tf.fill([target.shape[0], 1], START)
        features = self.encoder(pictures)
        for i in range(1, target.shape[1]):
            logits, hidden, _ = self.decoder(word, features, hidden)
            losses = cross_entropy(target[:, i], logits)
            loss += tf.reduce_mean(losses * tf.cast(target[:, i] != 0, losses.dtype))
            word = tf.expand_dims(target[:, i], 1)
        return loss


def tutorial_step(tutorial: Tutorial) -> Callable[[tuple[tf.Tensor, tf.Tensor]], tf.Tensor]:
    """The tutorial's training step."""
    optimizer = tf.keras.optimizers.Adam()

    @tf.function
    def step(batch: tuple[tf.Tensor, tf.Tensor]) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tutorial(*batch)
        variables = tutorial.trainable_variables
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), variables, strict=True))
        return loss

    return step


def suite_batches(captions: Captions, cache: features.FeatureCache, batch_size: int, static: bool) -> Iterator[Batch]:
    """The suite's pipeline, epoch after epoch, without the last batch, which is not full."""
    for epoch in itertools.count():
        batches = [b for b in order_batches(captions, batch_size, 0, epoch) if len(b) == batch_size]
        yield from make_pipeline(captions, batches, cache, static)


def suite_step(
    captioner: model.Captioner, settings: train.TrainConfig, signature: list[Any]
) -> Callable[[Batch], tf.Tensor]:
    """The suite's training step, as train.py makes it."""
    strategy = tf.distribute.get_strategy()
    optimizer = train.make_optimizer(settings)
    optimizer.build(captioner.trainable_variables)
    progress, average = Progress(), Average(captioner.trainable_variables, 0.0)
    step = train.make_train_step(captioner, optimizer, average, progress, settings, strategy, signature)

    def run(batch: Batch) -> tf.Tensor:
        step(batch)
        return progress.loss

    return run


def take_steps(step: Callable, batches: Iterator[tuple], count: int) -> None:
    """So many steps, reading included."""
    for batch in itertools.islice(batches, count):
        found = step(batch)
    float(found)  # waits for the last step


def matrix_product_rate(size: int = 2048, repeats: int = 5) -> float:
    """The machine's rate of large matrix products, in FLOP/s."""
    a = tf.random.normal((size, size))
    product = tf.function(lambda: tf.matmul(a, a)[0, 0])
    product()
    return max(rate_of(lambda: product().numpy(), 2 * size**3) for _ in range(repeats))


def flop_of_products(captioner: model.Captioner, batch: int, tokens: float) -> float:
    """The floating-point operations of a training step's matrix products, forward and backward.

    Args:
        captioner: the model.
        batch: captions in the batch.
        tokens: steps of the decoder for each.
    """
    once = [captioner.encoder.fc.kernel, captioner.decoder.attention.W1.kernel]  # for each of the 64 locations
    often = [captioner.decoder.attention.W2.kernel, captioner.decoder.fc1.kernel, captioner.decoder.fc2.kernel]
    often += [captioner.decoder.gru.kernel, captioner.decoder.gru.recurrent_kernel]
    size = lambda kernels: sum(int(np.prod(kernel.shape)) for kernel in kernels)
    # Backward, each product has two: to the weights and to the input, but nobody needs the features' gradient.
    first = 2 * 2 * 64 * size(once[:1]) + 3 * 2 * 64 * size(once[1:])
    return batch * (first + 3 * 2 * tokens * size(often))


def main(argv: list[str] | None = None) -> None:
    """Times both by turns, and prints the ratio."""
    parser = make_parser(__doc__)
    parser.add_argument("--annotations", metavar="FILE", help="real captions (default: lengths like COCO's)")
    parser.add_argument("--captions", type=at_least(2), default=12_800, help="captions to train on (default: 12800)")
    parser.add_argument(
        "--pictures", type=at_least(1), default=2560, help="files of features, 256 KB each (default: 2560)"
    )
    parser.add_argument("--batch-size", type=at_least(1), default=64)
    parser.add_argument("--vocabulary-size", type=at_least(10), default=5000)
    parser.add_argument("--units", type=at_least(1), default=512)
    parser.add_argument("--embedding-dim", type=at_least(1), default=256)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each (default: 3)")
    parser.add_argument("--steps", type=at_least(1), default=50, help="the suite's steps in a turn (default: 50)")
    parser.add_argument("--tutorial-steps", type=at_least(1), default=5, help="the tutorial's (default: 5)")
    parser.add_argument("--jit", choices=devices.JIT, default="off", help="of the suite's step (default: off)")
    parser.add_argument("--mixed-precision", action="store_true", help="for the suite's step")
    args = parser.parse_args(argv)

    settings = train.TrainConfig(jit=args.jit, mixed_precision=args.mixed_precision)
    examples = make_examples(args.captions, args.annotations, args.pictures)
    words = Tokenizer.fit((text for example in examples for text in example.captions), args.vocabulary_size)
    config = model.ModelConfig(len(words), args.embedding_dim, args.units)
    with tempfile.TemporaryDirectory() as folder:
        cache = features.FeatureCache(folder, {"weights": "imagenet", "dtype": "float16"})
        noise = np.random.default_rng(0)
        for example in examples:
            cache.write(example.image, noise.random((features.LOCATIONS, features.CHANNELS)))
        captions = encode_captions(examples, words, cache, LONGEST)
        ours, theirs = model.build(config, mixed_precision=args.mixed_precision), Tutorial(config)
        static = devices.wants_jit(args.jit)
        signature = [make_pipeline(captions, [], cache).element_spec]
        runs = {
            "suite": (
                suite_step(ours, settings, signature),
                suite_batches(captions, cache, args.batch_size, static),
                args.steps,
            ),
            "tutorial": (
                tutorial_step(theirs),
                tutorial_pipeline(captions, cache, args.batch_size),
                args.tutorial_steps,
            ),
        }
        compiling = {name: 1 / rate_of(lambda run=run: take_steps(*run[:2], 1), 1) for name, run in runs.items()}
        say("first step, compilation included: " + ", ".join(f"{name} {s:.1f} s" for name, s in compiling.items()))
        ways = {
            name: lambda run=run: rate_of(lambda: take_steps(*run), run[-1] * args.batch_size)
            for name, run in runs.items()
        }
        median = median_rates(ways, args.rounds, "captions")
    tokens = float(captions.lengths.mean()) - 1
    used = flop_of_products(ours, 1, tokens) * median["suite"]
    result = {
        "captions": len(captions.lengths),
        "mean_tokens": round(tokens + 1, 2),
        "longest": int(captions.lengths.max()),
        "batch_size": args.batch_size,
        "captions_per_second": {name: round(value, 1) for name, value in median.items()},
        "ratio": round(median["suite"] / median["tutorial"], 2),
        "first_step_seconds": {name: round(value, 1) for name, value in compiling.items()},
        "share_of_matrix_product_rate": round(used / matrix_product_rate(), 3),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
