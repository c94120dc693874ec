"""What a training saw, epoch by epoch: history.csv, loss.png, and events for TensorBoard."""

import csv
from pathlib import Path
from typing import Any

import tensorflow as tf

from common import atomic_write


def plot_history(rows: list[dict[str, Any]], path: Path) -> None:
    """The loss plot: training and validation loss, and BLEU-4, by epoch."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    epochs = [int(row["epoch"]) for row in rows]
    figure = Figure(figsize=(7, 4), dpi=110, layout="constrained")
    losses = figure.subplots()
    for name, label in (("train_loss", "training loss"), ("val_loss", "validation loss")):
        losses.plot(epochs, [float(row[name]) for row in rows], marker="o", markersize=3, label=label)
    losses.set(xlabel="epoch", ylabel="loss (nats per word)")
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    scores = losses.twinx()
    scores.plot(
        epochs, [float(row["bleu4"]) for row in rows], color="tab:green", marker="s", markersize=3, label="BLEU-4"
    )
    scores.set(ylabel="BLEU-4 (validation, %)", ylim=(0, None))
    best = max(rows, key=lambda row: float(row["cider"]))
    losses.axvline(int(best["epoch"]), color="grey", linestyle=":", label="best epoch (CIDEr)")
    lines = losses.get_legend_handles_labels(), scores.get_legend_handles_labels()
    losses.legend(*(first + second for first, second in zip(*lines, strict=True)), loc="center right")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format="png")


class History:
    """history.csv, loss.png and the TensorBoard events of a run, one row an epoch."""

    def __init__(self, run: Path, epochs_done: int):
        self.run, self.rows = run, []
        if (run / "history.csv").exists():
            with open(run / "history.csv", newline="", encoding="utf-8") as file:
                self.rows = list(csv.DictReader(file))[:epochs_done]
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
