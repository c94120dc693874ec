"""What every script shares: the error for a user's mistake, the way a command ends, and safe writing.

Nothing here knows of pictures, captions or TensorFlow.
"""

import argparse
import contextlib
import errno
import hashlib
import io
import json
import logging
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from tqdm import tqdm

# TensorFlow's C++ messages (CPU features, "cuInit failed" where there is no GPU) would bury ours; its Python
# errors still show. It reads this when it is imported, so this module comes before it.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
logging.getLogger("tensorflow").setLevel(logging.ERROR)  # beside our line on a damaged checkpoint it has ten of its own


class InputError(Exception):
    """A mistake in what the user gave: one line saying what was expected, what was found, what to do."""


class Talk:
    """Whether scripts say what they do; `--quiet` turns it off."""

    wanted = True


def make_parser(page: str | None, usage: str = "[option ...]", **kwargs: Any) -> argparse.ArgumentParser:
    """A parser whose --help is a page: what the script does, with examples, and its options in groups."""
    kind = argparse.RawDescriptionHelpFormatter
    return argparse.ArgumentParser(description=page, usage=f"%(prog)s {usage}", formatter_class=kind, **kwargs)


def add_setting(group: argparse._ActionsContainer, name: str, value: Any, text: str, **kind: Any) -> None:
    """An option for a setting, with its value as the default."""
    if "choices" not in kind:
        kind = {"metavar": "N" if isinstance(value, int) else "X"} | kind
    option, text = f"--{name.replace('_', '-')}", f"{text} (default: %(default)s)"
    group.add_argument(option, type=type(value), default=value, help=text, **kind)


def add_settings(group: argparse._ActionsContainer, config: Any, texts: dict[str, str]) -> None:
    """Options for these fields of a dataclass of settings, with its values as the defaults."""
    for name, text in texts.items():
        add_setting(group, name, getattr(config, name), text)


def add_quiet(parser: argparse._ActionsContainer) -> None:
    """The option `--quiet`."""

    class Quiet(argparse.Action):
        def __call__(self, *_):
            Talk.wanted = False

    parser.add_argument("--quiet", action=Quiet, nargs=0, help="say nothing but results and errors")


def say(message: str, error: bool = False) -> None:
    """Prints talk to standard error, so that standard output holds only results."""
    if Talk.wanted or error:
        print(message, file=sys.stderr, flush=True)


def at_least(minimum: int) -> Callable[[str], int]:
    """An argparse type: a whole number that is not less than `minimum`."""

    def whole_number(text: str) -> int:
        if not text.lstrip("-").isdecimal() or int(text) < minimum:
            raise argparse.ArgumentTypeError(f"expected a whole number of at least {minimum}, found {text!r}")
        return int(text)

    return whole_number


def from_zero(text: str) -> float:
    """An argparse type: a finite number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number of at least 0, found {text!r}")
    return number


class Lines:
    """Standard error for a progress bar in a pipe or a file: a line now and then, no control characters."""

    def write(self, text: str) -> None:
        """Writes a state of the bar as a line."""
        if line := text.strip("\r\n "):
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        """As of a file."""
        sys.stderr.flush()


def progress_bar(*args: Any, disable: bool = False, **kwargs: Any) -> tqdm:
    """A tqdm bar on standard error; in a pipe or a file it says a line every half minute only."""
    live = sys.stderr.isatty() or type(sys.stderr).__module__.startswith("ipykernel")  # Jupyter and Colab
    interval = 0.1 if sys.stderr.isatty() else 0.5 if live else 30.0
    kwargs |= {"mininterval": interval, "maxinterval": interval, "dynamic_ncols": live}
    if not live:
        kwargs |= {"file": Lines(), "ascii": True, "ncols": 100}
    return tqdm(*args, disable=disable or not Talk.wanted, **kwargs)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Holds back what is written to standard error, unless the block fails.

    TensorFlow's libraries write to the file descriptor while they load, before any of its settings for logging
    is at work; and so do the Java programs of pycocoevalcap.
    """
    if os.environ["TF_CPP_MIN_LOG_LEVEL"] != "3":
        yield
        return
    sys.stderr.flush()
    kept = os.dup(2)
    with tempfile.TemporaryFile() as talk:
        os.dup2(talk.fileno(), 2)
        try:
            yield
        except BaseException:
            talk.seek(0)
            os.write(kept, talk.read())
            raise
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def run_command(main: Callable[[], None]) -> None:
    """Runs a script's main and turns its failures into one line and an exit code.

    Exit codes: 2 for bad input, a missing file or a full disk; 130 for Ctrl-C; 0 otherwise.
    """
    name = Path(sys.argv[0]).name
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as standard error: a picture's name need not be Unicode
    try:
        main()
    except InputError as error:
        say(f"{name}: {' '.join(str(error).splitlines())}", error=True)  # what was found may hold line ends
        sys.exit(2)
    except BrokenPipeError:  # `python inference.py *.jpg | head` is no error
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except OSError as error:
        hint = "; free some space and run the same command again, it continues" * (error.errno == errno.ENOSPC)
        where = f"{error.filename}: " if error.filename else ""
        say(f"{name}: {where}{error.strerror or error}{hint}", error=True)
        sys.exit(2)
    except KeyboardInterrupt:
        say(f"\n{name}: stopped; run the same command again to continue", error=True)
        sys.exit(130)


def in_words(size: float) -> str:
    """Bytes for people, `1.6 GB` or `25 MB`."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{math.ceil(size / 1e6)} MB"


def need_room(folder: Path, size: float, what: str, instead: str) -> None:
    """Says before long work, not after half of it, that the disk is too small.

    Args:
        folder: where it will be written; it exists.
        size: bytes.
        what: will be written.
        instead: what to do.

    Raises:
        InputError: less is free.
    """
    if (free := shutil.disk_usage(folder).free) < size:
        raise InputError(f"{what} needs {in_words(size)} in {folder}, found {in_words(free)} free; {instead}")


def locked(file: IO[Any], wait: bool = False) -> bool:
    """Locks an open file against other processes until it is closed, be it by kill -9; False if another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            msvcrt.locking(file.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network drives cannot lock
        say(f"{file.name} cannot be locked ({error.strerror}): take care that no other process writes to it")
    return True


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Keeps a folder, made if need be, for this process while the block runs.

    Raises:
        InputError: another process has it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        if not locked(file):
            raise InputError(
                f"{folder} is in use by another process; wait until it has ended, or choose another folder"
            )
        yield


@contextlib.contextmanager
def atomic_write(path: Path | str, mode: str = "w") -> Iterator[IO[Any]]:
    """Opens a file that takes its name only when the block ends well.

    A reader, or a run after `kill -9`, finds the old file or the new one, never half of it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(
            partial, mode, encoding=None if "b" in mode else "utf-8", newline=None if "b" in mode else ""
        ) as file:
            yield file
        os.replace(partial, path)
    except OSError as error:
        if error.filename == str(partial):
            error.filename = str(path)  # the name the user knows
        raise
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented UTF-8 JSON, atomically."""
    with atomic_write(path) as file:
        json.dump(value, file, indent=2, ensure_ascii=False)
        file.write("\n")


def read_json(path: Path | str) -> Any:
    """Reads JSON.

    Raises:
        InputError: the file is missing, is not UTF-8, or is not JSON.
    """
    try:
        return parse_json(path, Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected JSON in UTF-8, found something else ({error})") from None


def parse_json(path: Path | str, text: str) -> Any:
    """The JSON in a file's text; raises InputError if it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # the latter of thousands of open brackets
        raise InputError(f"{path}: expected JSON, found something else ({error})") from None


def check_fields(found: Any, types: dict[str, Any]) -> None:
    """Raises InputError unless JSON is an object that has these fields, each of its type; a float may be whole."""
    if not isinstance(found, dict):
        raise InputError(f"expected the fields {', '.join(types)}, found {str(found)[:60]!r}")
    for name, kind in types.items():
        if name not in found:
            raise InputError(f"{name} is missing")
        value = found[name]
        if isinstance(value, bool) or not isinstance(value, int | float if kind is float else kind):
            raise InputError(f"{name}: expected {getattr(kind, '__name__', kind)}, found {str(value)[:60]!r}")


def file_sha256(path: Path | str) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
