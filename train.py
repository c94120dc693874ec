"""Trains the model by teacher forcing (tutorial section "Training"). Run again, it resumes where it stopped.

    python train.py                                # MS-COCO 2014, 30,000 captions, as the tutorial
    python train.py --num-captions all             # all of its training images
    python train.py --annotations captions.csv --images photos/
    python train.py --dry-run                      # only prints what it would download, and the time and disk it takes
    python train.py --recipe best                  # the settings that scored best on Flickr8k
    python train.py --annotations captions.csv --start runs/coco   # from the weights of another run

A run folder, runs/<dataset>/, holds everything that captioning needs (config.json, vocabulary.json, checkpoints/)
and the record of the training (history.csv, loss.png, tensorboard/).
"""

import argparse
import contextlib
import dataclasses
import functools
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import data_utils
import features
import model
from captioning.base import devices
from captioning.base.cli import (
    FirstRate,
    InputError,
    add_quiet_option,
    defer_interrupts,
    end_signals,
    first_line,
    log,
    make_parser,
    progress_bar,
    run_main,
)
from captioning.base.downloads import redact_url
from captioning.base.files import lock_folder
from captioning.base.quiet_tensorflow import tf
from captioning.config.guests import find_model_guest
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import RECIPES, DataConfig, FeatureConfig, ModelConfig, TrainConfig
from captioning.data.datasets import find_source
from captioning.images.feature_cache import explain_failure
from captioning.runs.run_folder import (
    check_resumed,
    fill_locations,
    find_config,
    init_run_dir,
    open_run,
)
from captioning.training import plan
from captioning.training.checkpoints import Checkpoints, TrainProgress, TrainState
from captioning.training.compiling import TrainSteps, plain_loop
from captioning.training.input_pipeline import (
    Batch,
    TrainBatches,
    TrainData,
    describe_captions,
    describe_cut,
    encode_captions,
)
from captioning.training.objective import CrossEntropy, StepSums
from captioning.training.optimizer import WeightEMA, make_optimizer
from captioning.training.start import check_start, copy_weights, keep_words, start_settings
from captioning.training.training_log import TrainingLog
from captioning.training.validation import EpochScore, Validator
from tokenizer import Tokenizer

# Those change the speed, not what is learnt.
SPEED_SETTINGS = ("fused", "mixed_precision", "jit", "features_on_gpu", "deterministic", "strategy")

OnStep = Callable[[TrainState], None]  # is called after every step


# One step.


def compute_gradients(state: TrainState, batch: Batch) -> tuple[list[tf.Tensor], StepSums]:
    """Computes the gradients of the objective, by default the mean loss over the words of a batch, teacher forced.

    Returns:
        The gradients of the model's trainable variables, and the sums that are reported.
    """
    objective, variables = state.objective, state.model.trainable_variables
    # Teacher forcing needs nothing beforehand. Other objectives sample captions here, outside the tape.
    prepared = objective.prepare(state.model, batch, state.optimizer.iterations)
    with tf.GradientTape() as tape:
        # The model is given the true words of the captions, and is asked for the word after each of them.
        loss, sums = objective.loss(state.model, prepared)
        # Small gradients would be lost in float16. In float32 Keras returns the loss as it is.
        scaled_loss = state.optimizer.scale_loss(loss)
    gradients = [
        # The bias of V has no gradient in the fused decoder: it cancels in the softmax.
        tf.zeros(variable.shape) if gradient is None else tf.convert_to_tensor(gradient)
        for gradient, variable in zip(tape.gradient(scaled_loss, variables), variables, strict=True)
    ]
    return gradients, sums


def make_train_step(
    state: TrainState,
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    batch_spec: Any,
    image_features: tf.Variable | None = None,
) -> Callable[[Batch], None]:
    """Makes the tutorial's `train_step`, for one device or several.

    Args:
        state: what a step changes.
        config: the settings of the training.
        strategy: distributes each batch over its replicas.
        batch_spec: the shapes that `TrainBatches` yields, so that the step is compiled once for all sizes.
        image_features: (images, L, C), the features of all images, if the batches bring none.
    """
    with_xla = config.jit == "on"
    compiles_all = with_xla and devices.is_single(strategy)  # XLA cannot compile what replicas exchange

    def gradients_of(batch: Batch) -> tuple[list[tf.Tensor], StepSums]:
        with plain_loop(state.model) if with_xla else contextlib.nullcontext():
            return compute_gradients(state, batch)

    if with_xla and not compiles_all:
        gradients_of = tf.function(gradients_of, jit_compile=True)

    def replica_step(batch: Batch) -> StepSums:
        if image_features is not None:
            batch = batch._replace(features=tf.gather(image_features, tf.cast(batch.images, tf.int64)))
        gradients, sums = gradients_of(batch)
        # With one device nothing happens here. With several, each has a part of the batch.
        gradients, sums = devices.sum_over_replicas(gradients, sums)
        # Adam clips the gradients by their global norm: one bad batch cannot spoil a run.
        state.optimizer.apply(gradients, state.model.trainable_variables)
        return sums

    # A graph, built at the first call: in eager mode each operation of each word would go through Python. One signature
    # for batches of all sizes, or a graph would be built for each; XLA compiles it anew for every shape in any case.
    @tf.function(input_signature=[batch_spec], jit_compile=compiles_all or None)
    def train_step(batch: Batch) -> None:
        steps_before = tf.identity(state.optimizer.iterations)
        sums = strategy.run(replica_step, (batch,))
        sums = tf.nest.map_structure(lambda x: strategy.experimental_local_results(x)[0], sums)
        # In float16 the optimizer skips a step whose gradients overflow. Then so does all else.
        is_applied = state.optimizer.iterations > steps_before
        sums = tf.nest.map_structure(lambda x: tf.where(is_applied, x, 0.0), sums)
        state.ema.update(tf.cast(is_applied, tf.float32))
        state.objective.update(sums)
        state.progress.add(sums)  # the loss of the epoch so far, which the progress bar and history.csv show

    if compiles_all:
        devices.number_functions_anew()
        train_step.get_concrete_function()  # named here and now
    return train_step


# Epochs.


def train_epoch(
    train_step: Callable[[Batch], None],
    batches: TrainBatches,
    state: TrainState,
    checkpoints: Checkpoints,
    config: TrainConfig,
    on_step: OnStep | None = None,
) -> None:
    """Trains through the rest of an epoch, saving a checkpoint now and then.

    Raises:
        InputError: the loss or the weights are not finite; or the disk is full.
    """
    progress = state.progress
    epoch, done = progress.get("epoch"), progress.get("step")  # a resumed run begins within an epoch
    # Seed and epoch decide the order of the batches, so that a resumed run continues with the right one.
    order = batches.order(epoch)
    if done == len(order):
        return
    bar = progress_bar(
        total=sum(map(len, order)),
        initial=sum(map(len, order[:done])),
        unit="caption",
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not checkpoints.is_writer,
    )
    rate = FirstRate()
    # XLA compiles a step of each length, and the batches are shuffled: by then all have come.
    first_timed = done + (10 * len(batches.shapes.lengths) if batches.shapes else 0)
    saved = shown = time.monotonic()
    with bar:
        for number, (batch, rows) in enumerate(zip(batches.load(order[done:]), order[done:], strict=True), done):
            train_step(batch)
            bar.update(len(rows))
            now = time.monotonic()
            if now - shown >= 1 or rows is order[-1]:  # reading the loss waits for the step, so not every time
                progress.seconds.assign_add(now - shown)
                shown = now
                name = state.objective.column.removeprefix("train_")
                bar.set_postfix_str(f"{name} {state.objective.result(progress.mean_loss()):.3f}", refresh=False)
                checkpoints.check_loss()
                if number >= first_timed:
                    plan.announce_duration(progress, rate.measure(bar.n), bar.total, config.epochs)
            # Epochs of COCO take hours: a run that is killed within one loses a few minutes.
            if now - saved >= 60 * config.checkpoint_minutes:
                checkpoints.save()
                saved = time.monotonic()
            if on_step:
                on_step(state)
    checkpoints.save()  # before the validation, so that an epoch is not lost with it


def validate_and_log(
    validator: Validator, state: TrainState, checkpoints: Checkpoints, training_log: TrainingLog
) -> EpochScore:
    """Validates an epoch, saves the weights if they are the best so far, and logs the epoch; returns its score."""
    progress = state.progress
    epoch, best_epoch, best_score = progress.get("epoch") + 1, progress.get("best_epoch"), progress.best()
    with state.ema.applied():  # the averaged weights are validated and saved as the best
        # The captions that the model generates are scored: CIDEr tells more than the loss which epoch is the best.
        validation = validator.evaluate()
        if validation.score > best_score:
            best_score, best_epoch = validation.score, epoch
            checkpoints.save_best()
    result = state.objective.result(progress.mean_loss())
    seconds = round(progress.get("seconds"), 1)
    row = {"epoch": epoch, state.objective.column: result, **validation.row, "train_seconds": seconds}
    training_log.add(row, best_epoch, best_score.column)
    log("  ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    log(f"  {validation.sample or '(no words)'}")
    if (loss := validation.row["val_loss"]) > (of_guessing := math.log(state.model.config.vocab_size)):
        log(
            f"  the validation loss {loss:.2f} is above {of_guessing:.2f}, that of guessing all words alike: the "
            "learning rate may be too large, or the training images too few"
        )
    return validation.score


# A run.


def make_train_state(caption_model: model.CaptionModel, objective: CrossEntropy, config: TrainConfig) -> TrainState:
    """Makes the rest of what is trained: the optimizer, the average of the weights, and the counters."""
    optimizer = make_optimizer(config.learning_rate, config.clip_norm, config.mixed_precision)  # Adam, as the tutorial
    optimizer.build(caption_model.trainable_variables)  # before a checkpoint is restored: its slots must exist
    ema = WeightEMA(caption_model.trainable_variables, config.ema_decay)
    return TrainState(caption_model, optimizer, ema, TrainProgress(), objective)


def choose_decoder_loop(caption_model: model.CaptionModel, config: TrainConfig) -> None:
    """Chooses the fused decoder, which is faster on a CPU, if it computes what the decoder's `step` does."""
    if not (config.fused and caption_model.config.can_be_fused):
        return
    caption_model.decoder.fused = model.fused_decoder_matches(caption_model.config)
    if not caption_model.decoder.fused:
        name = type(caption_model.decoder).__name__
        log(f"fused_decoder.py differs from {name}.step in model.py: training with the plain loop")


def make_objective(config: RunConfig) -> CrossEntropy:
    """Makes what is minimised: cross-entropy, unless the decoder or the attention brings more."""
    guest = find_model_guest(config.model.decoder, config.model.attention)
    return guest.make_objective(config) if guest else CrossEntropy(config.train)


def build_train_state(
    run: Path,
    config: RunConfig,
    strategy: tf.distribute.Strategy,
    objective: Callable[[RunConfig], CrossEntropy] = make_objective,
    start: Callable[[model.CaptionModel], None] | None = None,
) -> tuple[TrainState, Checkpoints]:
    """Builds what is trained, on the devices of a strategy, and opens the run's checkpoints.

    Args:
        run: the run folder.
        config: the settings of the run.
        strategy: distributes each batch over its replicas.
        objective: makes what is minimised.
        start: sets the weights that the model begins with, where they are those of another run.
    """
    tf.keras.utils.set_random_seed(config.train.seed)  # before the model is built, which draws the first weights
    with strategy.scope():
        caption_model = model.build(config.model, config.cnn.features_shape, config.train.mixed_precision)
        if start:
            start(caption_model)
        state = make_train_state(caption_model, objective(config), config.train)
        state.objective.starts_trained = start is not None
    choose_decoder_loop(caption_model, config.train)  # not in the scope: it tries a small model, on one device
    return state, Checkpoints(run, state, devices.is_chief(strategy))


def train(
    run: Path,
    data: TrainData,
    config: RunConfig,
    strategy: tf.distribute.Strategy,
    build: Callable[..., tuple[TrainState, Checkpoints]] = build_train_state,
    on_step: OnStep | None = None,
) -> None:
    """Trains a run to its end, from wherever it stopped.

    Args:
        run: the run folder.
        data: the dataset with its features, and the tokenizer.
        config: the settings of the run.
        strategy: distributes each batch over its replicas.
        build: builds what is trained; takes `run`, `config` and `strategy`.
        on_step: is called after every step.
    """
    settings = config.train
    # The model and the optimizer, from the last checkpoint if there is one (the tutorial's ckpt_manager).
    state, checkpoints = build(run, config, strategy)
    progress = state.progress
    if checkpoints.restore():
        log(f"resuming {run} after {progress.describe()}")
    devices.separate_random_states(state.model, strategy)  # after restoring, which would undo it
    training_log = TrainingLog(run, progress.get("epoch")) if checkpoints.is_writer else None

    # The captions as arrays of token ids; their images' features stay on the disk.
    captions = encode_captions(data.dataset.split("train"), data.tokenizer.encode, data.cache.path, settings.max_length)
    if cut := describe_cut(captions):
        log(cut)
    validator = Validator(state.model, data, settings, state.objective.own_cider)
    log(
        f"{run}: {describe_captions(captions, len(data.tokenizer))}, {state.model.count_params():,} weights; "
        f"validation on {len(validator.references):,} images; at most {settings.epochs} epochs"
    )
    validator.log_best_so_far(progress.best())
    # Weights of another run, or those of a resumed one whose best weights were lost.
    if progress.best() == EpochScore() and (state.objective.starts_trained or progress.get("epoch")):
        score_start(validator, state, checkpoints, strategy)
    # The loop over epochs. The learning rate follows from the epoch's number, so that a resumed run has the same one.
    steps = TrainSteps(state, captions, data, settings, strategy, make_train_step)
    try:
        while (epoch := progress.get("epoch")) < settings.epochs:
            if settings.patience and epoch - progress.get("best_epoch") >= settings.patience:
                log(f"stopped early: {settings.patience} epochs without a better score")
                break  # from here on the model would only learn the training captions by heart
            state.optimizer.learning_rate.assign(settings.learning_rate * settings.learning_rate_decay**epoch)
            steps.run(train_epoch, checkpoints, on_step)
            score = validate_and_log(validator, state, checkpoints, training_log) if training_log else EpochScore()
            score = EpochScore(*devices.broadcast_from_chief(strategy, score))  # all machines stop at the same epoch
            with defer_interrupts():  # Ctrl-C waits until all of it is saved
                finish_epoch(progress, score, checkpoints)
    except KeyboardInterrupt:  # also of the other signals, of which a second one waits
        with defer_interrupts():
            checkpoints.save()
        raise
    log(f"best: epoch {progress.get('best_epoch')}, {progress.best()}; see {run / 'loss.png'}")
    if training_log:
        validator.log_baselines(training_log.find_row(progress.get("best_epoch")))


def score_start(
    validator: Validator, state: TrainState, checkpoints: Checkpoints, strategy: tf.distribute.Strategy
) -> None:
    """Scores the weights before the first step. They are saved as the best, until an epoch is better."""
    score = EpochScore()
    if checkpoints.is_writer:
        with state.ema.applied():
            score = validator.evaluate().score
            checkpoints.save_best()
        log(f"score of the initial weights: {score}")
    state.progress.best_score.assign(devices.broadcast_from_chief(strategy, score))
    state.progress.best_epoch.assign(state.progress.epoch)


def finish_epoch(progress: TrainProgress, score: EpochScore, checkpoints: Checkpoints) -> None:
    """Counts an epoch, with its score, and saves that."""
    epoch = progress.get("epoch") + 1
    if score > progress.best():
        progress.best_score.assign(score)
        progress.best_epoch.assign(epoch)
    progress.epoch.assign(epoch)
    progress.reset_epoch()
    checkpoints.save()


# The command.


def add_train_options(parser: argparse.ArgumentParser, defaults: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Adds the options of every script that trains, with other defaults by the name of the setting."""
    add_quiet_option(parser)
    data_utils.add_data_options(parser, **defaults)
    group = parser.add_argument_group("features", "python features.py --help lists more, which work here, too")
    add_options(group, FeatureConfig, defaults, unlisted=("cnn_batch_size", "max_megapixels"))
    add_options(parser.add_argument_group("model"), ModelConfig, defaults)
    add_options(parser.add_argument_group("training"), TrainConfig, defaults, skip=SPEED_SETTINGS)
    add_options(parser.add_argument_group("speed and devices"), TrainConfig, defaults, only=SPEED_SETTINGS)


def find_defaults(argv: list[str] | None) -> tuple[dict[str, Any], Path | None]:
    """Returns the defaults that a command line changes by its recipe and by the run that it starts from, and this run.

    Raises:
        InputError: the run cannot be opened, or would be downloaded or unpacked for --dry-run.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(parser, TrainConfig, only=("recipe",))
    parser.add_argument("--start")
    parser.add_argument("--dry-run", action="store_true")
    args, _ = parser.parse_known_args(argv)
    if args.dry_run and args.start and not Path(args.start).is_dir():
        raise InputError(f"--dry-run unpacks nothing: expected a run folder as --start, found {redact_url(args.start)}")
    start = open_run(args.start) if args.start else None
    return RECIPES[args.recipe] | (start_settings(start) if start else {}), start


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a recipe and --start change the defaults of their settings, also in --help."""
    parser = make_parser(__doc__)
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<name of the dataset>)")
    text = "begin with the weights of another run, whose CNN and sizes of the model are taken over"
    parser.add_argument("--start", metavar="DIR|ZIP|URL", help=text)
    text = "with --start: keep the words of that run beside those of the new captions"
    parser.add_argument("--keep-words", action="store_true", help=text)
    text = "only print what would be downloaded, and how much time and disk it takes"
    parser.add_argument("--dry-run", action="store_true", help=text)
    # These are read before all else: they change defaults, which options that are given then override.
    defaults, start = find_defaults(argv)
    add_train_options(parser, defaults)
    args = parser.parse_args(argv)
    args.start = start
    if args.keep_words and not args.start:
        raise InputError("--keep-words is for --start, which names the run with these words")
    args.run = args.run or default_run(args)
    return args


def start_devices(config: TrainConfig) -> tf.distribute.Strategy:
    """Chooses the devices that train; SIGTERM of a cluster and SIGHUP of a closed terminal save as Ctrl-C does.

    Raises:
        InputError: the devices cannot be used as the settings ask.
    """
    for number in end_signals():
        signal.signal(number, signal.default_int_handler)
    if config.deterministic:
        tf.config.experimental.enable_op_determinism()
    devices.check_gpus()
    strategy = devices.make_strategy(config.strategy)
    devices.check_batch_size(config.batch_size, strategy)
    if config.jit == "on":
        devices.check_xla()
    return strategy


def check_settings(args: argparse.Namespace) -> None:
    """Raises InputError if the run folder holds a run with other settings than those of the command line."""
    settings = ModelConfig.from_args(args), TrainConfig.from_args(args), DataConfig.from_args(args)
    check_resumed(args.run, *settings, FeatureConfig.from_args(args).sized_cnn)


def prepare(
    args: argparse.Namespace,
    open_features: Callable[..., Any] = features.extract_features,
    with_images: bool = True,
) -> tuple[TrainData, RunConfig]:
    """Prepares the data, their features and the vocabulary, as the tutorial does before it trains.

    Args:
        args: the command line.
        open_features: returns the features of a dataset, and the dataset without the images that cannot be read.
        with_images: whether the images are needed, see `data_utils.load_dataset`.

    Raises:
        InputError: something of it is missing or wrong.
    """
    run: Path = args.run
    if run.is_file():
        raise InputError(f"--run {run}: expected a run folder, or a new one, found a file")
    saved = find_config(run)
    train_config, model_config = TrainConfig.from_args(args), ModelConfig.from_args(args)
    # 1. The images and captions, downloaded if necessary, and split into train, val and test.
    data_config, feature_config = fill_locations(run, DataConfig.from_args(args), FeatureConfig.from_args(args))
    dataset = data_utils.load_dataset(data_config, with_images)
    # Copies of an image belong into one split. A run that is resumed keeps the splits it has, and its images.
    moved_copies = saved.moved_copies if saved else data_utils.find_moved_copies(dataset)
    dataset = dataset.move(moved_copies)
    all_images = {example.image_path for example in dataset.examples}
    if saved and saved.unreadable_images:
        log(f"{run}: {len(saved.unreadable_images):,} images that could not be read at its beginning stay left out")
        dataset = dataset.exclude(set(saved.unreadable_images))
    for split in ("train", "val"):
        dataset.split(split)  # an empty split is an error before hours of features, not after
    # 2. The CNN's features of every image, computed if they are not cached.
    cache, dataset = open_features(dataset, feature_config)
    # 3. The vocabulary. Words that only validation captions have stay unknown, as in use.
    train_captions = (caption for example in dataset.split("train") for caption in example.captions)
    tokenizer = Tokenizer.fit(train_captions, model_config.vocab_size, data_config.words)
    # 4. All settings, which the run folder keeps beside the weights.
    config = RunConfig(
        model=dataclasses.replace(model_config, vocab_size=len(tokenizer)),  # a small dataset has fewer words
        train=train_config,
        data=data_config,
        objective={},
        features=cache.manifest | {"folder": str(cache.folder)},
        unreadable_images=tuple(sorted(all_images - {example.image_path for example in dataset.examples})),
        data_fingerprint=dataset.fingerprint,
        vocabulary_sha256="",  # known once the vocabulary is saved
        moved_copies=moved_copies,
    )
    return TrainData(dataset, cache, tokenizer), config


def default_run(args: argparse.Namespace) -> Path:
    """Returns the run folder of the dataset that a command line names."""
    return Path("runs") / find_source(DataConfig.from_args(args), with_images=True).name


@contextlib.contextmanager
def open_run_folder(run: Path, data: TrainData, config: RunConfig, strategy: tf.distribute.Strategy) -> Iterator[None]:
    """Locks a run folder for this process while the block runs, and creates or checks what is in it.

    Of several machines, only the first one writes.

    Raises:
        InputError: another process has the folder, or it holds a run with other settings; or an operation of the block
            cannot be deterministic, if that is asked for.
    """
    with contextlib.ExitStack() as stack:
        if devices.is_chief(strategy):
            stack.enter_context(lock_folder(run))  # two trainings in one folder would overwrite their checkpoints
            init_run_dir(run, config, data.tokenizer.save, data.cache.cnn_weights)
        stack.enter_context(explain_failure(data.cache))
        try:
            yield
        except tf.errors.UnimplementedError as error:
            if not config.train.deterministic:
                raise
            raise InputError(f"--deterministic: not possible here ({first_line(error)}); train without it") from None


def main(argv: list[str] | None = None, on_step: OnStep | None = None) -> None:
    """Prepares data, features and vocabulary, and trains; calls `on_step` after every step."""
    args = parse(argv)
    strategy = start_devices(TrainConfig.from_args(args))
    if args.start:
        check_start(args.start, FeatureConfig.from_args(args), ModelConfig.from_args(args))
    check_settings(args)
    if args.dry_run:
        plan.print_plan(args, strategy)
        return
    data, config = prepare(args)
    build: Callable[..., tuple[TrainState, Checkpoints]] = build_train_state
    if args.start:
        if args.keep_words:
            data, config = keep_words(args.start, data, config)
        build = functools.partial(build, start=functools.partial(copy_weights, args.start, data.tokenizer))
    with open_run_folder(args.run, data, config, strategy):
        train(args.run, data, config, strategy, build, on_step)


if __name__ == "__main__":
    run_main(main)
