"""Trains a captioner by teacher forcing. Run the same command again, and it continues where it stopped.

    python train.py                                       # MS-COCO 2014, 30,000 captions, as the tutorial
    python train.py --num-captions all                    # all of its training pictures
    python train.py --annotations captions.csv --images photos/

A run folder, runs/<data set>/, holds all that captioning needs (config.json, vocabulary.json, checkpoints/)
and what the training saw (history.csv, loss.png, tensorboard/).
"""

from common import (
    InputError,
    add_quiet,
    add_setting,
    add_settings,
    atomic_write,
    exclusive,
    file_sha256,
    make_parser,
    progress_bar,
    run_command,
    say,
    write_json,
)  # before TensorFlow

import argparse
import contextlib
import dataclasses
import math
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import evaluate
import features
import tensorflow as tf

import data_utils
import devices
import inference
import model
from batches import Batch, Captions, encode_captions, for_devices, make_pipeline, order_batches
from checkpoints import Average, Checkpoints, Progress
from history import History
from losses import doubly_stochastic_penalty, hard_attention_terms, next_words, smoothing_penalty, word_losses
from tokenizer import Tokenizer


SHUFFLES = ("pictures", "captions")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """The training's settings, saved in a run's config.json.

    The defaults are the tutorial's, with clipping and early stopping.
    """

    epochs: int = 20
    batch_size: int = 64
    learning_rate: float = 1e-3  # of Adam
    learning_rate_decay: float = 1.0  # the learning rate is multiplied by this after every epoch
    clip_norm: float = 5.0  # the gradients' global norm is cut to this
    average_decay: float = 0.0  # of the moving average of the weights that captions; 0: the weights themselves
    label_smoothing: float = 0.0  # share of the target that is spread over all words
    doubly_stochastic: float = 0.0  # weight of the penalty for looking unevenly (Xu et al. 2015, section 4.2.1)
    reward: float = 0.1  # of hard attention: weights of REINFORCE's term and of the entropy, the authors' constants
    entropy: float = 0.002
    patience: int = 3  # epochs without a better score after which training stops; 0: never
    max_length: int = 50  # tokens; longer captions are cut
    validation_pictures: int = 1000  # at the most, of the val split
    save_minutes: float = 5.0  # between checkpoints inside an epoch
    seed: int = 0
    shuffle: str = "pictures"  # with all their captions, which is faster, or captions one by one
    mixed_precision: bool = False  # float16 where it does no harm, with the loss scaled
    jit: str = "auto"  # whether XLA compiles the training step
    strategy: str = "none"  # of tf.distribute: which devices share the work
    recipe: str = "tutorial"  # whose settings the options started from

    def __post_init__(self):
        least = {
            "epochs": 1,
            "batch_size": 1,
            "patience": 0,
            "max_length": 3,
            "validation_pictures": 1,
            "seed": 0,
            "save_minutes": 0,
            "learning_rate": 1e-12,
            "learning_rate_decay": 1e-12,
            "clip_norm": 1e-12,
            "average_decay": 0,
            "label_smoothing": 0,
            "doubly_stochastic": 0,
            "reward": 0,
            "entropy": 0,
        }
        for name, minimum in least.items():
            if not getattr(self, name) >= minimum:
                raise InputError(f"{name}: expected at least {minimum:g}, found {getattr(self, name)}")
        for name in ("average_decay", "label_smoothing"):
            if getattr(self, name) >= 1:
                raise InputError(f"{name}: expected less than 1, found {getattr(self, name)}")
        for name, choices in {"shuffle": SHUFFLES, "jit": devices.JIT, "strategy": devices.STRATEGIES}.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}: expected {', '.join(choices)}, found {getattr(self, name)}")
        if self.seed >= 2**32:
            raise InputError(f"seed: expected less than {2**32}, found {self.seed}")
        if self.learning_rate_decay > 1:
            raise InputError(f"learning_rate_decay: expected at most 1, found {self.learning_rate_decay}")


# Settings that go together. The tutorial's are the defaults above.
RECIPES: dict[str, dict[str, Any]] = {
    "tutorial": {},
    "best": {
        "dropout": 0.3,
        "average_decay": 0.998,
        "label_smoothing": 0.1,
        "learning_rate_decay": 0.9,
        "shuffle": "captions",
    },
}

# What may differ when a run is continued; of the data, the fingerprint says whether they are the same.
MAY_CHANGE = {
    "recipe",
    "epochs",
    "patience",
    "save_minutes",
    "jit",
    "strategy",
    "folder",
    "annotations",
    "images",
    "data_dir",
}


# One step.


class Adam(tf.keras.optimizers.Adam):
    """Keras's Adam with its arithmetic in TensorFlow's one operation for it: one pass over the weights, not ten."""

    def update_step(self, gradient: tf.Tensor, variable: Any, learning_rate: tf.Tensor) -> None:
        """Updates one of the weights and its two moments."""
        index = self._get_variable_index(variable)
        steps = tf.cast(self.iterations + 1, variable.dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=self._momentums[index].handle,
            v=self._velocities[index].handle,
            beta1_power=self.beta_1**steps,
            beta2_power=self.beta_2**steps,
            lr=tf.cast(learning_rate, variable.dtype),
            beta1=self.beta_1,
            beta2=self.beta_2,
            epsilon=self.epsilon,
            grad=gradient,
        )

    def _clip_gradients(self, gradients: list[tf.Tensor]) -> list[tf.Tensor]:
        """As Keras's, without a square of every gradient in memory, nor a copy of those that need no cut."""
        norm = tf.linalg.global_norm(gradients)
        cut = lambda: tf.clip_by_global_norm(gradients, self.global_clipnorm, norm)[0]
        return tf.cond(norm <= self.global_clipnorm, lambda: gradients, cut)

    def _all_reduce_sum_gradients(self, grads_and_vars: list[tuple]) -> list[tuple]:
        """Keras would sum over devices here; the training step has, before the gradients' norm is cut."""
        return grads_and_vars


def make_optimizer(settings: TrainConfig) -> tf.keras.optimizers.Optimizer:
    """Adam, which in mixed precision scales the loss, so that small gradients are not lost in float16."""
    adam = Adam(settings.learning_rate, global_clipnorm=settings.clip_norm)
    return tf.keras.optimizers.LossScaleOptimizer(adam) if settings.mixed_precision else adam


def make_train_step(
    captioner: model.Captioner,
    optimizer: tf.keras.optimizers.Optimizer,
    average: Average,
    progress: Progress,
    settings: TrainConfig,
    strategy: tf.distribute.Strategy,
    signature: list[Any],
):
    """The training step: teacher forcing, the mean loss over the batch's real words, Adam.

    Args:
        captioner: the model.
        optimizer: of its weights.
        average: follows them.
        progress: counts, and sums the loss.
        settings: of the training.
        strategy: of tf.distribute, whose devices each get a part of the batch.
        signature: what `batches.for_devices` yields, so that the step is compiled once for all sizes.
    """
    variables = captioner.trainable_variables
    hard = captioner.config.attention == "hard"
    several = strategy.num_replicas_in_sync > 1
    jit = devices.wants_jit(settings.jit)

    def differentiate(batch: Batch) -> tuple[list[tf.Tensor], tf.Tensor]:
        """The gradient of the mean loss, and sums: loss, words, log p and number of the words with drawn locations."""
        with tf.GradientTape() as tape:
            taught = captioner(batch.pictures, batch.tokens, batch.picture, training=True, static=jit)
            targets = next_words(batch.tokens, taught)
            losses, real = word_losses(taught, targets)  # (N,)
            objective = loss = tf.reduce_sum(losses)
            words = tf.reduce_sum(real)
            if settings.label_smoothing:
                objective += settings.label_smoothing * smoothing_penalty(taught, targets, real)
            if settings.doubly_stochastic:
                objective += settings.doubly_stochastic * doubly_stochastic_penalty(taught, real, batch.tokens)
            if hard:
                locations, entropy = hard_attention_terms(taught, losses, real, progress.likelihood, batch.tokens)
                objective += settings.reward * locations - settings.entropy * entropy
            mean = objective / tf.maximum(words, 1)
            if settings.mixed_precision:
                mean = optimizer.scale_loss(mean)
        gradients = [tf.convert_to_tensor(gradient) for gradient in tape.gradient(mean, variables)]
        drawn = real * tf.cast(taught.sampled[:, 0], tf.float32)
        return gradients, tf.stack([loss, words, tf.reduce_sum(-losses * drawn), tf.reduce_sum(drawn)])

    if jit:
        differentiate = tf.function(differentiate, jit_compile=True)

    def step_on_device(batch: Batch) -> tf.Tensor:
        gradients, own = differentiate(batch)
        sums = own
        if several:
            context = tf.distribute.get_replica_context()
            sums = context.all_reduce(tf.distribute.ReduceOp.SUM, own)
            share = own[1] / sums[1]  # of the words of all devices, whose mean counts
            gradients = context.all_reduce(tf.distribute.ReduceOp.SUM, [share * gradient for gradient in gradients])
        optimizer.apply(gradients, variables)
        return sums

    @tf.function(input_signature=None if jit else signature)
    def train_step(batch: Batch) -> None:
        results = strategy.run(step_on_device, (batch,))
        loss, words, likelihood, drawn = tf.unstack(strategy.experimental_local_results(results)[0])
        average.update()
        if hard:  # after the gradient, since a baseline may not know its batch
            change = likelihood / tf.maximum(drawn, 1) - progress.likelihood
            # In a small batch there is no drawn location now and then.
            progress.likelihood.assign_add(tf.where(drawn > 0, 0.1 * change, 0.0))
        progress.loss.assign_add(tf.cast(loss, tf.float64))
        progress.words.assign_add(tf.cast(words, tf.float64))
        progress.step.assign_add(1)

    return train_step


# Epochs.


def train_epoch(
    train_step,
    captions: Captions,
    cache: features.FeatureCache,
    checkpoints: Checkpoints,
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
) -> None:
    """Trains through what is left of an epoch, saving now and then.

    Raises:
        InputError: the loss is not finite.
    """
    progress = checkpoints.progress
    epoch, done = progress.now("epoch"), progress.now("step")
    together = config.shuffle == "pictures"
    batches = order_batches(captions, config.batch_size, config.seed, epoch, strategy.num_replicas_in_sync, together)
    if done == len(batches):
        return
    bar = progress_bar(
        total=len(captions.lengths),
        initial=sum(map(len, batches[:done])),
        unit="caption",
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not devices.is_chief(strategy),
    )
    saved = shown = time.monotonic()
    data = for_devices(strategy, captions, batches[done:], cache, devices.wants_jit(config.jit))
    with bar:
        for batch, rows in zip(data, batches[done:], strict=True):
            train_step(batch)
            bar.update(len(rows))
            now = time.monotonic()
            if now - shown >= 1 or rows is batches[-1]:  # asking for the loss waits for the step, so not every time
                progress.seconds.assign_add(now - shown)
                shown = now
                loss = progress.now("loss") / progress.now("words")
                bar.set_postfix_str(f"loss {loss:.3f}", refresh=False)
                if not math.isfinite(loss):
                    raise InputError(
                        f"the loss is {loss} by step {progress.now('step')} of epoch {epoch + 1}; the last "
                        "checkpoint is from before it: run again with a smaller --learning-rate in another --run"
                    )
            if now - saved >= 60 * config.save_minutes:
                checkpoints.save()
                saved = time.monotonic()
    checkpoints.save()  # before validation, which then need not wait for the epoch again


class Validation:
    """Scores a model on held-out pictures after every epoch."""

    def __init__(
        self,
        captioner: model.Captioner,
        words: Tokenizer,
        cache: features.FeatureCache,
        examples: list[data_utils.Example],
        config: TrainConfig,
    ):
        self.captioner, self.words, self.cache, self.config = captioner, words, cache, config
        self.examples = examples[: config.validation_pictures]
        self.captions = encode_captions(self.examples, words, cache, config.max_length)

        @tf.function(input_signature=[make_pipeline(self.captions, [], cache).element_spec])
        def loss_of(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
            taught = captioner(batch.pictures, batch.tokens, batch.picture)
            losses, real = word_losses(taught, next_words(batch.tokens, taught))
            return tf.reduce_sum(losses), tf.reduce_sum(real)

        self._loss_of = loss_of

    def loss(self) -> float:
        """The mean loss per word of the held-out captions, in nats, with teacher forcing."""
        batches = order_batches(self.captions, self.config.batch_size, seed=0, epoch=0)
        sums = [self._loss_of(batch) for batch in make_pipeline(self.captions, batches, self.cache)]
        return float(sum(loss for loss, _ in sums) / sum(words for _, words in sums))

    def scores(self) -> tuple[dict[str, float], str]:
        """An epoch's scores, with free-running captions, and one caption to look at."""
        captions = evaluate.caption_examples(
            self.captioner, self.words, self.cache, self.examples, self.config.batch_size
        )
        texts = [caption.text for caption in captions]
        # Without Java, so that a run chooses the same epoch on every machine.
        found = evaluate.score([list(example.captions) for example in self.examples], texts, java=False)
        row = {
            "val_loss": round(self.loss(), 4),
            "bleu4": found["BLEU-4"],
            "cider": found["CIDEr"],
            "distinct": evaluate.distinct(texts),
        }
        return row, f"{self.examples[0].image}: {texts[0]}"


# A run.


def start_run(run: Path, config: dict[str, Any], words: Tokenizer, cache: features.FeatureCache) -> None:
    """Makes the run folder, or checks that it was made with these settings.

    Raises:
        InputError: the folder holds a run with other settings; both are named.
    """
    path, vocabulary = run / "config.json", run / "vocabulary.json"
    if path.exists():
        saved = inference.read_config(run)
        for section, settings in config.items():
            for key, value in settings.items():
                found = saved.get(section, {}).get(key)
                renamed = key == "weights" and "sha256" in settings  # a file is what it holds, not what it is called
                if found != value and key not in MAY_CHANGE and not renamed:
                    raise InputError(
                        f"{run} was trained with {section} {key} = {found}, expected {value}; give its settings to "
                        "continue it, or another --run to start anew"
                    )
        if not vocabulary.exists() or file_sha256(vocabulary) != saved["vocabulary_sha256"]:
            say(f"{vocabulary} is gone or damaged: made anew")
    words.save(vocabulary)
    own = Path(cache.weights)
    if own.is_file() and not features.own_weights(run):  # ImageNet's weights can be had anywhere, others only here
        # Keras tells two formats apart by these endings.
        name = "cnn.weights.h5" if own.name.endswith(".weights.h5") else "cnn.h5"
        with open(own, "rb") as source, atomic_write(run / name, "wb") as target:
            shutil.copyfileobj(source, target)
    write_json(path, config | {"vocabulary_sha256": file_sha256(vocabulary)})


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Lets Ctrl-C and SIGTERM wait for the end of the block, so that what belongs together is saved together."""
    waiting: list[int] = []
    before = {
        kind: signal.signal(kind, lambda kind, _: waiting.append(kind)) for kind in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
    if waiting:
        raise KeyboardInterrupt


def build_all(
    run: Path, config: dict[str, Any], strategy: tf.distribute.Strategy
) -> tuple[model.Captioner, tf.keras.optimizers.Optimizer, Average, Checkpoints]:
    """What is trained, on the strategy's devices, and restored from the last checkpoint if there is one."""
    settings = TrainConfig(**config["training"])
    tf.keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        captioner = model.build(model.ModelConfig(**config["model"]), mixed_precision=settings.mixed_precision)
        optimizer = make_optimizer(settings)
        optimizer.build(captioner.trainable_variables)  # before restoring: its slots must exist
        average = Average(captioner.trainable_variables, settings.average_decay)
        progress = Progress()
    checkpoints = Checkpoints(run, captioner, optimizer, average, progress, devices.is_chief(strategy))
    if checkpoints.restore():
        say(
            f"continuing {run} after {progress.now('epoch')} epochs and {progress.now('step')} batches, best so far: "
            f"CIDEr {progress.now('best_score'):.1f} in epoch {progress.now('best_epoch')}"
        )
    return captioner, optimizer, average, checkpoints


def conclude_epoch(validation: Validation, average: Average, checkpoints: Checkpoints, history: History) -> float:
    """Validates, keeps the best weights, and writes the epoch down; returns its CIDEr."""
    progress = checkpoints.progress
    with average.in_place():
        scores, sample = validation.scores()
        if scores["cider"] > progress.now("best_score"):
            checkpoints.save_best()
    row = {
        "epoch": progress.now("epoch") + 1,
        "train_loss": round(progress.now("loss") / progress.now("words"), 4),
        **scores,
        "train_seconds": round(progress.now("seconds"), 1),
    }
    history.add(row)
    say("  ".join(f"{name} {value}" for name, value in row.items()))
    say(f"  {sample}")
    return scores["cider"]


def train(
    run: Path,
    dataset: data_utils.Dataset,
    cache: features.FeatureCache,
    config: dict[str, Any],
    words: Tokenizer,
    strategy: tf.distribute.Strategy,
) -> None:
    """Trains a run to its end, from wherever it is."""
    settings, chief = TrainConfig(**config["training"]), devices.is_chief(strategy)
    captioner, optimizer, average, checkpoints = build_all(run, config, strategy)
    progress = checkpoints.progress
    history = History(run, progress.now("epoch")) if chief else None

    train_captions = encode_captions(dataset.split("train"), words, cache, settings.max_length)
    validation = Validation(captioner, words, cache, dataset.split("val"), settings)
    say(
        f"{run}: {len(train_captions.lengths):,} captions of {len(train_captions.paths):,} pictures, vocabulary "
        f"{len(words):,}, {captioner.count_params():,} weights; validation on {len(validation.examples):,} pictures; "
        f"{settings.epochs} epochs at the most"
    )
    signature = [for_devices(strategy, train_captions, [], cache).element_spec]
    train_step = make_train_step(captioner, optimizer, average, progress, settings, strategy, signature)
    try:
        while (epoch := progress.now("epoch")) < settings.epochs:
            if settings.patience and epoch - progress.now("best_epoch") >= settings.patience:
                say(f"stopped early: no better CIDEr for {settings.patience} epochs")
                break
            optimizer.learning_rate.assign(settings.learning_rate * settings.learning_rate_decay**epoch)
            train_epoch(train_step, train_captions, cache, checkpoints, settings, strategy)
            score = conclude_epoch(validation, average, checkpoints, history) if history else 0.0
            score = devices.from_chief(strategy, score)  # so that all stop at the same epoch
            with undisturbed():
                if score > progress.now("best_score"):
                    progress.best_score.assign(score)
                    progress.best_epoch.assign(epoch + 1)
                progress.epoch.assign(epoch + 1)
                progress.start_epoch()
                checkpoints.save()
    except KeyboardInterrupt:
        checkpoints.save()
        raise
    say(f"best: epoch {progress.now('best_epoch')}, CIDEr {progress.now('best_score'):.1f}; see {run / 'loss.png'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The command line of training; a recipe changes the defaults of its settings, also in --help."""
    recipe = argparse.ArgumentParser(add_help=False)
    best = ", ".join(f"{name} {value}" for name, value in RECIPES["best"].items())
    recipe.add_argument(
        "--recipe",
        choices=RECIPES,
        default="tutorial",
        help=f"settings to start from: the tutorial's, or those that scored best on Flickr8k, {best} "
        "(default: %(default)s)",
    )
    chosen = RECIPES[recipe.parse_known_args(argv)[0].recipe]
    parser = make_parser(__doc__, parents=[recipe])
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<name of the data set>)")
    data_utils.add_arguments(parser)
    features.add_arguments(parser)
    defaults = lambda kind: kind(**{f.name: chosen[f.name] for f in dataclasses.fields(kind) if f.name in chosen})
    model.add_arguments(parser, defaults(model.ModelConfig))
    group = parser.add_argument_group("training")
    training = defaults(TrainConfig)
    texts = {
        "epochs": "epochs at the most",
        "batch_size": "captions in a step",
        "learning_rate": "of Adam",
        "learning_rate_decay": "the learning rate is multiplied by this after every epoch",
        "clip_norm": "the global norm the gradients are cut to",
        "average_decay": "of the moving average of the weights that validates and captions, as 0.999; 0: no average",
        "label_smoothing": "share of the target that is spread over all words",
        "doubly_stochastic": "weight of the penalty for looking unevenly",
        "reward": "hard attention: weight of the term that teaches where to look",
        "entropy": "hard attention: weight of the entropy, which keeps it looking around",
        "patience": "epochs without a better CIDEr before stopping; 0: never stop early",
        "max_length": "tokens of a caption at the most; longer ones are cut",
        "validation_pictures": "pictures of the val split to validate with, at the most",
        "save_minutes": "minutes between checkpoints inside an epoch",
        "seed": "seed of the weights and of the order of the data",
    }
    add_settings(group, training, texts)
    text = "pictures, with all their captions in one batch, which is faster, or captions one by one"
    add_setting(group, "shuffle", training.shuffle, text, choices=SHUFFLES)
    group = parser.add_argument_group("speed")
    text = "compute in float16 where it does no harm, for GPUs; weights stay float32"
    group.add_argument("--mixed-precision", action="store_true", help=text)
    text = "compile the training step with XLA; auto: on a GPU where XLA works"
    add_setting(group, "jit", training.jit, text, choices=devices.JIT)
    text = "devices that share the work: one, all GPUs of this machine, or those of the machines in TF_CONFIG"
    add_setting(group, "strategy", training.strategy, text, choices=devices.STRATEGIES)
    add_quiet(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Prepares the data, the features and the vocabulary, and trains."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's "please stop" saves, as Ctrl-C does
    pick = lambda kind: {f.name: getattr(args, f.name) for f in dataclasses.fields(kind)}
    training, settings = TrainConfig(**pick(TrainConfig)), model.ModelConfig(**pick(model.ModelConfig))
    devices.say_if_idle()
    strategy = devices.make_strategy(training.strategy)
    options = data_utils.options_from(args)
    dataset = data_utils.load_dataset(options)
    everything = {example.image for example in dataset.examples}
    for split in ("train", "val"):
        dataset.split(split)  # an empty one is said before hours of features, not after
    cache, dataset = features.prepare(dataset, args)
    words = Tokenizer.fit((c for e in dataset.split("train") for c in e.captions), settings.vocabulary_size)
    config = {
        "model": dataclasses.asdict(dataclasses.replace(settings, vocabulary_size=len(words))),
        "training": dataclasses.asdict(training),
        "data": dataclasses.asdict(options)
        | {
            "unreadable": sorted(everything - {example.image for example in dataset.examples}),
            "fingerprint": dataset.fingerprint,
        },
        "features": cache.settings | {"folder": str(cache.folder)},
    }
    run = args.run or Path("runs") / dataset.name
    if not devices.is_chief(strategy):
        train(run, dataset, cache, config, words, strategy)
        return
    with exclusive(run):
        start_run(run, config, words, cache)
        train(run, dataset, cache, config, words, strategy)


if __name__ == "__main__":
    run_command(main)
