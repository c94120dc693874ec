import errno
import importlib.util
import os

import pytest

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.training import training_log
from captioning.training.training_log import COLUMNS, TrainingLog, read_history

HEADER = ",".join(COLUMNS)


def make_row(epoch, **values):
    row = {"epoch": epoch, "train_loss": 2.5, "val_loss": 2.25, "bleu4": 10.5, "cider": 50.0, "distinct_ratio": 75.0}
    return row | {"train_seconds": 1.5} | values


def test_training_log_writes_history_plot_and_events(tmp_path):
    log = TrainingLog(tmp_path, epochs_done=0)
    log.add(make_row(1), 1, "cider")
    log.add(make_row(2, train_loss=2.0, bleu4=None, cider=None), 1, "cider")
    rows = read_history(tmp_path / "history.csv")
    assert rows[0] == {name: str(value) for name, value in make_row(1).items()}
    assert (rows[1]["epoch"], rows[1]["train_loss"], rows[1]["bleu4"], rows[1]["cider"]) == ("2", "2.0", "", "")
    assert (tmp_path / "loss.png").stat().st_size > 5000
    events = {}
    for path in (tmp_path / "tensorboard").iterdir():
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            for value in event.summary.value:
                events[event.step, value.tag] = tf.make_ndarray(value.tensor).item()
    assert events[1, "cider"] == 50.0 and events[2, "train_loss"] == 2.0
    assert (2, "cider") not in events


def test_training_log_continues_after_the_epochs_that_are_done(tmp_path, monkeypatch):
    """An epoch whose row was written, but not its checkpoint, is trained again."""
    monkeypatch.setattr(training_log, "plot_history", lambda *_: None)
    log = TrainingLog(tmp_path, epochs_done=0)
    for epoch in (2, 3, 4):  # a damaged history.csv was deleted after the first one
        log.add(make_row(epoch), 1, "cider")
    assert training_log.count_epochs(tmp_path) == 4
    resumed = TrainingLog(tmp_path, epochs_done=3)
    resumed.add(make_row(4, train_loss=1.0), 1, "cider")
    rows = read_history(tmp_path / "history.csv")
    assert [(row["epoch"], row["train_loss"]) for row in rows] == [("2", "2.5"), ("3", "2.5"), ("4", "1.0")]


def test_training_log_goes_on_while_its_files_are_open_elsewhere(tmp_path, monkeypatch, capsys):
    def replace(source, target):
        raise PermissionError(errno.EACCES, "Access is denied", str(target))

    log = TrainingLog(tmp_path, epochs_done=0)
    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace)  # as Windows does while Excel shows them
        log.add(make_row(1), 1, "cider")
    logged = capsys.readouterr().err
    assert "history.csv cannot be written (Access is denied): close it; until the next epoch, epoch 1 is mis" in logged
    assert "loss.png cannot be written" in logged
    log.add(make_row(2), 1, "cider")
    assert [row["epoch"] for row in read_history(tmp_path / "history.csv")] == ["1", "2"]


def test_training_log_goes_on_without_events_that_cannot_be_written(tmp_path, monkeypatch, capsys):
    log = TrainingLog(tmp_path, epochs_done=0)

    def flush():
        raise tf.errors.OutOfRangeError(None, None, "Failed to flush: No space left on device")

    monkeypatch.setattr(log.events, "flush", flush)
    for epoch in (1, 2):
        log.add(make_row(epoch), 1, "cider")
    assert capsys.readouterr().err.count("events cannot be written (Failed to flush: No space left on device)") == 1
    assert len(read_history(tmp_path / "history.csv")) == 2


def test_training_log_without_tensorboard_leaves_out_events(tmp_path, monkeypatch, capsys):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else find_spec(name))
    log = TrainingLog(tmp_path, epochs_done=0)
    log.add(make_row(1), 1, "val_loss")
    message = capsys.readouterr().err.strip()
    assert message == "no TensorBoard events are written: `pip install tensorboard` adds them"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["history.csv", "loss.png"]


@pytest.mark.parametrize(
    "text",
    [
        "epoch,loss\n1,2.5\n",
        f"{HEADER}\n1,2.5\n",
        f"{HEADER}\n1,2.5,2.25,many,50.0,75.0,1.5\n",
        f"{HEADER}\n1.5,2.5,2.25,10.5,50.0,75.0,1.5\n",
        b"\xff\xfe\x00",
    ],
)
def test_read_history_refuses_something_else(tmp_path, text):
    path = tmp_path / "history.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(InputError, match=r"expected numbers in the columns epoch, train_loss.*delete it to continue"):
        read_history(path)
