"""Trains the model by teacher forcing (tutorial section "Training"). Run again, it resumes where it stopped.

    python train.py                                # MS-COCO 2014, 30,000 captions, as the tutorial
    python train.py --num-captions all             # all of its training images
    python train.py --annotations captions.csv --images photos/
    python train.py --self-critical --run runs/coco    # then: trains on CIDEr, into runs/coco_cider
    python train.py --train-cnn 5 --run runs/coco      # or: trains the end of the CNN too, into runs/coco_cnn

A run folder, runs/<dataset>/, holds everything that captioning needs (config.json, vocabulary.json, checkpoints/)
and the record of the training (history.csv, loss.png, tensorboard/).
"""

import argparse
import dataclasses
import functools
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import data_utils
import evaluate
import features
import model
from beyond.cider import self_critical
from beyond.cider.rewards import CaptionReward, Reward
from beyond.finetune import cnn_training
from captioning.base import devices
from captioning.base.cli import add_quiet_option, defer_interrupts, log, make_parser, progress_bar, run_main
from captioning.base.files import lock_folder
from captioning.base.quiet_tensorflow import tf
from captioning.config.options import add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import RECIPES, DataConfig, FeatureConfig, ModelConfig, TrainConfig
from captioning.decoder import losses
from captioning.images.feature_cache import FeatureSource
from captioning.runs import run_folder
from captioning.runs.run_folder import fill_locations, init_run_dir
from captioning.scores.metrics import choose_tokenizer
from captioning.training.checkpoints import Checkpoints, TrainProgress
from captioning.training.input_pipeline import (
    Batch,
    EncodedCaptions,
    copy_ahead,
    describe_cut,
    encode_captions,
    make_distributed_dataset,
    make_epoch_batches,
)
from captioning.training.optimizer import WeightEMA, make_optimizer, slow_down
from captioning.training.training_log import TrainingLog
from captioning.training.validation import EpochScore, Validator, make_validator, score_start
from tokenizer import Tokenizer, split_words

KINDS = ("recipe", "self_critical", "train_cnn")  # of training, with defaults of their own
SPEED_SETTINGS = ("fused", "mixed_precision", "jit", "strategy")


class TrainState(NamedTuple):
    """What a training step changes."""

    model: model.CaptionModel
    optimizer: tf.keras.optimizers.Optimizer
    ema: WeightEMA
    progress: TrainProgress


# One step.


def compute_gradients(
    state: TrainState, batch: Batch, config: TrainConfig, reward: Reward | None = None
) -> tuple[list[tf.Tensor], losses.StepSums]:
    """Computes the gradients of the mean loss over the words of a batch, teacher forced.

    With a `reward` these words are samples of the model (beyond/cider/self_critical.py).
    """
    variables = state.model.trainable_variables
    if config.train_cnn:
        batch = cnn_training.augment_batch(batch, config.seed, state.optimizer.iterations)
    if reward:
        samples = self_critical.draw_samples(state.model, batch, config, reward, state.optimizer.iterations)
    with tf.GradientTape() as tape:
        if reward:
            mean_loss, sums = self_critical.self_critical_loss(state.model, batch, samples, config)
        else:
            outputs = state.model(batch.features, batch.tokens, batch.image_index, training=True, order=batch.order)
            baseline = state.progress.baseline if state.model.decoder.attention.hard else None
            mean_loss, sums = losses.mean_loss(outputs, batch.tokens, config, baseline)
        if config.mixed_precision:
            mean_loss = state.optimizer.scale_loss(mean_loss)
    gradients = tape.gradient(mean_loss, variables)
    for i, variable in enumerate(variables):  # V's bias cancels in the softmax: the fused decoder has no gradient of it
        gradients[i] = tf.zeros(variable.shape) if gradients[i] is None else tf.convert_to_tensor(gradients[i])
    return gradients, sums


def make_train_step(
    state: TrainState,
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    batch_spec: Any,
    reward: Reward | None = None,
) -> Callable[[Batch], None]:
    """Makes the tutorial's `train_step`, for one device or several.

    Args:
        state: what a step changes.
        config: the settings of the training.
        strategy: whose replicas get a part of every batch each.
        batch_spec: the shapes that `make_distributed_dataset` yields, so that the step is compiled once for all sizes.
        reward: that of self-critical training, otherwise None.
    """
    jit = config.jit == "on"
    gradients_of = functools.partial(compute_gradients, state, config=config, reward=reward)
    if jit:
        gradients_of = tf.function(gradients_of, jit_compile=True)

    def replica_step(batch: Batch) -> losses.StepSums:
        gradients, local_sums = gradients_of(batch)
        sums = local_sums
        if strategy.num_replicas_in_sync > 1:
            replica = tf.distribute.get_replica_context()
            sums = losses.StepSums(*replica.all_reduce(tf.distribute.ReduceOp.SUM, list(local_sums)))
            share = local_sums.num_tokens / sums.num_tokens  # so that the mean is that over all words
            gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [share * gradient for gradient in gradients])
        state.optimizer.apply(gradients, state.model.trainable_variables)
        return sums

    @tf.function(input_signature=None if jit else [batch_spec])
    def train_step(batch: Batch) -> None:
        steps_before = tf.identity(state.optimizer.iterations)
        sums = losses.StepSums(
            *(strategy.experimental_local_results(x)[0] for x in strategy.run(replica_step, (batch,)))
        )
        is_new = 1.0
        if config.mixed_precision:  # the optimizer skips a step whose gradients overflow, and then so does the rest
            is_new = tf.cast(state.optimizer.iterations > steps_before, tf.float32)
            sums = losses.StepSums(*(tf.where(is_new > 0, x, 0.0) for x in sums))
        state.ema.update(is_new)
        progress = state.progress
        if state.model.decoder.attention.hard:  # after the gradient, since a baseline must not depend on its samples
            progress.update_baseline(sums.sampled_log_prob, sums.num_sampled)
        progress.loss_sum.assign_add(tf.cast(sums.loss, tf.float64))
        progress.token_count.assign_add(tf.cast(sums.num_tokens, tf.float64))
        progress.step.assign_add(1)

    return train_step


# Epochs.


def train_epoch(
    train_step: Callable[[Batch], None],
    captions: EncodedCaptions,
    cache: FeatureSource,
    state: TrainState,
    checkpoints: Checkpoints,
    config: TrainConfig,
    strategy: tf.distribute.Strategy,
    on_step: Callable[[TrainState], None] | None = None,
) -> None:
    """Trains through the rest of an epoch, saving a checkpoint now and then.

    Raises:
        InputError: the loss or the weights are not finite; or the disk is full.
    """
    progress = state.progress
    epoch, done = progress.get("epoch"), progress.get("step")
    batches = make_epoch_batches(
        captions,
        config.batch_size,
        config.seed,
        epoch,
        min_last_batch=strategy.num_replicas_in_sync,
        group_by_image=config.shuffle_by == "image",
    )
    if done == len(batches):
        return
    dataset = make_distributed_dataset(strategy, captions, batches[done:], cache.read, static_shapes=config.jit == "on")
    bar = progress_bar(
        total=len(captions.lengths),
        initial=sum(map(len, batches[:done])),
        unit="caption",
        desc=f"epoch {epoch + 1}/{config.epochs}",
        disable=not devices.is_chief(strategy),
    )
    saved = shown = time.monotonic()
    with bar:
        for batch, rows in zip(copy_ahead(dataset, strategy), batches[done:], strict=True):
            train_step(batch)
            bar.update(len(rows))
            now = time.monotonic()
            if now - shown >= 1 or rows is batches[-1]:  # reading the loss waits for the step, so not every time
                progress.seconds.assign_add(now - shown)
                shown = now
                name, value = progress.result(config.self_critical)
                bar.set_postfix_str(f"{name.removeprefix('train_')} {value:.3f}", refresh=False)
                checkpoints.check_loss()
            if now - saved >= 60 * config.checkpoint_minutes:
                checkpoints.save()
                saved = time.monotonic()
            if on_step:
                on_step(state)
    checkpoints.save()  # before validation, so that an epoch is not lost with it


def validate_and_log(
    validator: Validator, state: TrainState, checkpoints: Checkpoints, training_log: TrainingLog, config: TrainConfig
) -> EpochScore:
    """Validates an epoch, saves the weights if it is the best so far, and writes it down; returns its score."""
    progress = state.progress
    epoch, best_epoch, best_score = progress.get("epoch") + 1, progress.get("best_epoch"), progress.best()
    with state.ema.applied():
        validation = validator.evaluate()
        if validation.score > best_score:
            best_score, best_epoch = validation.score, epoch
            checkpoints.save_best()
    name, value = progress.result(config.self_critical)
    seconds = round(progress.get("seconds"), 1)
    row = {"epoch": epoch, name: value, **validation.row, "train_seconds": seconds}
    training_log.add(row, best_epoch, best_score.column)
    log("  ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    log(f"  {validation.sample or '(no words)'}")
    return validation.score


# A run.


def build_train_state(
    run: Path, config: RunConfig, strategy: tf.distribute.Strategy, start: Path | None = None, cnn: Any = None
) -> tuple[TrainState, Checkpoints]:
    """Builds what is trained on the devices of a strategy, and restores the last checkpoint if there is one.

    If there is none, it begins from the best weights of another run, `start`, if given. A `cnn` is trained with it.
    """
    settings = config.train
    tf.keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        caption_model = model.build(config.model, config.cnn.features_shape, settings.mixed_precision)
        if start:
            run_folder.restore_weights(run_folder.best_checkpoint(start), caption_model)
        caption_model.cnn = cnn
        optimizer = make_optimizer(settings.learning_rate, settings.clip_norm, settings.mixed_precision)
        optimizer.build(caption_model.trainable_variables)  # before restoring: its slots must exist
        if cnn:
            slow_down(optimizer, cnn.trainable_variables, settings.cnn_learning_rate / settings.learning_rate)
        ema = WeightEMA(caption_model.trainable_variables, settings.ema_decay)
        progress = TrainProgress()
    # XLA needs shapes that are known, which only the plain loop has.
    if settings.fused and config.model.can_be_fused and settings.jit == "off":
        caption_model.decoder.fused = model.fused_decoder_matches(config.model)
        if not caption_model.decoder.fused:
            name = type(caption_model.decoder).__name__
            log(f"fused_decoder.py differs from {name}.step in model.py: training with the plain loop")
    kind = cnn_training.CNNCheckpoints if cnn else Checkpoints
    checkpoints = kind(run, caption_model, optimizer, ema, progress, devices.is_chief(strategy))
    if checkpoints.restore():
        done = f"{progress.get('epoch')} epochs and {progress.get('step')} batches"
        log(f"resuming {run} after {done}; best so far: epoch {progress.get('best_epoch')}")
    devices.separate_random_states(caption_model, strategy)
    return TrainState(caption_model, optimizer, ema, progress), checkpoints


def train(
    run: Path,
    dataset: data_utils.CaptionDataset,
    cache: FeatureSource,
    config: RunConfig,
    tokenizer: Tokenizer,
    strategy: tf.distribute.Strategy,
    on_step: Callable[[TrainState], None] | None = None,
    start: Path | None = None,
) -> None:
    """Trains a run to its end, from wherever it stopped, or from the best weights of another run, `start`.

    `on_step` is called after every step.
    """
    settings = config.train
    state, checkpoints = build_train_state(run, config, strategy, start, cache.trained_cnn)
    progress = state.progress
    training_log = TrainingLog(run, progress.get("epoch")) if devices.is_chief(strategy) else None
    captions = encode_captions(dataset.split("train"), tokenizer.encode, cache.path, settings.max_length)
    if cut := describe_cut(captions):
        log(cut)
    _, split = choose_tokenizer(tokenizer.words, split_words)
    examples = dataset.split("val")
    validator = make_validator(state.model, examples, tokenizer, cache, settings, evaluate.generate_captions, split)
    log(
        f"{run}: {len(captions.lengths):,} captions of {len(captions.feature_paths):,} images, "
        f"{len(tokenizer):,} words, {state.model.count_params():,} weights; validation on "
        f"{len(validator.references):,} images; at most {settings.epochs} epochs"
    )
    validator.log_best_so_far(progress.best())
    if start and progress.best() == EpochScore():
        progress.best_score.assign(score_start(validator, checkpoints.save_best, strategy))
    reward = None
    if settings.self_critical:
        references = [map(tokenizer.encode, example.captions) for example in dataset.split("train")]
        reward = CaptionReward(references, settings.bleu_weight)
    batch_spec = make_distributed_dataset(strategy, captions, [], cache.read).element_spec
    train_step = make_train_step(state, settings, strategy, batch_spec, reward)
    try:
        while (epoch := progress.get("epoch")) < settings.epochs:
            if settings.patience and epoch - progress.get("best_epoch") >= settings.patience:
                log(f"stopped early: {settings.patience} epochs without a better score")
                break
            state.optimizer.learning_rate.assign(settings.learning_rate * settings.learning_rate_decay**epoch)
            train_epoch(train_step, captions, cache, state, checkpoints, settings, strategy, on_step)
            score = EpochScore()
            if training_log:
                score = validate_and_log(validator, state, checkpoints, training_log, settings)
            score = EpochScore(*devices.broadcast_from_chief(strategy, score))  # all machines stop at the same epoch
            with defer_interrupts():
                if score > progress.best():
                    progress.best_score.assign(score)
                    progress.best_epoch.assign(epoch + 1)
                progress.epoch.assign(epoch + 1)
                progress.reset_epoch()
                checkpoints.save()
    except KeyboardInterrupt:
        checkpoints.save()
        raise
    log(f"best: epoch {progress.get('best_epoch')}, {progress.best()}; see {run / 'loss.png'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a recipe changes the defaults of its settings, also in --help."""
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(recipe_parser, TrainConfig, only=KINDS)
    text = "run folder (default: runs/<name of the dataset>); with --self-critical or --train-cnn the run to start from"
    recipe_parser.add_argument("--run", type=Path, metavar="DIR", help=text)
    first, _ = recipe_parser.parse_known_args(argv)
    is_self_critical = first.self_critical or first.recipe == "best-cider"
    recipe = RECIPES["best-cider" if is_self_critical else first.recipe]
    recipe = cnn_training.CNN_RECIPE | recipe if first.train_cnn else recipe
    parser = make_parser(__doc__, parents=[recipe_parser])
    add_quiet_option(parser)
    data_utils.add_data_options(parser)
    add_options(parser.add_argument_group("features"), FeatureConfig)
    add_options(parser.add_argument_group("model"), ModelConfig, recipe)
    add_options(parser.add_argument_group("training"), TrainConfig, recipe, skip=(*KINDS, *SPEED_SETTINGS))
    add_options(parser.add_argument_group("speed and devices"), TrainConfig, recipe, only=SPEED_SETTINGS)
    if not (is_self_critical or first.train_cnn):
        return parser.parse_args(argv)
    if is_self_critical and first.recipe == "best":
        parser.error("--recipe best: not for --self-critical, whose recipe is best-cider")
    if not first.run:
        parser.error("--self-critical and --train-cnn: expected --run DIR, the run to start from")
    settings_of = cnn_training.settings_to_train_cnn if first.train_cnn else run_folder.settings_to_continue
    parser.set_defaults(**(settings_of(first.run) | recipe))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, on_step: Callable[[TrainState], None] | None = None) -> None:
    """Prepares data, features and vocabulary, and trains; calls `on_step` after every step."""
    args = parse(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a cluster's request to stop saves, as Ctrl-C does
    train_config, model_config = TrainConfig.from_args(args), ModelConfig.from_args(args)
    devices.check_gpus()
    strategy = devices.make_strategy(train_config.strategy)
    devices.check_batch_size(train_config.batch_size, strategy)
    if train_config.jit == "on":
        devices.check_xla()
    data_config, feature_config = fill_locations(args.run, DataConfig.from_args(args), FeatureConfig.from_args(args))
    dataset = data_utils.load_dataset(data_config)
    all_images = {example.image_path for example in dataset.examples}
    for split in ("train", "val"):
        dataset.split(split)  # an empty split is an error before hours of features, not after
    run = args.run or Path("runs") / dataset.name
    run_folder.check_run_cnn(run, feature_config.sized_cnn)
    start, run = run if train_config.suffix else None, run.with_name(run.name + train_config.suffix)
    if start and (block := train_config.train_cnn):
        functions = features.load_image, features.build_feature_extractor
        cache, dataset = cnn_training.open_images(run, start, dataset, feature_config, block, *functions)
    else:
        cache, dataset = features.extract_features(dataset, feature_config)
    train_captions = (text for example in dataset.split("train") for text in example.captions)
    tokenizer = Tokenizer.fit(train_captions, model_config.vocab_size, data_config.words)
    config = RunConfig(
        model=dataclasses.replace(model_config, vocab_size=len(tokenizer)),
        train=train_config,
        data=data_config,
        features=cache.manifest | {"folder": str(cache.folder)},
        unreadable_images=tuple(sorted(all_images - {example.image_path for example in dataset.examples})),
        data_fingerprint=dataset.fingerprint,
        vocabulary_sha256="",  # known once the vocabulary is saved
    )
    if start:
        run_folder.check_start(start, config)
    if not devices.is_chief(strategy):
        train(run, dataset, cache, config, tokenizer, strategy, on_step, start)
        return
    with lock_folder(run), cnn_training.explain_failure(cache):
        init_run_dir(run, config, tokenizer.save, cache.cnn_weights)
        train(run, dataset, cache, config, tokenizer, strategy, on_step, start)


if __name__ == "__main__":
    run_main(main)
