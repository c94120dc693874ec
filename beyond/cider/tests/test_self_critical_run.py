"""Runs of self-critical training: from the weights of a run into a new one, stopped and resumed."""

import json

import numpy as np
import pytest
from helpers.runs import (
    SimulatedKill,
    assert_same_checkpoint,
    read_checkpoint,
    read_history,
    run_training,
    stop_after,
)

import inference
import train
from captioning.base.cli import InputError
from captioning.config.settings import RECIPES, SELF_CRITICAL_SETTINGS, TrainConfig
from captioning.training import training_log
from captioning.training.training_log import REWARD_COLUMNS
from data_utils import CaptionDataset

SETTINGS = {"self_critical": True, "epochs": 2, "learning_rate": 3e-3, "ema_decay": 0.5, "dropout": 0.1}

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """The run to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "plot_history", lambda *_: None)
        return run_training(tmp_path_factory.mktemp("start") / "small", data, epochs=8)


@pytest.fixture(scope="module")
def trained(data, start, tmp_path_factory):
    """Two epochs from it, which no test changes."""
    return run_training(tmp_path_factory.mktemp("trained") / "run", data, start=start, **SETTINGS)


@pytest.mark.slow
def test_self_critical_training_raises_the_reward(start, trained):
    rows = read_history(trained)
    assert [list(row) for row in rows] == [[name for name in REWARD_COLUMNS if name != "train_seconds"]] * 2
    assert float(rows[1]["train_reward"]) > 1.1 * float(rows[0]["train_reward"]) > 0
    assert (trained / "loss.png").stat().st_size > 5000
    _, _, config = inference.load_run(trained)
    assert config.train.self_critical
    # The run that it started from is as it was.
    assert len(read_history(start)) == 8
    assert not inference.load_run(start)[2].train.self_critical


@pytest.mark.slow
def test_self_critical_training_starts_from_the_best_weights(data, start, tmp_path):
    seen = []

    def on_step(state):
        seen.append(state.model.encoder.fc.kernel.numpy())
        raise SimulatedKill

    with pytest.raises(SimulatedKill):
        run_training(tmp_path / "run", data, on_step, start=start, **SETTINGS | {"learning_rate": 1e-9})
    best = next(v for k, v in read_checkpoint(start, "best").items() if "encoder/fc/_kernel" in k and v.ndim == 2)
    np.testing.assert_allclose(seen[0], best, atol=1e-7)


@pytest.mark.slow
def test_self_critical_training_resumes_exactly(data, start, trained, tmp_path):
    run = tmp_path / "run"
    for num_steps in (3, 6):
        with pytest.raises(KeyboardInterrupt):
            run_training(run, data, stop_after(num_steps, KeyboardInterrupt), start=start, **SETTINGS)
    run_training(run, data, start=start, **SETTINGS)
    assert_same_checkpoint(read_checkpoint(run), read_checkpoint(trained))
    assert read_history(run) == read_history(trained)


@pytest.mark.slow
def test_the_start_stays_the_best_if_no_epoch_is_better(data, start, tmp_path, capsys):
    run = run_training(tmp_path / "run", data, start=start, **SETTINGS | {"epochs": 1, "learning_rate": 1.0})
    best, first = read_checkpoint(run, "best"), read_checkpoint(start, "best")
    kernel = next(key for key in best if "encoder/fc/_kernel" in key and best[key].ndim == 2)
    np.testing.assert_array_equal(best[kernel], first[kernel])
    log = capsys.readouterr().err
    assert "the start: " in log
    assert "best: epoch 0" in log


# The command.


@pytest.fixture
def command(dataset, cache, monkeypatch):
    """Runs train.py with the small dataset; returns the arguments with which it would train."""
    monkeypatch.setattr(train.data_utils, "load_dataset", lambda _: dataset)
    monkeypatch.setattr(train.features, "extract_features", lambda *_: (cache, dataset))

    def run_command(*argv):
        calls = []
        monkeypatch.setattr(train, "train", lambda *args: calls.append(args))
        train.main(["--self-critical", *map(str, argv)])
        return calls[0]

    return run_command


def test_command_takes_the_settings_of_the_start(command, run):
    new_run, _, _, config, _, _, _, start = command("--run", run, "--samples", "4")
    assert (new_run, start) == (run.with_name("small_cider"), run)
    expected = json.loads((run / "config.json").read_text())
    rates = {name: RECIPES["best-cider"][name] for name in ("dropout", "feature_dropout")}
    assert config.model.to_json() == expected["model"] | rates
    assert (config.train.samples, config.train.recipe) == (4, "best-cider")
    assert config.train.learning_rate == RECIPES["best-cider"]["learning_rate"]
    assert config.features == expected["features"] | {"folder": config.features["folder"]}


def test_command_refuses_other_data(command, run, dataset, cache, monkeypatch):
    fewer = CaptionDataset("small", dataset.image_dir, dataset.examples[1:])
    monkeypatch.setattr(train.features, "extract_features", lambda *_: (cache, fewer))
    with pytest.raises(InputError, match="was trained on other images or captions; expected the same"):
        command("--run", run)


def test_command_refuses_hard_attention(command, run):
    with pytest.raises(InputError, match="expected soft attention"):
        command("--run", run, "--attention", "hard")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--self-critical"], "expected --run DIR, the run to start from"),
        (["--samples", "4"], "samples: only for self-critical training; expected 5, found 4"),
        (["--recipe", "best-cider"], "expected --run DIR, the run to start from"),
        (["--self-critical", "--recipe", "best", "--run", "x"], "--recipe best: not for --self-critical"),
    ],
)
def test_command_says_what_belongs_to_it(argv, message, capsys):
    with pytest.raises((InputError, SystemExit)) as error:
        train.main(argv)
    assert message in str(error.value) + capsys.readouterr().err


def test_command_refuses_a_folder_that_is_no_run(tmp_path):
    with pytest.raises(InputError, match="not a run folder"):
        train.main(["--self-critical", "--run", str(tmp_path)])


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"label_smoothing": 0.1}, "label_smoothing: not for self-critical training"),
        ({"doubly_stochastic": 1.0}, "doubly_stochastic: not for self-critical training"),
        ({"jit": "on"}, "jit on: not for self-critical training"),
    ],
)
def test_settings_that_it_would_not_use_are_refused(setting, message):
    with pytest.raises(InputError, match=message):
        TrainConfig(self_critical=True, **setting)


def test_a_run_from_before_has_no_such_settings():
    values = TrainConfig().to_json()
    for name in ("self_critical", *SELF_CRITICAL_SETTINGS):
        del values[name]
    assert TrainConfig.from_json(values) == TrainConfig()
