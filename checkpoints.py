"""What a stopped run needs to continue, saved so that neither a full disk nor `kill -9` takes what was there before."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tensorflow as tf

import inference
import model
from common import InputError


class Average(tf.Module):
    """A moving average of the weights, which captions more steadily than the weights of any one step.

    A batch holds few pictures, and each pulls the weights towards its own. (Polyak and Juditsky 1992.)
    """

    def __init__(self, variables: list[tf.Variable], decay: float):
        super().__init__()
        self.decay = decay
        self.weights = variables if decay else []  # without a decay there is nothing to follow
        self.means = [tf.Variable(weight, trainable=False) for weight in self.weights]
        self.steps = tf.Variable(0.0)

    def update(self) -> None:
        """Follows the weights after a step; at first quickly, so that the random start is soon forgotten."""
        self.steps.assign_add(1.0)
        decay = tf.minimum(self.decay, (1.0 + self.steps) / (10.0 + self.steps))
        for mean, weight in zip(self.means, self.weights, strict=True):
            mean.assign_add((1.0 - decay) * (weight - mean))

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Puts the means in the place of the weights for a while."""
        kept = [weight.numpy() for weight in self.weights]
        try:
            for mean, weight in zip(self.means, self.weights, strict=True):
                weight.assign(mean)
            yield
        finally:  # Ctrl-C saves the weights themselves
            for value, weight in zip(kept, self.weights, strict=True):
                weight.assign(value)


class Progress(tf.Module):
    """Where the training is: saved with the weights, so that a run continues to the same numbers."""

    def __init__(self):
        super().__init__()
        self.epoch = tf.Variable(0, dtype=tf.int64)  # epochs done
        self.step = tf.Variable(0, dtype=tf.int64)  # batches done of the epoch under way
        self.loss = tf.Variable(0.0, dtype=tf.float64)  # summed over the words of the epoch so far, in nats
        self.words = tf.Variable(0.0, dtype=tf.float64)
        self.seconds = tf.Variable(0.0, dtype=tf.float64)  # of training in the epoch so far
        self.likelihood = tf.Variable(0.0)  # moving average of log p of a word, the baseline of hard attention
        self.best_score = tf.Variable(-1.0, dtype=tf.float64)
        self.best_epoch = tf.Variable(0, dtype=tf.int64)

    def now(self, name: str) -> Any:
        """One of them, as a number of Python."""
        return getattr(self, name).numpy().item()

    def start_epoch(self) -> None:
        """Forgets the sums of the epoch before."""
        for variable in (self.step, self.loss, self.words, self.seconds):
            variable.assign(tf.zeros_like(variable))


class Checkpoints:
    """A run's `last` checkpoint, everything needed to continue, and `best`, the weights that caption best."""

    def __init__(
        self,
        run: Path,
        captioner: model.Captioner,
        optimizer: tf.keras.optimizers.Optimizer,
        average: Average,
        progress: Progress,
        writes: bool = True,
    ):
        everything = tf.train.Checkpoint(
            captioner=captioner,
            optimizer=optimizer,
            average=average,
            progress=progress,
            # Keras keeps dropout's random state where tf.train.Checkpoint does not look for it.
            dice=list(captioner.non_trainable_variables),
        )
        weights = tf.train.Checkpoint(captioner=captioner)
        for name in ("last", "best"):
            inference.latest_checkpoint(run / "checkpoints" / name)  # a damaged one stops the training
        # One is kept of each; the old one is deleted when the new one is whole.
        self.last = tf.train.CheckpointManager(everything, str(run / "checkpoints/last"), max_to_keep=1)
        self.best = tf.train.CheckpointManager(weights, str(run / "checkpoints/best"), max_to_keep=1)
        self.progress, self.writes = progress, writes  # one of several machines writes

    def restore(self) -> bool:
        """Goes back to the last checkpoint; False if there is none."""
        if not self.last.latest_checkpoint:
            return False
        try:
            self.last.checkpoint.restore(self.last.latest_checkpoint).assert_consumed()
        except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(
                f"{self.last.latest_checkpoint}: damaged, or of another model ({reason}); delete the run "
                "folder to start again"
            ) from None
        return True

    def save(self) -> None:
        """Saves where the training is, unless its loss is not a number."""
        if math.isfinite(self.progress.now("loss")):
            self.write(self.last)

    def save_best(self) -> None:
        """Keeps the weights as they are now as the best."""
        self.write(self.best)

    def write(self, manager: tf.train.CheckpointManager) -> None:
        """Saves under the number after the newest, which is overwritten by none; raises InputError on a full disk."""
        if not self.writes:
            return
        number = int(manager.latest_checkpoint.rsplit("-", 1)[1]) + 1 if manager.latest_checkpoint else 1
        try:
            manager.save(checkpoint_number=number)
        except tf.errors.OpError as error:  # a full disk, which TensorFlow does not report as an OSError
            reason = str(error).strip().split("\n")[0][:200]
            raise InputError(
                f"cannot save a checkpoint into {manager.directory} ({reason}); the one before is kept: "
                "free some space and run the same command again"
            ) from None
