"""Runs of self-critical training: from the weights of a run into a new one, stopped and resumed."""

import dataclasses
import functools
import json

import numpy as np
import pytest
from helpers.runs import (
    assert_same_checkpoint,
    read_checkpoint,
    read_history,
    run_training,
    stop_after,
)

import train
from beyond.cider import __main__ as cider
from beyond.cider.self_critical import CiderConfig, SelfCritical, make_reward
from captioning.base.cli import InputError
from captioning.base.files import file_sha256
from captioning.runs.run_folder import VOCABULARY_FILE, best_checkpoint, read_config, restore_weights, write_config
from captioning.training import training_log
from captioning.training.input_pipeline import TrainData
from data_utils import CaptionDataset
from tokenizer import SPECIAL_TOKENS, Tokenizer

SETTINGS = {"epochs": 2, "learning_rate": 3e-3, "ema_decay": 0.5, "dropout": 0.1}
CIDER = CiderConfig(bleu_weight=0.0, cross_entropy_weight=0.0)

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


def train_further(run, data, start, on_step=None, **settings):
    """Starts, or resumes, self-critical training from the weights of a run."""

    def make_objective(config):
        return SelfCritical(config.train, CIDER, make_reward(TrainData(*data), CIDER.bleu_weight))

    restore = functools.partial(restore_weights, best_checkpoint(start))
    build = functools.partial(train.build_train_state, objective=make_objective, start=restore)
    return run_training(run, data, on_step, build, CIDER.to_json(), **SETTINGS | settings)


@pytest.fixture(scope="module")
def start(data, tmp_path_factory):
    """The run to start from."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_log, "plot_history", lambda *_: None)
        return run_training(tmp_path_factory.mktemp("start") / "small", data, epochs=8)


@pytest.fixture(scope="module")
def trained(data, start, tmp_path_factory):
    """Two epochs from it, which no test changes."""
    return train_further(tmp_path_factory.mktemp("trained") / "run", data, start)


@pytest.mark.slow
def test_self_critical_training_raises_the_reward(start, trained):
    rows = read_history(trained)
    assert list(rows[0])[:2] == ["epoch", "train_reward"]
    assert float(rows[1]["train_reward"]) > 1.1 * float(rows[0]["train_reward"]) > 0
    assert read_config(trained).objective == CIDER.to_json()
    assert len(read_history(start)) == 8 and read_config(start).objective == {}, "the start is as it was"


@pytest.mark.slow
def test_self_critical_training_resumes_exactly(data, start, trained, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        train_further(run, data, start, stop_after(9, KeyboardInterrupt))
    train_further(run, data, start)
    assert_same_checkpoint(read_checkpoint(run), read_checkpoint(trained))
    assert read_history(run) == read_history(trained)


@pytest.mark.slow
def test_the_start_stays_the_best_if_no_epoch_is_better(data, start, tmp_path, capsys):
    run = train_further(tmp_path / "run", data, start, epochs=1, learning_rate=1.0)
    best, first = read_checkpoint(run, "best"), read_checkpoint(start, "best")
    kernel = next(key for key in best if "encoder/fc/_kernel" in key and best[key].ndim == 2)
    np.testing.assert_array_equal(best[kernel], first[kernel])
    log = capsys.readouterr().err
    assert "score of the initial weights: CIDEr " in log, "also of few validation images, here 4"
    assert "best: epoch 0" in log


# The command.


@pytest.fixture
def command(dataset, cache, monkeypatch):
    """Runs beyond.cider on the small dataset until the training would begin; returns its arguments."""
    monkeypatch.setattr(train.data_utils, "load_dataset", lambda *_: dataset)
    prepare, found = train.prepare, {"dataset": dataset}
    monkeypatch.setattr(train, "prepare", lambda args: prepare(args, lambda *_: (cache, found["dataset"])))

    def run_command(*argv, dataset=dataset):
        found["dataset"], calls = dataset, []
        monkeypatch.setattr(train, "train", lambda *args: calls.append(args))
        cider.main([*map(str, argv)])
        return calls[0]

    return run_command


def test_command_takes_the_settings_of_the_start(command, run):
    new_run, _, config, _, build, _ = command("--run", run, "--samples", "4")
    assert (new_run, build.keywords["start"].args) == (run.with_name("small_cider"), (best_checkpoint(run),))
    expected = json.loads((run / "config.json").read_text())
    rates = {name: cider.RECIPE[name] for name in ("dropout", "feature_dropout")}
    assert config.model.to_json() == expected["model"] | rates
    assert config.objective == CiderConfig(samples=4).to_json()
    assert config.train.learning_rate == cider.RECIPE["learning_rate"]
    assert config.features == expected["features"] | {"folder": config.features["folder"]}


def test_command_takes_the_words_of_the_start(command, run, tokenizer):
    """Which has more of them, and in another order than its captions give, if it was trained with --keep-words."""
    words = Tokenizer((*SPECIAL_TOKENS, "unseen", *reversed(tokenizer.index_word[4:])))
    words.save(run / VOCABULARY_FILE)
    config = read_config(run)
    model = dataclasses.replace(config.model, vocab_size=len(words))
    with pytest.raises(InputError, match="not the vocabulary of this run"):
        command("--run", run)
    sha256 = file_sha256(run / VOCABULARY_FILE)
    write_config(run, dataclasses.replace(config, model=model, vocabulary_sha256=sha256))
    _, data, config, *_ = command("--run", run)
    assert data.tokenizer.index_word == words.index_word and config.model.vocab_size == len(words)
    assert read_config(run.with_name("small_cider")).vocabulary_sha256 == sha256


def test_command_refuses_other_data(command, run, dataset):
    fewer = CaptionDataset("small", dataset.image_dir, dataset.examples[1:])
    with pytest.raises(InputError, match="was trained on other images or captions; expected the same"):
        command("--run", run, dataset=fewer)


def test_command_refuses_hard_attention(command, run, run_config):
    model = dataclasses.replace(run_config.model, attention="hard")
    write_config(run, dataclasses.replace(read_config(run), model=model))
    with pytest.raises(InputError, match="expected a run with soft attention, found hard attention"):
        command("--run", run)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ([], "the following arguments are required: --run"),
        (["--run", "none"], "not a run folder"),
    ],
)
def test_command_says_what_belongs_to_it(argv, message, capsys):
    with pytest.raises((InputError, SystemExit)) as error:
        cider.main(argv)
    assert message in str(error.value) + capsys.readouterr().err
