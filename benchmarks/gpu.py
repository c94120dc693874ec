"""Checks the suite on a machine with a GPU, in at most ten minutes: that it works, that it is right, how fast it is.

    python benchmarks/gpu.py                              # all checks
    python benchmarks/gpu.py --only numbers variants      # some of them
    python benchmarks/gpu.py --small                      # tiny sizes, on any machine: only whether the checks run

Every check has its own process and time limit, so that one that crashes or hangs costs no other. `numbers` and
`captions` also run on the CPU, with which the GPU is compared. Everything is written into a temporary folder. A table
comes first; the last line is JSON: please add it to a report. The exit code is 1 if a check has failed.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

PROJECT = Path(__file__).resolve().parents[1]
MINUTES = 10
WITHOUT_GPU = {"CUDA_VISIBLE_DEVICES": "-1"}


class Check(NamedTuple):
    """A check of benchmarks/gpu_checks.py."""

    name: str
    seconds: int  # its time limit
    compares: bool = False  # with the CPU, where it runs first
    needs_gpu: bool = False
    is_long: bool = False  # left out with --small


CHECKS = (
    Check("device", 60),
    Check("numbers", 120, compares=True),
    Check("variants", 240),
    Check("training", 150),
    Check("search", 60),
    Check("features", 90),
    Check("memory", 90, needs_gpu=True),
    Check("resume", 120, is_long=True),
    Check("demo", 240, is_long=True),
    Check("captions", 60, compares=True, is_long=True),
    Check("several", 120, needs_gpu=True),
    Check("xla", 150),  # last, since it takes long
)

Row = dict[str, Any]  # check, what, value, expected and passed, the last two None where there is nothing to expect


def run_check(check: Check, folder: Path, small: bool, seconds: float, reference: bool = False) -> list[Row]:
    """Runs a check in a process of its own, on the CPU for a reference; one that fails has a row that says so."""
    command = [sys.executable, "-m", "benchmarks.gpu_checks", check.name, str(folder)]
    if small:
        command.append("--small")
    if reference:
        command.append("--reference")

    def failure(reason: str) -> list[Row]:
        return [{"check": check.name, "what": "runs", "value": reason, "expected": "no error", "passed": False}]

    log = folder / f"{check.name}.log"
    with log.open("a+") as stderr:
        try:
            result = subprocess.run(
                command,
                cwd=PROJECT,
                env=os.environ | (WITHOUT_GPU if reference else {}),
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return failure(f"not done after {seconds:.0f} s")
    lines = log.read_text(errors="replace").strip().splitlines()
    if result.returncode:
        return failure(lines[-1][:200] if lines else f"exit code {result.returncode}")
    return [{"check": check.name, **row} for row in json.loads(result.stdout.splitlines()[-1])]


def format_row(row: Row) -> str:
    """Formats a row of the table."""
    mark = {True: "ok", False: "FAILED", None: ""}[row["passed"]]
    expected = "" if row["expected"] is None else f"expected {row['expected']}"
    return f"{row['check']:9} {row['what']:52} {row['value']!s:>16}  {mark:6} {expected}".rstrip()


def run_checks(names: list[str], small: bool) -> list[Row]:
    """Runs checks one after the other, as long as there is time, and prints their rows as they come."""
    rows: list[Row] = []
    start = time.monotonic()

    def add(new_rows: list[Row]) -> None:
        rows.extend(new_rows)
        for row in new_rows:
            print(format_row(row), flush=True)

    def leave_out(check: Check, reason: str) -> None:
        add([{"check": check.name, "what": "left out", "value": reason, "expected": None, "passed": None}])

    def run_one(check: Check, folder: Path) -> None:
        seconds = 60 * MINUTES - (time.monotonic() - start)
        if small and check.is_long:
            return leave_out(check, "--small")
        if check.needs_gpu and any(row["what"] == "GPU" and row["value"] == "none" for row in rows):
            return leave_out(check, "no GPU")
        if seconds < 15:
            return leave_out(check, f"{MINUTES} minutes are over")
        limit = min(seconds, check.seconds)
        reference = run_check(check, folder, small, limit, reference=True) if check.compares else []
        failed = any(row["passed"] is False for row in reference)
        return add(reference if failed else run_check(check, folder, small, limit))

    with tempfile.TemporaryDirectory() as name:
        for check in CHECKS:
            if check.name in names:
                run_one(check, Path(name))
    return rows


def main(argv: list[str] | None = None) -> None:
    """Runs the checks; exits with 1 if one has failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    names = [check.name for check in CHECKS]
    parser.add_argument(
        "--only", nargs="+", choices=names, metavar="CHECK", help=f"some of {', '.join(names)} (default: all)"
    )
    parser.add_argument("--small", action="store_true", help="tiny sizes, of which no figure means anything")
    args = parser.parse_args(argv)
    selected = names if args.only is None else ["device", *args.only]
    rows = run_checks(selected, args.small)
    num_failed = sum(row["passed"] is False for row in rows)
    num_passed = sum(row["passed"] is True for row in rows)
    print(f"{num_passed} checks passed, {num_failed} failed")
    print(json.dumps({"small": args.small, "rows": rows}))
    sys.exit(int(num_failed > 0))


if __name__ == "__main__":
    main()
