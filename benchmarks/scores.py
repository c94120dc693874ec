"""Trains and scores the rows of docs/results.md, and prints them as a table.

    python -m benchmarks.scores -- --annotations captions.csv --images photos/       # all rows, which takes hours
    python -m benchmarks.scores --rows best,paper --seeds 0,1 -- DATA                # two seeds tell what is chance

What follows -- are options of train.py that all trainings get: the data, and where their features are. Every row is a
training (`--recipe best --epochs 8`), or one that continues from the weights of another row; it is scored on the
validation images with every beam: 5:0.85 is one of five with a --length-penalty of 0.85, `consensus` that of --choose
consensus. The runs are kept in --runs-dir, and the table is written there too, as scores.md and scores.json. Stopped
and run again, the command continues; runs and scores that are complete are taken as they are.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from captioning.base.cli import InputError, log, make_parser, run_main
from captioning.base.files import atomic_write, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import DecodeConfig
from captioning.runs.run_folder import latest_checkpoint
from captioning.training.training_log import read_history

ROOT = Path(__file__).resolve().parents[1]
CONSENSUS = DecodeConfig(choose="consensus")
COLUMNS = ("BLEU-1", "BLEU-2", "BLEU-3", "BLEU-4", "METEOR", "CIDEr")
RATIOS = ("distinct captions", "copied captions", "end in mid-sentence")


class Row(NamedTuple):
    """A training of the table."""

    options: str
    start: str | None = None  # the row whose weights it starts from
    command: str = "train"
    suffix: str = ""  # of the run folder, after that of the start


ROWS = {
    "tutorial": Row("--epochs 6"),
    "best": Row("--recipe best --epochs 8"),
    "image": Row("--recipe best --shuffle-by image --epochs 8"),
    "paper": Row("--recipe best --decoder paper --epochs 8"),
    "paper-lstm": Row("--recipe best --decoder paper-lstm --epochs 8"),
    "hard": Row("--recipe best --attention hard --epochs 8"),
    "best-cider": Row("", "best", "beyond.cider", "_cider"),
    "paper-cider": Row("", "paper", "beyond.cider", "_cider"),
    "best-cnn": Row("", "best", "beyond.finetune", "_cnn"),
    "best-cnn-cider": Row("", "best-cnn", "beyond.cider", "_cider"),
}


def names(text: str) -> list[str]:
    """Parses names of rows, separated by commas."""
    rows = text.split(",")
    if unknown := [name for name in rows if name not in ROWS]:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(ROWS)}, found {unknown[0]!r}")
    return rows


def numbers(text: str) -> list[int]:
    """Parses whole numbers, separated by commas."""
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"expected whole numbers separated by commas, found {text!r}")
    return [int(part) for part in text.split(",")]


def beams(text: str) -> list[DecodeConfig]:
    """Parses beams, separated by commas, each a width, WIDTH:PENALTY or `consensus`."""
    matches = [re.fullmatch(r"(\d+)(?::(\d+(?:\.\d+)?))?|consensus", part) for part in text.split(",")]
    if not all(matches):
        raise argparse.ArgumentTypeError(f"expected widths, WIDTH:PENALTY or consensus, by commas, found {text!r}")
    groups = [match.groups() for match in matches if match]
    return [DecodeConfig(int(width), float(penalty or 1)) if width else CONSENSUS for width, penalty in groups]


def beam_name(beam: DecodeConfig) -> str:
    """Returns what `beams` parses: the width, and the length penalty if it is not 1; or `consensus`."""
    if beam.choose != "probability":
        return beam.choose
    return f"{beam.beam_size}" if beam.length_penalty == 1 else f"{beam.beam_size}:{beam.length_penalty:g}"


def run_command(module: str, *args: str) -> None:
    """Runs a command of the project; raises InputError if it fails, which it has explained."""
    log(f"$ python -m {module} {' '.join(args)}")
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    if code := subprocess.run([sys.executable, "-m", module, *args], env=environment).returncode:
        raise InputError(f"{module} ended with code {code}: see above; run the same command again to continue")


def run_folder(runs_dir: Path, name: str, seed: int) -> Path:
    """Returns where the run of a row and a seed is."""
    row = ROWS[name]
    if not row.start:
        return runs_dir / f"{name}_{seed}"
    start = run_folder(runs_dir, row.start, seed)
    return start.with_name(f"{start.name}{row.suffix}")


def train_row(runs_dir: Path, name: str, seed: int, data: list[str]) -> Path:
    """Trains a row, and what it starts from, as far as they are not trained yet; returns its run folder."""
    run, row = run_folder(runs_dir, name, seed), ROWS[name]
    if (run / "done").exists():
        return run
    options = [*row.options.split(), "--seed", str(seed)]
    if row.start:
        start = train_row(runs_dir, row.start, seed, data)
        run_command(row.command, *options, "--run", str(start))
    else:
        run_command(row.command, *data, *options, "--run", str(run))
    (run / "done").touch()
    return run


def score(run: Path, beam: DecodeConfig) -> dict[str, Any]:
    """Scores a run with a beam, unless it has been scored since it was trained; returns its metrics."""
    path = run / f"metrics_val{beam.suffix}.json"
    if not path.exists() or path.stat().st_mtime < (run / "done").stat().st_mtime:
        options = ["--beam-size", str(beam.beam_size), "--length-penalty", f"{beam.length_penalty:g}"]
        options += ["--choose", beam.choose]
        run_command("evaluate", "--run", str(run), *options)
    return json.loads(path.read_text(encoding="utf-8"))


def describe(name: str, seed: int, run: Path, beam: DecodeConfig) -> dict[str, Any]:
    """Returns a line of the table: what was trained for how long, which epoch was the best, and its scores."""
    metrics = score(run, beam)
    history = read_history(run / "history.csv")
    checkpoint = tf.train.load_checkpoint(latest_checkpoint(run / "checkpoints/last"))
    return {
        "row": name,
        "options": ROWS[name].options,
        "seed": seed,
        "beam": beam_name(beam),
        "best epoch": int(checkpoint.get_tensor("progress/best_epoch/.ATTRIBUTES/VARIABLE_VALUE")),  # 0: the start
        "epochs": len(history),
        "minutes": round(sum(float(row["train_seconds"]) for row in history) / 60, 1),
        **{column: metrics["scores"].get(column) for column in COLUMNS},
        **{ratio: metrics.get(ratio) for ratio in RATIOS},
    }


def to_markdown(lines: list[dict[str, Any]]) -> str:
    """Formats the lines as a table; the BLEUs share a column, and repeated names are left out."""
    header = ["`train.py` DATA and", "seed", "best epoch", "minutes", "beam", "BLEU-1 / 2 / 3 / 4", "METEOR", "CIDEr"]
    table = [[*header, "distinct", "copied", "mid-sentence"]]
    previous: tuple = ()
    for line in lines:
        training = (line["row"], line["seed"])
        bleu = " / ".join(f"{line[f'BLEU-{n}']:.1f}" for n in range(1, 5))
        others = (line[column] for column in ("METEOR", "CIDEr", *RATIOS))
        cells = [f"`{line['options']}`", str(line["seed"]), f"{line['best epoch']} of {line['epochs']}"]
        cells = [*cells, f"{line['minutes']:.0f}"] if training != previous else [""] * 4
        table.append([*cells, line["beam"], bleu, *("" if value is None else f"{value:.1f}" for value in others)])
        previous = training
    table.insert(1, ["---"] * len(table[0]))
    return "".join(f"| {' | '.join(cells)} |\n" for cells in table)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__, usage="[option ...] -- [option of train.py ...]")
    every = ",".join(ROWS)
    parser.add_argument("--rows", type=names, default=list(ROWS), metavar="NAMES", help=f"of {every} (default: all)")
    parser.add_argument("--seeds", type=numbers, default=[0], metavar="N,N", help="seeds of the trainings (default: 0)")
    text = "widths to score, with a length penalty if it is not 1, or consensus (default: %(default)s)"
    parser.add_argument("--beams", type=beams, default="1,5,5:0.85,consensus", metavar="N,N:P", help=text)
    text = "folder of the runs and the table (default: %(default)s)"
    parser.add_argument("--runs-dir", type=Path, default=Path("runs/scores"), metavar="DIR", help=text)
    parser.add_argument("data", nargs="*", metavar="OPTION", help="of train.py, after --: the data and their features")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Trains and scores the rows, and writes the table after each."""
    args = parse(argv)
    lines: list[dict[str, Any]] = []
    for name in args.rows:
        for seed in args.seeds:
            run = train_row(args.runs_dir, name, seed, args.data)
            lines += [describe(name, seed, run, beam) for beam in args.beams]
            write_json(args.runs_dir / "scores.json", lines)
            with atomic_write(args.runs_dir / "scores.md") as file:
                file.write(to_markdown(lines))
    print(to_markdown(lines), end="")


if __name__ == "__main__":
    run_main(main)
