"""The benchmark of scores: which trainings it starts, what it takes as done, and its table. Nothing is trained here."""

import csv
import json
import os

import pytest

from benchmarks import scores
from captioning.base.cli import InputError
from captioning.training.training_log import COLUMNS, REWARD_COLUMNS

DATA = ["--annotations", "captions.csv"]


@pytest.fixture
def commands(monkeypatch):
    """The commands that were run, in the place of which runs and metrics are written."""
    seen = []

    def run_script(script, *args):
        seen.append((script, *args))
        run = scores.Path(args[args.index("--run") + 1])
        if script == "evaluate.py":
            beam = int(args[args.index("--beam-size") + 1])
            penalty = float(args[args.index("--length-penalty") + 1])
            names = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "CIDEr")
            metrics = {
                "scores": {name: beam + i + penalty - 0.96 for i, name in enumerate(names)},
                "distinct captions": 91.2,
            }
            suffix = "_beam5" * (beam == 5) + f"_penalty{penalty:g}" * (penalty != 1)
            (run / f"metrics_val{suffix}.json").write_text(json.dumps(metrics))
            return
        is_self_critical = "--self-critical" in args
        run = run.with_name(f"{run.name}_cider") if is_self_critical else run
        run.mkdir(parents=True)
        with open(run / "history.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, REWARD_COLUMNS if is_self_critical else COLUMNS)
            writer.writeheader()
            for epoch, cider in enumerate((30, 40, 35), 1):
                writer.writerow(
                    dict.fromkeys(writer.fieldnames, 1) | {"epoch": epoch, "cider": cider, "train_seconds": 80}
                )

    monkeypatch.setattr(scores, "run_script", run_script)
    return seen


def test_rows_are_trained_once_and_scored_with_every_beam(commands, tmp_path, capsys):
    argv = ["--rows", "best-cider,best", "--seeds", "0,1", "--beams", "1,5,5:0.5"]
    argv = [*argv, "--runs-dir", str(tmp_path), "--", *DATA]
    scores.main(argv)
    trainings = [command for command in commands if command[0] == "train.py"]
    best, cider = ["--recipe", "best", "--epochs", "8"], ["--self-critical"]
    assert [list(command[1:]) for command in trainings] == [
        [*DATA, *best, "--seed", "0", "--run", str(tmp_path / "best_0")],
        [*cider, "--seed", "0", "--run", str(tmp_path / "best_0")],
        [*DATA, *best, "--seed", "1", "--run", str(tmp_path / "best_1")],
        [*cider, "--seed", "1", "--run", str(tmp_path / "best_1")],
    ]
    assert len(commands) == len(trainings) + 12, "4 runs, 3 beams"
    table = capsys.readouterr().out
    assert table == (tmp_path / "scores.md").read_text(encoding="utf-8")
    lines = table.splitlines()
    assert len(lines) == 2 + 12
    assert lines[2] == ("| `--self-critical` | 0 | 2 of 3 | 4 | 1 | 1.0 / 2.0 / 3.0 / 4.0 | 5.0 | 6.0 | 91.2 |  |")
    assert lines[3] == "|  |  |  |  | 5 | 5.0 / 6.0 / 7.0 / 8.0 | 9.0 | 10.0 | 91.2 |  |"
    assert lines[4] == "|  |  |  |  | 5:0.5 | 4.5 / 5.5 / 6.5 / 7.5 | 8.5 | 9.5 | 91.2 |  |"
    assert {line.count("|") for line in lines} == {11}

    del commands[:]
    scores.main(argv)
    assert commands == [], "all is done"
    os.utime(tmp_path / "best_0/metrics_val.json", (0, 0))
    scores.main(argv)
    assert [command[0] for command in commands] == ["evaluate.py"], "of before the training"


def test_a_training_that_fails_is_not_taken_as_done(monkeypatch, tmp_path):
    def fail(*_):
        raise InputError("train.py ended with code 2")

    monkeypatch.setattr(scores, "run_script", fail)
    with pytest.raises(InputError):
        scores.main(["--rows", "best", "--runs-dir", str(tmp_path)])
    assert not list(tmp_path.rglob("done"))


def test_run_script_reports_the_code():
    with pytest.raises(InputError, match=r"tokenizer.py ended with code 2: see above"):
        scores.run_script("tokenizer.py", "--no-such-option")


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--rows", "best,bets", "expected some of tutorial,best"),
        ("--beams", "5:", "expected widths or WIDTH:PENALTY separated by commas, found '5:'"),
        ("--seeds", "0,x", "expected whole numbers separated by commas, found '0,x'"),
    ],
)
def test_options_are_checked(option, value, message, capsys):
    with pytest.raises(SystemExit):
        scores.main([option, value])
    assert message in capsys.readouterr().err
