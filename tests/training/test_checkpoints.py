import os
import re
import shutil
import sys

import numpy as np
import pytest

from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.runs.run_folder import latest_checkpoint
from captioning.training import checkpoints as checkpoints_module
from captioning.training import training_log
from captioning.training.checkpoints import Checkpoints, TrainProgress, TrainState
from captioning.training.objective import CrossEntropy
from captioning.training.optimizer import WeightEMA, make_optimizer
from captioning.training.validation import EpochScore


class TrainedModel:
    """A small model with everything that a checkpoint holds; each seed gives other values."""

    def __init__(self, seed, units=200, more_layers=()):
        tf.keras.utils.set_random_seed(seed)
        layers = [tf.keras.layers.Dense(units), tf.keras.layers.Dropout(0.5), tf.keras.layers.Dense(100), *more_layers]
        self.model = tf.keras.Sequential(layers)
        self.model.build((None, 100))
        self.variables = self.model.trainable_variables
        self.optimizer = make_optimizer(1e-2, 5.0, mixed_precision=False)
        self.optimizer.build(self.variables)
        self.ema = WeightEMA(self.variables, 0.9)
        self.progress = TrainProgress()

    def train_step(self):
        """Changes everything that a step of the training changes."""
        output = tf.reduce_mean(self.model(tf.ones((1, 100)), training=True))  # moves the random state of dropout
        self.optimizer.apply([tf.fill(variable.shape, output) for variable in self.variables], self.variables)
        self.ema.update()
        self.progress.step.assign_add(1)
        self.progress.loss_sum.assign_add(float(output))
        self.progress.best_score.assign([0.0, -1.0, -float(output)])

    def checkpoints(self, run, is_writer=True):
        state = TrainState(self.model, self.optimizer, self.ema, self.progress, CrossEntropy(TrainConfig()))
        return Checkpoints(run, state, is_writer)

    def values(self):
        tensors = [*self.model.variables, *self.optimizer.variables, *self.ema.shadow, *self.progress.variables]
        return [np.array(tensor) for tensor in tensors]


@pytest.fixture
def trained():
    trained = TrainedModel(seed=0)
    trained.train_step()
    return trained


def assert_same_values(actual, expected):
    for value, expected_value in zip(actual, expected, strict=True):
        np.testing.assert_array_equal(value, expected_value)


def list_files(folder):
    return sorted(path.name for path in folder.iterdir() if path.name != "checkpoint")


def test_checkpoints_restore_everything_that_training_changes(tmp_path, trained):
    assert not trained.checkpoints(tmp_path).restore(), "there is none yet"
    trained.checkpoints(tmp_path).save()
    trained.checkpoints(tmp_path).save_best()
    saved = trained.values()
    trained.train_step()
    continued = trained.values()
    resumed = TrainedModel(seed=1)
    assert resumed.checkpoints(tmp_path).restore()
    assert_same_values(resumed.values(), saved)
    resumed.train_step()
    assert_same_values(resumed.values(), continued)


@pytest.mark.parametrize("run", ["run", "a [1]", r"b\c", "*"])
def test_checkpoints_keep_two_of_each(tmp_path, trained, run):
    others = trained.checkpoints(tmp_path / "other")
    others.save()
    checkpoints = trained.checkpoints(tmp_path / run)
    for _ in range(3):
        checkpoints.save()
        checkpoints.save_best()
    for name in ("last", "best"):
        files = [f"ckpt-{number}.{part}" for number in (2, 3) for part in ("data-00000-of-00001", "index")]
        assert list_files(tmp_path / run / "checkpoints" / name) == files
    if run == "run":
        assert tf.train.latest_checkpoint(tmp_path / "run/checkpoints/last").endswith("ckpt-3"), "as TensorFlow does"
    assert TrainedModel(seed=1).checkpoints(tmp_path / run).restore()
    assert others.restore(), "patterns match other folders"


def test_checkpoints_are_not_saved_once_loss_or_weights_are_not_finite(tmp_path, trained):
    checkpoints = trained.checkpoints(tmp_path)
    checkpoints.save()
    weights = trained.variables[1]
    for variable, value, problem in (
        (weights, tf.fill(weights.shape, np.inf), "bias is not finite"),
        (trained.progress.loss_sum, np.nan, "the loss is nan"),
    ):
        variable.assign(value)
        with pytest.raises(InputError, match=f"{problem} by step 1 of epoch 1; the last checkpoint is from before it"):
            checkpoints.save()
    assert latest_checkpoint(tmp_path / "checkpoints/last").endswith("ckpt-1")


def test_checkpoints_are_not_saved_once_float16_holds_no_gradient(tmp_path, trained):
    trained.optimizer = make_optimizer(1e-2, 5.0, mixed_precision=True)
    trained.optimizer.build(trained.variables)
    trained.checkpoints(tmp_path).save()
    trained.optimizer.dynamic_scale.assign(0.5)
    with pytest.raises(InputError, match="the gradients are too large for float16 by step 1 of epoch 1"):
        trained.checkpoints(tmp_path).save()


def test_checkpoints_are_written_by_one_machine_only(tmp_path, trained):
    checkpoints = trained.checkpoints(tmp_path, is_writer=False)
    checkpoints.save()
    checkpoints.save_best()
    assert not list(tmp_path.rglob("*.index"))


DAMAGES = {
    "cut": lambda folder, name: os.truncate(folder / f"{name}.data-00000-of-00001", 1000),
    "changed": lambda folder, name: (folder / f"{name}.data-00000-of-00001").write_bytes(bytes(10**6)),
    "gone": lambda folder, name: (folder / f"{name}.index").unlink(),
    "state": lambda folder, name: (folder / "checkpoint").write_bytes(b"\xff"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_checkpoints_fall_back_to_the_one_before(tmp_path, trained, damage, capsys):
    checkpoints, folder = trained.checkpoints(tmp_path), tmp_path / "checkpoints/last"
    checkpoints.save_best()
    checkpoints.save()
    before = trained.values()
    trained.train_step()
    checkpoints.save()
    newest = trained.values()
    DAMAGES[damage](folder, "ckpt-2")
    resumed = TrainedModel(seed=1)
    checkpoints = resumed.checkpoints(tmp_path)
    assert checkpoints.restore()
    assert_same_values(resumed.values(), newest if damage == "state" else before)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == (damage != "state")
    assert not lines or re.fullmatch(rf"{folder}/ckpt-2 is damaged \(.+\): {folder}/ckpt-1 is taken instead", lines[0])
    checkpoints.save()
    assert latest_checkpoint(folder) == str(folder / ("ckpt-3" if damage == "state" else "ckpt-2"))
    assert len(list(folder.glob("*.index"))) == 2, "the whole one before is kept"


@pytest.mark.parametrize("damage", ["cut", "deleted"])
def test_checkpoints_fall_back_to_the_best_weights(tmp_path, trained, damage, capsys):
    checkpoints = trained.checkpoints(tmp_path)
    checkpoints.save_best()
    best = trained.values()[: len(trained.model.variables)]
    trained.train_step()
    checkpoints.save()
    if damage == "deleted":
        shutil.rmtree(tmp_path / "checkpoints/last")
    else:
        DAMAGES[damage](tmp_path / "checkpoints/last", "ckpt-1")
    names = [*training_log.COLUMNS]
    (tmp_path / "history.csv").write_text("\n".join(map(",".join, [names, ["1"] * len(names), ["2"] * len(names)])))
    resumed = TrainedModel(seed=1)
    assert resumed.checkpoints(tmp_path).restore()
    assert_same_values([np.array(variable) for variable in resumed.variables], [best[0], best[1], best[-2], best[-1]])
    assert_same_values(resumed.ema.shadow, resumed.variables)
    assert (resumed.progress.get("epoch"), resumed.progress.best()) == (2, EpochScore())
    assert capsys.readouterr().err.endswith(": the best weights are trained further, and Adam begins anew\n")
    shutil.rmtree(tmp_path / "checkpoints/best")
    if damage == "deleted":
        assert not resumed.checkpoints(tmp_path).restore()
        return
    with pytest.raises(InputError, match=r"ckpt-1 is damaged .*no best weights: put a copy back, or delete"):
        resumed.checkpoints(tmp_path).restore()


def test_checkpoints_forget_the_best_score_of_damaged_or_deleted_weights(tmp_path, trained, capsys):
    checkpoints = trained.checkpoints(tmp_path)
    checkpoints.save()
    checkpoints.save_best()
    DAMAGES["cut"](tmp_path / "checkpoints/best", "ckpt-1")
    assert checkpoints.restore() and trained.progress.best() == EpochScore()
    assert "best/ckpt-1 is damaged" in capsys.readouterr().err
    trained.train_step()
    checkpoints.save()
    shutil.rmtree(tmp_path / "checkpoints/best")
    assert checkpoints.restore() and trained.progress.best() == EpochScore()
    assert "best has no checkpoint: the weights of the last" in capsys.readouterr().err


@pytest.mark.parametrize(
    "difference", [{"units": 201}, {"more_layers": [tf.keras.layers.Dense(3)]}], ids=["size", "layer"]
)
def test_checkpoints_refuse_another_model(tmp_path, difference):
    TrainedModel(seed=0, **difference).checkpoints(tmp_path).save()
    with pytest.raises(InputError, match=r"damaged, or of another model .* delete the run folder to start again"):
        TrainedModel(seed=0).checkpoints(tmp_path).restore()


def test_old_checkpoints_are_emptied_before_they_go_into_the_trash_of_google_drive(tmp_path, trained, monkeypatch):
    emptied = []
    monkeypatch.setattr(checkpoints_module.os, "truncate", lambda path, size: emptied.append((path.name, size)))
    for drive, expected in ((tmp_path / "other", 0), (tmp_path, 2)):
        monkeypatch.setattr(checkpoints_module, "GOOGLE_DRIVE", drive)
        checkpoints = trained.checkpoints(tmp_path / f"run{expected}")
        for _ in range(3):
            checkpoints.save()
        assert len(emptied) == expected
    assert sorted(emptied) == [("ckpt-1.data-00000-of-00001", 0), ("ckpt-1.index", 0)]


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_full_disk_keeps_previous_checkpoint(tmp_path, trained):
    import resource

    checkpoints = trained.checkpoints(tmp_path)
    checkpoints.save()
    checkpoints.save_best()
    saved, kept_files = trained.values(), sorted(tmp_path.rglob("ckpt*"))
    contents = [path.read_bytes() for path in kept_files]
    trained.train_step()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, limits[1]))  # no file can grow beyond, as on a full disk
    try:
        for save in (checkpoints.save, checkpoints.save_best):
            with pytest.raises(
                InputError, match=r"cannot save a checkpoint .* free some space; then run the same command"
            ):
                save()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.read_bytes() for path in kept_files] == contents
    resumed = TrainedModel(seed=1)
    restored = resumed.checkpoints(tmp_path)
    assert restored.restore()
    assert_same_values(resumed.values(), saved)
    restored.save()
    restored.save_best()
    for name in ("last", "best"):
        files = list_files(tmp_path / "checkpoints" / name)
        assert len(files) == 4, f"what could not be written is left behind: {files}"
