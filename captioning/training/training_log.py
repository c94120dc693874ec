"""The record of a training, epoch by epoch: history.csv, loss.png, and events for TensorBoard."""

import csv
import importlib.util
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, first_line, log
from captioning.base.files import atomic_write, plain_path
from captioning.base.quiet_tensorflow import tf
from captioning.output.plots import plot_history

COLUMNS = ("epoch", "train_loss", "val_loss", "bleu4", "cider", "distinct_ratio", "train_seconds")
SCORES = ("bleu4", "cider")  # empty where an epoch could not be scored


def read_history(path: Path) -> list[dict[str, str]]:
    """Reads the rows of a history.csv.

    Raises:
        InputError: it is something else.
    """
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            # Another objective has another column instead of train_loss.
            if len(row) != len(COLUMNS) or not row.keys() >= set(COLUMNS) - {"train_loss"}:
                raise ValueError(f"its columns are {list(row)}")
            int(row["epoch"])
            for name, value in row.items():
                if value or name not in SCORES:
                    float(value)
    except (csv.Error, ValueError, TypeError) as error:  # TypeError: a row that has too few values
        raise InputError(
            f"{path}: expected numbers in the columns {', '.join(COLUMNS)}, found something else ({error}); delete it "
            "to continue without it"
        ) from None
    return rows


def count_epochs(run: Path) -> int:
    """Returns the last epoch in the history.csv of a run, or 0; raises InputError if it is something else."""
    path = run / "history.csv"
    return max((int(row["epoch"]) for row in read_history(path)), default=0) if path.exists() else 0


class TrainingLog:
    """history.csv, loss.png and the TensorBoard events of a run; each epoch is a row."""

    def __init__(self, run: Path, epochs_done: int):
        self.run = run
        self.rows: list[dict[str, Any]] = []
        if (run / "history.csv").exists():
            self.rows = [row for row in read_history(run / "history.csv") if int(row["epoch"]) <= epochs_done]
        self.events = None
        if importlib.util.find_spec("tensorboard"):
            self.events = tf.summary.create_file_writer(str(plain_path(run / "tensorboard")))
        else:
            log("no TensorBoard events are written: `pip install tensorboard` adds them")

    def find_row(self, epoch: int) -> dict[str, Any] | None:
        """Returns the row of an epoch, or None if there is none."""
        return next((row for row in self.rows if int(row["epoch"]) == epoch), None)

    def add(self, row: dict[str, Any], best_epoch: int, best_by: str) -> None:
        """Adds an epoch and writes the files again; a score of None is left empty.

        `best_epoch` is the best so far, this one included, by the column `best_by`, `cider` or `val_loss`.
        """
        self.rows.append(row)
        try:
            with atomic_write(self.run / "history.csv") as file:
                writer = csv.DictWriter(file, list(row))
                writer.writeheader()
                writer.writerows(self.rows)
        except PermissionError as error:  # as under Windows while Excel shows it
            until = f"until the next epoch, epoch {row['epoch']} is missing in it"
            log(f"{error.filename} cannot be written ({error.strerror}): close it; {until}", error=True)
        try:
            plot_history(self.rows, best_epoch, best_by, self.run / "loss.png")
        except PermissionError as error:
            log(f"{error.filename} cannot be written ({error.strerror}): close it", error=True)
        if self.events is None:
            return
        try:
            with self.events.as_default(step=int(row["epoch"])):
                for name, value in row.items():
                    if value is not None:
                        tf.summary.scalar(name, float(value))
            self.events.flush()
        except tf.errors.OpError as error:  # a full disk
            log(f"TensorBoard events cannot be written ({first_line(error)}): no more of them")
            self.events = None
