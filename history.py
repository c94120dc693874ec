"""What a training saw, epoch by epoch: history.csv, loss.png, and events for TensorBoard."""

import csv
from pathlib import Path
from typing import Any

import tensorflow as tf

from common import InputError, atomic_write
from plots import plot_history

COLUMNS = ("epoch", "train_loss", "val_loss", "bleu4", "cider", "distinct", "train_seconds")


def read_history(path: Path) -> list[dict[str, str]]:
    """The rows of a history.csv; raises InputError if it is none."""
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        for row in rows:
            if list(row) != list(COLUMNS):
                raise ValueError(f"its columns are {list(row)}")
            int(row["epoch"]), [float(value) for value in row.values()]
    except (csv.Error, ValueError, TypeError) as error:  # TypeError: a row with a value too few
        raise InputError(
            f"{path}: expected numbers in the columns {', '.join(COLUMNS)}, found something else ({error}); delete it "
            "to go on without"
        ) from None
    return rows


class History:
    """history.csv, loss.png and the TensorBoard events of a run, one row an epoch."""

    def __init__(self, run: Path, epochs_done: int):
        self.run, self.rows = run, []
        if (run / "history.csv").exists():
            self.rows = read_history(run / "history.csv")[:epochs_done]
        self.events = tf.summary.create_file_writer(str(run / "tensorboard"))

    def add(self, row: dict[str, Any]) -> None:
        """Adds an epoch and writes everything anew."""
        self.rows.append(row)
        with atomic_write(self.run / "history.csv") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerows(self.rows)
        plot_history(self.rows, self.run / "loss.png")
        with self.events.as_default(step=int(row["epoch"])):
            for name, value in row.items():
                tf.summary.scalar(name, float(value))
        self.events.flush()
