"""What a stopped run needs to resume, saved so that neither a full disk nor `kill -9` loses the checkpoint before."""

import contextlib
import math
import os
from pathlib import Path
from typing import Any, NamedTuple

from captioning.base.cli import InputError, first_line, log
from captioning.base.files import atomic_write, plain_path
from captioning.base.quiet_tensorflow import tf
from captioning.runs.run_folder import latest_checkpoint, list_checkpoints, restore_weights
from captioning.training.objective import CrossEntropy, StepSums
from captioning.training.optimizer import WeightEMA
from captioning.training.training_log import count_epochs
from captioning.training.validation import EpochScore

GOOGLE_DRIVE = Path("/content/drive")  # where Colab has it
NUM_KEPT = 2  # checkpoints of each kind
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
        self.is_estimated = False  # whether this process has told how long all epochs take; not saved

    def get(self, name: str) -> Any:
        """Returns the value of a variable as a Python number or list."""
        return getattr(self, name).numpy().tolist()

    def mean_loss(self) -> float:
        """Returns the mean loss of the current epoch so far, in nats per word; nan before the first word."""
        return self.get("loss_sum") / (self.get("token_count") or math.nan)

    def describe(self) -> str:
        """Describes the position in a few words."""
        return f"{self.get('epoch')} epochs and {self.get('step')} batches; best so far: epoch {self.get('best_epoch')}"

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
        """Opens the checkpoints of a run folder; of several machines only the `is_writer` saves."""
        self.last = tf.train.Checkpoint(
            **state._asdict(),
            # Keras keeps the random state of dropout where tf.train.Checkpoint does not look for it.
            rng_state=list(state.model.non_trainable_variables),
        )
        self.best = tf.train.Checkpoint(model=state.model)
        _ = self.last.save_counter, self.best.save_counter  # which makes them: TensorFlow's checkpoints hold one
        self.run, self.state, self.is_writer = run, state, is_writer
        self.resumed = ""  # the prefix of the checkpoint that was restored

    def restore(self) -> bool:
        """Restores the last checkpoint that is whole, or else the best weights; returns False if there is none.

        Raises:
            InputError: all are damaged, or of another model.
        """
        try:
            prefix = latest_checkpoint(self.run / "checkpoints/last")
        except InputError as error:
            self._restore_best(error)
            return True
        if prefix is None:
            if not list_checkpoints(self.run / "checkpoints/best"):
                return False
            self._restore_best(InputError(f"{self.run / 'checkpoints/last'} has no checkpoint"))
            return True
        try:
            self.last.restore(str(plain_path(prefix))).assert_consumed()
        except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
            raise InputError(
                f"{prefix}: damaged, or of another model ({first_line(error)}); delete the run folder to start again"
            ) from None
        self.resumed = prefix
        best = self.run / "checkpoints/best"
        try:
            if latest_checkpoint(best) is None and self.state.progress.best() > EpochScore():
                raise InputError(f"{best} has no checkpoint")
        except InputError as error:
            log(f"{error}: the weights of the last checkpoint take its place")
            self.state.progress.best_score.assign(EpochScore())
        return True

    def _restore_best(self, damage: InputError) -> None:
        """Restores the best weights, after the epochs of history.csv, where no checkpoint can be read to resume."""
        try:
            prefix = latest_checkpoint(self.run / "checkpoints/best")
        except InputError:
            prefix = None
        if prefix is None:
            raise InputError(f"{damage}, and there are no best weights: put a copy back, or delete the run folder")
        restore_weights(prefix, self.state.model)
        self.state.ema.restart()
        self.state.progress.epoch.assign(count_epochs(self.run))
        log(f"{damage}: the best weights are trained further, and Adam begins anew")

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
        self._write("last", self.last)  # if the later one is damaged, minutes are lost and not the run

    def save_best(self) -> None:
        """Saves the current weights as the best."""
        self._write("best", self.best)  # another command may be reading the one before

    def _write(self, name: str, checkpoint: tf.train.Checkpoint) -> None:
        """Writes a checkpoint, and deletes old ones when it is complete, as CheckpointManager does with other paths."""
        if not self.is_writer:
            return
        folder = self.run / "checkpoints" / name
        folder.mkdir(parents=True, exist_ok=True)
        prefixes = list_checkpoints(folder)
        if self.resumed in prefixes:  # a later one is damaged: this one overwrites it, and keeps the whole one
            prefixes, self.resumed = [self.resumed], ""
        number = 1 + max((int(prefix.rpartition("-")[2]) for prefix in prefixes), default=0)
        try:
            checkpoint.write(str(plain_path(folder / f"ckpt-{number}")))
            with atomic_write(folder / "checkpoint") as file:
                file.write(f'model_checkpoint_path: "ckpt-{number}"\nall_model_checkpoint_paths: "ckpt-{number}"\n')
        except (tf.errors.OpError, OSError) as error:  # TensorFlow does not report a full disk as an OSError
            raise InputError(
                f"cannot save a checkpoint into {folder} ({first_line(error)}); the previous one is kept: if the disk "
                "is full, free some space; then run the same command again"
            ) from None
        for path in folder.glob("ckpt-*.*"):
            old = path.name[5:].partition(".")[0]
            if old.isdecimal() and int(old) <= number - NUM_KEPT:
                if GOOGLE_DRIVE in path.resolve().parents:  # where deleted files take space for 30 days
                    os.truncate(path, 0)
                with contextlib.suppress(PermissionError):  # Windows deletes no open file, but will the next time
                    path.unlink()
