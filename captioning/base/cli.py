"""What a script needs to be a command: parser, messages, progress bars, and failures in one line."""

import argparse
import contextlib
import errno
import functools
import io
import math
import os
import re
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

from tqdm import tqdm

# In messages of TensorFlow, XLA, CUDA, cuDNN and cuBLAS. NOT_INITIALIZED: a library found no memory to start with.
FULL_MEMORY = re.compile(
    "OOM when allocating|Out of memory|OUT_OF_MEMORY|failed to allocate memory|Dst tensor is not initialized"
    "|STATUS_ALLOC_FAILED|STATUS_NOT_INITIALIZED"
)
OF_GPU = re.compile("GPU|CUDA|CUDNN|CUBLAS|Dst tensor")
# Of a terminal, what ends a line or a column, and what turns the direction of text.
CONTROLS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069]")


class InputError(Exception):
    """A mistake in the user's input, as one line: what was expected, what was found, and what to do about it."""


class Verbosity:
    """How much the scripts print; `--quiet` sets it."""

    quiet = False


def escape_controls(text: object) -> str:
    r"""Returns a text with control characters as `\x1b`: the name of a file could steer a terminal, or add a line."""
    return CONTROLS.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def log(message: str, error: bool = False) -> None:
    """Prints a message to standard error, so that standard output holds only results; `--quiet` leaves only errors."""
    if error or not Verbosity.quiet:
        tqdm.write(escape_controls(message), file=sys.stderr)  # above a progress bar, if there is one
        sys.stderr.flush()


log_once = functools.cache(log)  # for what a command may find several times


def print_results(*fields: object, sep: str = " ") -> None:
    """Prints a result to standard output, above a progress bar if there is one, as `print` does."""
    with name_in_errors("standard output"):
        tqdm.write(sep.join(map(escape_controls, fields)), file=sys.stdout)
        sys.stdout.flush()


@contextlib.contextmanager
def name_in_errors(path: Path | str) -> Iterator[None]:
    """Adds the name of a file to an error that has none, as that of a full disk while the file is written."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


# The command line.


class Command:
    """The command that runs."""

    options: frozenset[str] = frozenset()  # such as --run; none if the project is used from Python


class _Parser(argparse.ArgumentParser):
    """A parser that notes the options of the command."""

    def parse_known_args(self, *args: Any, **kwargs: Any) -> Any:
        Command.options = frozenset(self._option_string_actions)
        return super().parse_known_args(*args, **kwargs)

    def error(self, message: str) -> NoReturn:
        super().error(escape_controls(message))


def advise(text: str) -> str:
    """Returns advice for a message, or an empty text if it names an option that the command does not have."""
    return text if Command.options.issuperset(re.findall(r"--[a-z-]+", text)) else ""


def command_name() -> str:
    """Returns what help and messages call the command: a script's file name, or the module of `python -m`."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)  # None for a script
    if spec and spec.origin == sys.argv[0]:
        return spec.name.removesuffix(".__main__")
    return Path(sys.argv[0]).name


def make_parser(description: str | None, usage: str = "[option ...]") -> argparse.ArgumentParser:
    """Makes a parser whose --help shows a script's docstring, with its examples."""
    name = command_name()
    return _Parser(
        prog=name if name.endswith(".py") else f"python -m {name}",
        description=description,
        usage=f"%(prog)s {usage}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,  # an option that is added later would change what an abbreviation means
    )


def add_quiet_option(parser: argparse._ActionsContainer) -> None:
    """Adds the option `--quiet`."""

    class Quiet(argparse.Action):
        def __call__(self, *_):
            Verbosity.quiet = True

    parser.add_argument("--quiet", action=Quiet, nargs=0, help="print only results and errors")


def int_at_least(minimum: int) -> Callable[[str], int]:
    """Returns an argparse type: a whole number that is not less than `minimum`."""

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
        return int(text)

    return parse


def run_main(main: Callable[[], None]) -> None:
    """Runs a script's main and turns its failures into one line and an exit code.

    Exit codes: 2 for bad input, a missing file or a full disk; 130 for Ctrl-C; 0 otherwise.
    """
    name = command_name()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an image's name need not be Unicode
    try:
        main()
    except InputError as error:
        log(f"{name}: {' '.join(str(error).splitlines())}", error=True)  # what was found may hold line ends
        sys.exit(2)
    except BrokenPipeError:  # `python inference.py *.jpg | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        hint = "; free some space and run the same command again, it continues" * (error.errno == errno.ENOSPC)
        where = f"{error.filename}: " if error.filename else ""
        log(f"{name}: {where}{error.strerror or error}{hint}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        log("", error=True)  # the terminal has shown ^C
        log(f"{name}: stopped; run the same command again to continue", error=True)
        sys.exit(130)
    except Exception as error:  # TensorFlow's, by their text, since this module does not import it
        message = explain_full_memory(error)
        if not message:
            raise
        log(f"{name}: {message}", error=True)
        sys.exit(2)


def first_line(error: Exception) -> str:
    """Returns the first line of an error of a library, which may have many."""
    return str(error).strip().split("\n")[0][:200]


def explain_full_memory(error: Exception) -> str | None:
    """Returns a line for an error that says that memory is full, and None for any other."""
    text = str(error)
    if not isinstance(error, MemoryError) and not FULL_MEMORY.search(text):
        return None
    where, others = ("the GPU", " (nvidia-smi lists them)") if OF_GPU.search(text) else ("this machine", "")
    smaller = advise("give a smaller --batch-size in another --run, or ") or advise(
        "give a smaller --cnn-batch-size, or "
    )
    saved = advise("; it continues from the last checkpoint, see --checkpoint-minutes")
    return (
        f"the memory of {where} is full; {smaller}end other processes that use it{others} and run the same command "
        f"again{saved}"
    )


def end_signals() -> list[int]:
    """Returns the signals that ask to stop: Ctrl-C, SIGTERM of a cluster, SIGHUP of a closed terminal.

    One that is ignored stays so, as SIGHUP under nohup. Windows has no SIGHUP.
    """
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    return [number for number in numbers if signal.getsignal(number) != signal.SIG_IGN]


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Delays `end_signals` to the end of the block, so that what belongs together is saved together."""
    received: list[int] = []
    handlers = {number: signal.signal(number, lambda number, _: received.append(number)) for number in end_signals()}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise KeyboardInterrupt


# Progress.


class _LineStream:
    """Standard error for a progress bar in a pipe or a file: a line now and then, without control characters."""

    def write(self, text: str) -> None:
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


def progress_bar(*args: Any, disable: bool = False, **kwargs: Any) -> tqdm:
    """Makes a tqdm bar on standard error; in a pipe or a file it prints one line every half minute."""
    is_live = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")  # Jupyter and Colab
    interval = 0.1 if sys.stderr.isatty() else 0.5 if is_live else 30.0
    kwargs |= {"mininterval": interval, "maxinterval": interval, "dynamic_ncols": is_live}
    if not is_live:
        kwargs |= {"file": _LineStream(), "ascii": True, "ncols": 100}
    return tqdm(*args, disable=disable or Verbosity.quiet, **kwargs)


class FirstRate:
    """Measures, once, how fast a loop is in its first seconds, without its first step, which builds a graph."""

    seconds = 10.0

    def __init__(self) -> None:
        self._start: tuple[float, float] | None = None  # when the first step had ended, and what was done then

    def measure(self, done: float) -> float:
        """Returns what is done per second, when enough seconds have passed; 0 before, and ever after."""
        now = time.monotonic()
        start, done_then = self._start = self._start or (now, done)
        if now - start < self.seconds:
            return 0.0
        self._start = (math.inf, 0.0)
        return (done - done_then) / (now - start)


@contextlib.contextmanager
def suppress_stderr() -> Iterator[None]:
    """Holds back what TensorFlow's libraries write to standard error as they load, unless the block fails."""
    if os.environ.get("TF_CPP_MIN_LOG_LEVEL") != "3":
        yield
        return
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held_back:
        os.dup2(held_back.fileno(), 2)
        try:
            yield
        except BaseException:
            held_back.seek(0)
            os.write(original, held_back.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)


def format_bytes(size: float) -> str:
    """Formats a number of bytes for people: `1.6 GB` or `25 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{math.ceil(size / 1e6)} MB"


def format_seconds(seconds: float) -> str:
    """Formats a duration for people: `40 s`, `5 min` or `2.5 h`."""
    if seconds <= 60:
        return f"{math.ceil(seconds)} s"
    return f"{seconds / 3600:.1f} h" if seconds >= 7200 else f"{math.ceil(seconds / 60)} min"
