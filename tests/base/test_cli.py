"""What makes a script a command: help pages, messages, exit codes and progress bars."""

import errno
import importlib
import io
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from captioning.base import cli
from captioning.base.cli import InputError, Verbosity, run_main

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "captioning.data.shapes": "python -m captioning.data.shapes",
    **{f"beyond.{name}.__main__": f"python -m beyond.{name}" for name in ("export", "serve")},
    **{
        name: f"python {name}.py"
        for name in ("data_utils", "demo", "evaluate", "features", "inference", "model", "tokenizer", "train")
    },
}


# Help pages.


@pytest.mark.parametrize("module", COMMANDS)
def test_help_has_examples_whose_options_exist(module, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit) as end:
        importlib.import_module(module).main(["--help"])
    assert end.value.code == 0
    page = capsys.readouterr().out
    examples = re.findall(rf"^    {re.escape(COMMANDS[module])}(.*?)(?: {{2,}}#.*)?$", page, re.MULTILINE)
    assert len(examples) >= 2
    for option in re.findall(r"--[\w-]+", " ".join(examples)):
        assert re.search(rf"^  {option}\b", page, re.MULTILINE), f"an example has {option}, which does not exist"


@pytest.mark.parametrize("text", ["0", "1.5"])
def test_int_at_least_refuses_other_values(text, capsys):
    parser = cli.make_parser("Does something.")
    parser.add_argument("--number", type=cli.int_at_least(1))
    assert parser.parse_args(["--number", "1"]).number == 1
    with pytest.raises(SystemExit):
        parser.parse_args([f"--number={text}"])
    assert f"expected a whole number of at least 1, found {text!r}" in capsys.readouterr().err


# Messages.


def test_advise_names_only_options_of_the_command():
    assert cli.advise("; use --number") == "" and cli.advise("; free some") == "; free some"
    parser = cli.make_parser("Does something.")
    parser.add_argument("--number")
    parser.parse_args([])
    assert cli.advise("; use --number N or --quiet") == ""
    assert cli.advise("; use --number N") == "; use --number N"


def test_log_goes_to_standard_error_and_quiet_leaves_errors(capsys):
    parser = cli.make_parser("Does something.")
    cli.add_quiet_option(parser)
    parser.parse_args([])
    cli.log("progress")
    assert capsys.readouterr() == ("", "progress\n")
    parser.parse_args(["--quiet"])
    cli.log("progress")
    assert list(cli.progress_bar(range(3))) == [0, 1, 2]
    cli.log("failure", error=True)
    assert capsys.readouterr() == ("", "failure\n")


def test_control_characters_are_escaped_wherever_text_is_printed(capsys):
    hostile, shown = "ü\x1b[2J\tb\nc\x9b\u2028d\r", r"ü\x1b[2J\tb\nc\x9b\u2028d\r"
    cli.log(hostile)
    cli.print_results(hostile, 1, sep="\t")
    assert capsys.readouterr() == (f"{shown}\t1\n", f"{shown}\n")
    with pytest.raises(SystemExit):
        cli.make_parser("Does something.").parse_args([f"--{hostile}"])
    assert f"unrecognized arguments: --{shown}\n" in capsys.readouterr().err


# Exit codes.


def run(main, monkeypatch):
    """Returns the exit code of `run_main` in a script with the name script.py."""
    monkeypatch.setattr(sys, "argv", ["/some/where/script.py"])
    try:
        run_main(main)
    except SystemExit as end:
        return end.code
    return 0


@pytest.mark.parametrize(
    ("error", "code", "message"),
    [
        (InputError("expected one,\nfound\r\ntwo"), 2, "script.py: expected one, found two\n"),
        (OSError("cannot read"), 2, "script.py: cannot read\n"),
        (
            OSError(errno.ENOSPC, "No space left on device", "x"),
            2,
            "script.py: x: No space left on device; free some space and run the same command again, it continues\n",
        ),
        (KeyboardInterrupt(), 130, "\nscript.py: stopped; run the same command again to continue\n"),
    ],
)
def test_run_main_turns_failures_into_one_line_and_an_exit_code(error, code, message, monkeypatch, capsys):
    def main():
        raise error

    monkeypatch.setattr(Verbosity, "quiet", True)
    assert run(main, monkeypatch) == code
    assert capsys.readouterr() == ("", message)


def test_run_main_succeeds_and_hides_no_bugs(monkeypatch, capsys):
    assert run(lambda: print("result"), monkeypatch) == 0
    assert capsys.readouterr() == ("result\n", "")
    with pytest.raises(ZeroDivisionError):
        run(lambda: 1 / 0, monkeypatch)


def run_python(code, **kwargs):
    """Starts Python on some code, in the project's root."""
    return subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs
    )


def test_run_main_ends_well_if_nobody_reads_its_output():
    code = "from captioning.base import cli\ncli.run_main(lambda: [print('line', flush=True) for _ in range(100_000)])"
    with run_python(code) as process:
        assert process.stdout.readline().strip() == b"line"
        process.stdout.close()  # as `| head -1` does
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_run_main_prints_names_that_are_not_unicode():
    code = "from captioning.base.cli import run_main\nrun_main(lambda: print('caf\\udce9.png'))"
    with run_python(code, env={**os.environ, "PYTHONIOENCODING": "utf-8"}) as process:
        output, errors = process.communicate()
    assert (process.returncode, output.strip(), errors) == (0, rb"caf\udce9.png", b"")


# Progress.


def test_progress_bar_is_live_in_a_notebook_only(monkeypatch):
    notebook_stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    for stream, is_live in ((notebook_stream(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", stream)
        with cli.progress_bar(total=1) as bar:
            assert (bar.mininterval < 1) == is_live


def test_progress_bar_in_a_pipe_writes_lines_without_control_characters(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    assert list(cli.progress_bar(range(1000), desc="counting")) == list(range(1000))
    lines = stream.getvalue().splitlines()
    assert 1 <= len(lines) <= 2 and lines[-1].startswith("counting: 100%"), "at the beginning and at the end"
    assert stream.getvalue().replace("\n", "").isprintable() and stream.getvalue().isascii()


def test_suppress_stderr_holds_back_unless_the_block_fails(capfd, monkeypatch):
    monkeypatch.setenv("TF_CPP_MIN_LOG_LEVEL", "3")
    with cli.suppress_stderr():
        os.write(2, b"of a library\n")
    assert capfd.readouterr().err == ""
    with pytest.raises(ZeroDivisionError), cli.suppress_stderr():
        os.write(2, b"the reason\n")
        raise ZeroDivisionError
    assert capfd.readouterr().err == "the reason\n"


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (RuntimeError("OOM when allocating tensor on /device:GPU:0 by allocator GPU_0_bfc"), "the memory of the GPU"),
        (RuntimeError("Failed copying: Dst tensor is not initialized."), "(nvidia-smi lists them)"),
        (RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED"), "the memory of the GPU is full; give a smaller --batch-size"),
        (MemoryError(), "the memory of this machine is full"),
    ],
)
def test_run_main_says_that_memory_is_full(error, expected, all_options, capsys):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        run_main(main)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and expected in message and message.count("\n") == 1


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.2, "1 s"), (60, "60 s"), (61, "2 min"), (7199, "120 min"), (9000, "2.5 h")]
)
def test_format_seconds_has_the_unit_that_people_would_choose(seconds, expected):
    assert cli.format_seconds(seconds) == expected


def test_first_rate_is_told_once_and_without_the_first_step(monkeypatch):
    times = iter((100.0, 109.0, 112.0, 130.0))
    monkeypatch.setattr(cli.time, "monotonic", lambda: next(times))
    rate = cli.FirstRate()
    assert [rate.measure(done) for done in (1000, 1008, 1024, 1099)] == [0, 0, 2, 0]
