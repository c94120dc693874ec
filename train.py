"""Trains the model by teacher forcing. Run the same command again, and it resumes where it stopped.

Tutorial section: "Training".

    python train.py                                # MS-COCO 2014, 30,000 captions, as the tutorial
    python train.py --num-captions all             # all of its training images
    python train.py --annotations captions.csv --images photos/

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
from captioning import devices, losses
from captioning.annotations import Example
from captioning.checkpoints import Checkpoints, TrainProgress
from captioning.cli import add_quiet_option, defer_interrupts, log, make_parser, progress_bar, run_main
from captioning.config import RECIPES, DataConfig, DecodeConfig, FeatureConfig, ModelConfig, RunConfig, TrainConfig
from captioning.feature_cache import FeatureCache
from captioning.files import lock_folder
from captioning.input_pipeline import (
    Batch,
    EncodedCaptions,
    copy_ahead,
    describe_cut,
    encode_captions,
    make_distributed_dataset,
    make_epoch_batches,
)
from captioning.metrics import choose_tokenizer
from captioning.optimizer import WeightEMA, make_optimizer
from captioning.quiet_tensorflow import tf
from captioning.run_folder import fill_locations, init_run_dir
from captioning.settings import add_options
from captioning.training_log import TrainingLog
from captioning.validation import EpochScore, Validator
from tokenizer import Tokenizer, split_words

SPEED_SETTINGS = ("fused", "mixed_precision", "jit", "strategy")


class TrainState(NamedTuple):
    """What a training step changes."""

    model: model.CaptionModel
    optimizer: tf.keras.optimizers.Optimizer
    ema: WeightEMA
    progress: TrainProgress


class StepSums(NamedTuple):
    """Sums over a batch, float32 scalars."""

    loss: tf.Tensor  # the cross-entropy of all words, in nats
    num_tokens: tf.Tensor
    sampled_log_prob: tf.Tensor  # log p of the words whose location was sampled (hard attention)
    num_sampled: tf.Tensor


# One step.


def compute_gradients(state: TrainState, batch: Batch, config: TrainConfig) -> tuple[list[tf.Tensor], StepSums]:
    """Computes the gradients of the mean loss over the words of a batch, teacher forced."""
    variables = state.model.trainable_variables
    with tf.GradientTape() as tape:
        outputs = state.model(batch.features, batch.tokens, batch.image_index, training=True, order=batch.order)
        word_losses, mask = losses.masked_cross_entropy(outputs.logits, outputs.targets)  # (N,)
        sample_mask = mask * tf.cast(outputs.is_sampled[:, 0], tf.float32)  # (N,)
        sums = StepSums(
            loss=tf.reduce_sum(word_losses),
            num_tokens=tf.reduce_sum(mask),
            sampled_log_prob=tf.reduce_sum(-word_losses * sample_mask),
            num_sampled=tf.reduce_sum(sample_mask),
        )
        objective = sums.loss
        if config.label_smoothing:
            objective += config.label_smoothing * losses.label_smoothing_term(outputs.logits, outputs.targets, mask)
        if config.doubly_stochastic:
            objective += config.doubly_stochastic * losses.doubly_stochastic_term(
                outputs.attention_weights, mask, outputs.positions, batch.tokens
            )
        if state.model.decoder.attention.hard:
            weights, samples = outputs.attention_weights, outputs.location_weights
            place = state.progress.baseline, outputs.positions, batch.tokens
            reinforce_loss, entropy = losses.reinforce_terms(weights, samples, sample_mask, word_losses, mask, *place)
            objective += config.reinforce_weight * reinforce_loss - config.entropy_weight * entropy
        mean_loss = objective / tf.maximum(sums.num_tokens, 1)
        if config.mixed_precision:
            mean_loss = state.optimizer.scale_loss(mean_loss)
    gradients = tape.gradient(mean_loss, variables)
    for i, variable in enumerate(variables):  # V's bias cancels in the softmax: the fused decoder has no gradient of it
        gradients[i] = tf.zeros(variable.shape) if gradients[i] is None else tf.convert_to_tensor(gradients[i])
    return gradients, sums


def make_train_step(
    state: TrainState, config: TrainConfig, strategy: tf.distribute.Strategy, batch_spec: Any
) -> Callable[[Batch], None]:
    """Makes the tutorial's `train_step`, for one device or several.

    Args:
        state: what a step changes.
        config: the settings of the training.
        strategy: whose replicas get a part of every batch each.
        batch_spec: the shapes that `make_distributed_dataset` yields, so that the step is compiled once for all sizes.
    """
    jit = config.jit == "on"
    gradients_of = functools.partial(compute_gradients, state, config=config)
    if jit:
        gradients_of = tf.function(gradients_of, jit_compile=True)

    def replica_step(batch: Batch) -> StepSums:
        gradients, local_sums = gradients_of(batch)
        sums = local_sums
        if strategy.num_replicas_in_sync > 1:
            replica = tf.distribute.get_replica_context()
            sums = StepSums(*replica.all_reduce(tf.distribute.ReduceOp.SUM, list(local_sums)))
            share = local_sums.num_tokens / sums.num_tokens  # so that the mean is that over all words
            gradients = replica.all_reduce(tf.distribute.ReduceOp.SUM, [share * gradient for gradient in gradients])
        state.optimizer.apply(gradients, state.model.trainable_variables)
        return sums

    @tf.function(input_signature=None if jit else [batch_spec])
    def train_step(batch: Batch) -> None:
        steps_before = tf.identity(state.optimizer.iterations)
        sums = StepSums(*(strategy.experimental_local_results(x)[0] for x in strategy.run(replica_step, (batch,))))
        is_new = 1.0
        if config.mixed_precision:  # the optimizer skips a step whose gradients overflow, and then so does the rest
            is_new = tf.cast(state.optimizer.iterations > steps_before, tf.float32)
            sums = StepSums(*(tf.where(is_new > 0, x, 0.0) for x in sums))
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
    cache: FeatureCache,
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
                bar.set_postfix_str(f"loss {progress.mean_loss():.3f}", refresh=False)
                checkpoints.check_loss()
            if now - saved >= 60 * config.checkpoint_minutes:
                checkpoints.save()
                saved = time.monotonic()
            if on_step:
                on_step(state)
    checkpoints.save()  # before validation, so that an epoch is not lost with it


def make_validator(
    caption_model: model.CaptionModel,
    tokenizer: Tokenizer,
    cache: FeatureCache,
    examples: list[Example],
    config: TrainConfig,
) -> Validator:
    """Makes the validator of a run, for at most `max_val_images` images."""
    examples = examples[: config.max_val_images]

    def generate_captions() -> list[str]:
        decoding = DecodeConfig(max_words=config.max_length)
        captions = evaluate.generate_captions(caption_model, tokenizer, cache, examples, config.batch_size, decoding)
        return [caption.text for caption in captions]

    return Validator(
        caption_model,
        encode_captions(examples, tokenizer.encode, cache.path, config.max_length),
        [list(example.captions) for example in examples],
        cache.read,
        generate_captions,
        choose_tokenizer(tokenizer.words, split_words)[1],
        config.batch_size,
    )


def best_so_far(progress: TrainProgress) -> EpochScore:
    """Returns the score of the best epoch so far."""
    return EpochScore(*progress.get("best_score"))


def validate_and_log(
    validator: Validator, state: TrainState, checkpoints: Checkpoints, training_log: TrainingLog
) -> EpochScore:
    """Validates an epoch, saves the weights if it is the best so far, and writes it down; returns its score."""
    progress = state.progress
    epoch, best_epoch, best_score = progress.get("epoch") + 1, progress.get("best_epoch"), best_so_far(progress)
    with state.ema.applied():
        validation = validator.evaluate()
        if validation.score > best_score:
            best_score, best_epoch = validation.score, epoch
            checkpoints.save_best()
    row = {
        "epoch": epoch,
        "train_loss": round(progress.mean_loss(), 4),
        **validation.row,
        "train_seconds": round(progress.get("seconds"), 1),
    }
    training_log.add(row, best_epoch, best_score.column)
    log("  ".join(f"{name} {value}" for name, value in row.items() if value is not None))
    log(f"  {validation.sample or '(no words)'}")
    return validation.score


# A run.


def build_train_state(run: Path, config: RunConfig, strategy: tf.distribute.Strategy) -> tuple[TrainState, Checkpoints]:
    """Builds what is trained on the devices of a strategy, and restores the last checkpoint if there is one."""
    settings = config.train
    tf.keras.utils.set_random_seed(settings.seed)
    with strategy.scope():
        caption_model = model.build(config.model, mixed_precision=settings.mixed_precision)
        optimizer = make_optimizer(settings.learning_rate, settings.clip_norm, settings.mixed_precision)
        optimizer.build(caption_model.trainable_variables)  # before restoring: its slots must exist
        ema = WeightEMA(caption_model.trainable_variables, settings.ema_decay)
        progress = TrainProgress()
    # XLA needs shapes that are known, which only the plain loop has; and only that loop has hard attention.
    if settings.fused and config.model.attention == "soft" and settings.jit == "off":
        caption_model.decoder.fused = model.fused_decoder_matches()
        if not caption_model.decoder.fused:
            log("captioning/fused_decoder.py differs from RNNDecoder.step in model.py: training with the plain loop")
    checkpoints = Checkpoints(run, caption_model, optimizer, ema, progress, devices.is_chief(strategy))
    if checkpoints.restore():
        done = f"{progress.get('epoch')} epochs and {progress.get('step')} batches"
        log(f"resuming {run} after {done}; best so far: epoch {progress.get('best_epoch')}")
    devices.separate_random_states(caption_model, strategy)
    return TrainState(caption_model, optimizer, ema, progress), checkpoints


def train(
    run: Path,
    dataset: data_utils.CaptionDataset,
    cache: FeatureCache,
    config: RunConfig,
    tokenizer: Tokenizer,
    strategy: tf.distribute.Strategy,
    on_step: Callable[[TrainState], None] | None = None,
) -> None:
    """Trains a run to its end, from wherever it stopped; calls `on_step` after every step."""
    settings = config.train
    state, checkpoints = build_train_state(run, config, strategy)
    progress = state.progress
    training_log = TrainingLog(run, progress.get("epoch")) if devices.is_chief(strategy) else None
    captions = encode_captions(dataset.split("train"), tokenizer.encode, cache.path, settings.max_length)
    if cut := describe_cut(captions):
        log(cut)
    validator = make_validator(state.model, tokenizer, cache, dataset.split("val"), settings)
    log(
        f"{run}: {len(captions.lengths):,} captions of {len(captions.feature_paths):,} images, "
        f"{len(tokenizer):,} words, {state.model.count_params():,} weights; validation on "
        f"{len(validator.references):,} images; at most {settings.epochs} epochs"
    )
    validator.log_best_so_far(best_so_far(progress))
    batch_spec = make_distributed_dataset(strategy, captions, [], cache.read).element_spec
    train_step = make_train_step(state, settings, strategy, batch_spec)
    try:
        while (epoch := progress.get("epoch")) < settings.epochs:
            if settings.patience and epoch - progress.get("best_epoch") >= settings.patience:
                log(f"stopped early: {settings.patience} epochs without a better score")
                break
            state.optimizer.learning_rate.assign(settings.learning_rate * settings.learning_rate_decay**epoch)
            train_epoch(train_step, captions, cache, state, checkpoints, settings, strategy, on_step)
            score = EpochScore()
            if training_log:
                score = validate_and_log(validator, state, checkpoints, training_log)
            score = EpochScore(*devices.broadcast_from_chief(strategy, score))  # all machines stop at the same epoch
            with defer_interrupts():
                if score > best_so_far(progress):
                    progress.best_score.assign(score)
                    progress.best_epoch.assign(epoch + 1)
                progress.epoch.assign(epoch + 1)
                progress.reset_epoch()
                checkpoints.save()
    except KeyboardInterrupt:
        checkpoints.save()
        raise
    log(f"best: epoch {progress.get('best_epoch')}, {best_so_far(progress)}; see {run / 'loss.png'}")


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line; a recipe changes the defaults of its settings, also in --help."""
    recipe_parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_options(recipe_parser, TrainConfig, only=("recipe",))
    recipe = RECIPES[recipe_parser.parse_known_args(argv)[0].recipe]
    parser = make_parser(__doc__, parents=[recipe_parser])
    parser.add_argument("--run", type=Path, metavar="DIR", help="run folder (default: runs/<name of the dataset>)")
    add_quiet_option(parser)
    data_utils.add_data_options(parser)
    add_options(parser.add_argument_group("features"), FeatureConfig)
    add_options(parser.add_argument_group("model"), ModelConfig, recipe)
    add_options(parser.add_argument_group("training"), TrainConfig, recipe, skip=("recipe", *SPEED_SETTINGS))
    add_options(parser.add_argument_group("speed and devices"), TrainConfig, recipe, only=SPEED_SETTINGS)
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
    run = args.run or Path("runs") / dataset.name
    if not devices.is_chief(strategy):
        train(run, dataset, cache, config, tokenizer, strategy, on_step)
        return
    with lock_folder(run):
        init_run_dir(run, config, tokenizer.save, cache.cnn_weights)
        train(run, dataset, cache, config, tokenizer, strategy, on_step)


if __name__ == "__main__":
    run_main(main)
