"""What a stopped run needs to resume, saved so that neither a full disk nor `kill -9` loses the checkpoint before."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.runs.run_folder import latest_checkpoint
from captioning.training.objective import CrossEntropy, StepSums
from captioning.training.optimizer import WeightEMA
from captioning.training.validation import EpochScore

MIN_LOSS_SCALE = 1.0  # in mixed precision it begins at 32768, and is halved when gradients overflow


class TrainProgress(tf.Module):
    """The position in the training, and its running sums, which are saved with the weights."""

    def __init__(self):
        super().__init__()
        self.epoch = tf.Variable(0, dtype=tf.int64)  # complete epochs
        self.step = tf.Variable(0, dtype=tf.int64)  # complete batches of the current epoch
        self.loss_sum = tf.Variable(0.0, dtype=tf.float64)  # over the words of the current epoch, in nats
        self.token_count = tf.Variable(0.0, dtype=tf.float64)
        self.seconds = tf.Variable(0.0, dtype=tf.float64)  # of training in the current epoch
        self.best_score = tf.Variable([-math.inf] * 3, dtype=tf.float64)  # an `EpochScore`
        self.best_epoch = tf.Variable(0, dtype=tf.int64)

    def get(self, name: str) -> Any:
        """Returns the value of a variable as a Python number or list."""
        return getattr(self, name).numpy().tolist()

    def mean_loss(self) -> float:
        """Returns the mean loss of the current epoch so far, in nats per word; nan before the first word."""
        return self.get("loss_sum") / (self.get("token_count") or math.nan)

    def best(self) -> EpochScore:
        """Returns `best_score`."""
        return EpochScore(*self.get("best_score"))

    def add(self, sums: StepSums) -> None:
        """Adds the sums of a step."""
        self.loss_sum.assign_add(tf.cast(sums.loss, tf.float64))
        self.token_count.assign_add(tf.cast(sums.num_tokens, tf.float64))
        self.step.assign_add(1)

    def reset_epoch(self) -> None:
        """Sets the counters and sums of the current epoch to 0."""
        for variable in (self.step, self.loss_sum, self.token_count, self.seconds):
            variable.assign(tf.zeros_like(variable))


class TrainState(NamedTuple):
    """What a training step changes."""

    model: tf.keras.Model
    optimizer: tf.keras.optimizers.Optimizer
    ema: WeightEMA
    progress: TrainProgress
    objective: CrossEntropy


class Checkpoints:
    """A run's checkpoints: `last` holds everything needed to resume, `best` the weights with the best score."""

    def __init__(self, run: Path, state: TrainState, is_writer: bool = True):
        """Opens the checkpoints of a run folder; of several machines only the `is_writer` saves.

        Raises:
            InputError: a checkpoint that is there is damaged.
        """
        train_state = tf.train.Checkpoint(
            **state._asdict(),
            # Keras keeps the random state of dropout where tf.train.Checkpoint does not look for it.
            rng_state=list(state.model.non_trainable_variables),
        )
        weights = tf.train.Checkpoint(model=state.model)
        for name in ("last", "best"):
            latest_checkpoint(run / "checkpoints" / name)  # raises an InputError if it is damaged
        # One of each is kept. The old one is deleted when the new one is complete.
        self.last = tf.train.CheckpointManager(train_state, str(run / "checkpoints/last"), max_to_keep=1)
        self.best = tf.train.CheckpointManager(weights, str(run / "checkpoints/best"), max_to_keep=1)
        self.state, self.is_writer = state, is_writer

    def restore(self) -> bool:
        """Restores the last checkpoint; returns False if there is none.

        Raises:
            InputError: it is damaged, or of another model.
        """
        if not self.last.latest_checkpoint:
            return False
        try:
            self.last.checkpoint.restore(self.last.latest_checkpoint).assert_consumed()
        except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
            raise InputError(
                f"{self.last.latest_checkpoint}: damaged, or of another model ({_first_line(error)}); delete the run "
                "folder to start again"
            ) from None
        return True

    def check_loss(self) -> None:
        """Raises InputError if the loss is not finite, or if in float16 hardly any gradient is."""
        if not math.isfinite(self.state.progress.get("loss_sum")):
            raise self._divergence(f"the loss is {self.state.progress.mean_loss()}")
        if float(getattr(self.state.optimizer, "dynamic_scale", MIN_LOSS_SCALE)) < MIN_LOSS_SCALE:
            raise self._divergence("the gradients are too large for float16")

    def _divergence(self, problem: str) -> InputError:
        step, epoch = self.state.progress.get("step"), self.state.progress.get("epoch") + 1
        return InputError(
            f"{problem} by step {step} of epoch {epoch}; the last checkpoint is from before it: run again with a "
            "smaller --learning-rate in another --run"
        )

    def save(self) -> None:
        """Saves the state of the training.

        Raises:
            InputError: its loss or its weights are not finite, so that nothing is saved; or the disk is full.
        """
        self.check_loss()
        for variable in self.state.model.trainable_variables:  # of the next step the loss would not be finite either
            if not tf.reduce_all(tf.math.is_finite(variable)):
                raise self._divergence(f"{variable.path} is not finite")
        self._write(self.last)

    def save_best(self) -> None:
        """Saves the current weights as the best."""
        self._write(self.best)

    def _write(self, manager: tf.train.CheckpointManager) -> None:
        if not self.is_writer:
            return
        newest = manager.latest_checkpoint
        number = int(newest.rsplit("-", 1)[1]) + 1 if newest else 1
        try:
            manager.save(checkpoint_number=number)
        except tf.errors.OpError as error:  # TensorFlow does not report a full disk as an OSError
            raise InputError(
                f"cannot save a checkpoint into {manager.directory} ({_first_line(error)}); the previous one is kept: "
                "free some space and run the same command again"
            ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0][:200]
