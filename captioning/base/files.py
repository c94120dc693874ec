"""Files that are never half written, locks, JSON, and room on the disk."""

import atexit
import contextlib
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from captioning.base.cli import InputError, format_bytes, log, name_in_errors


def user_cache() -> Path:
    """Returns the folder for what can be made again, which need not exist."""
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "image-captioning"


def check_disk_space(folder: Path, num_bytes: float, purpose: str, hint: str) -> None:
    """Raises InputError if a folder's disk lacks the room for what a long job will write.

    The error says what needs it (`purpose`) and what the user can do (`hint`).
    """
    if (free := shutil.disk_usage(folder).free) < num_bytes:
        raise InputError(
            f"{purpose} needs {format_bytes(num_bytes)} in {folder}, found {format_bytes(free)} free; {hint}"
        )


def try_lock(file: IO[Any]) -> bool:
    """Locks an open file against other processes until it is closed, even by kill -9; False if another has it."""
    try:
        if sys.platform == "win32":
            import msvcrt

            # Windows locks bytes, from the position on, and nobody else may read them: one far behind the end.
            position = os.lseek(file.fileno(), 0, os.SEEK_CUR)
            os.lseek(file.fileno(), 0x7FFFFFFE, os.SEEK_SET)
            try:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            finally:
                os.lseek(file.fileno(), position, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:  # some network drives cannot lock
        log(f"{file.name} cannot be locked ({error.strerror}): make sure that no other process writes to it")
    return True


def check_output(
    option: str, path: Path, is_earlier: Callable[[Path], bool], inputs: Iterable[Path | str] = ()
) -> None:
    """Checks a file that will be written, before hours of work: no photo or table of the user is replaced.

    Args:
        option: the option that names it.
        path: the file.
        is_earlier: tells whether a file is an earlier output of this kind, which is replaced.
        inputs: what the command reads.

    Raises:
        InputError: it is a folder or a device, an input, or something else that is there.
    """
    if not os.path.exists(path):  # nor is there one with a name that is too long, which Path.exists would raise
        return
    if not path.is_file():
        raise InputError(f"{option} {path}: expected a file, found a folder or a device")
    if any(os.path.exists(name) and path.samefile(name) for name in inputs):
        raise InputError(f"{option} {path}: is read by this command, and would be replaced; choose another file")
    if path.stat().st_size and not is_earlier(path):
        raise InputError(f"{option} {path}: expected a new file, or an earlier one of its kind, found something else")


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Makes a folder and locks it while the block runs; raises InputError if another process has it."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a") as file:
        if not try_lock(file):
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
    partial = path.with_name(f".{uuid.uuid4().hex}.part")
    encoding, newline = (None, None) if "b" in mode else ("utf-8", "")
    try:
        with name_in_errors(path), open(partial, mode, encoding=encoding, newline=newline) as file:
            yield file
        replace(partial, path)
    except OSError as error:
        if error.filename == str(partial):
            error.filename = str(path)  # the name the user knows
        raise
    finally:
        partial.unlink(missing_ok=True)


def replace(source: Path, target: Path) -> None:
    """Gives a file the name of another one. On Windows a scanner may have either open, for a moment."""
    for pause in (0.1, 0.3, 1.0) if sys.platform == "win32" else ():
        with contextlib.suppress(PermissionError):
            os.replace(source, target)
            return
        time.sleep(pause)
    os.replace(source, target)


def plain_path(path: Path | str) -> Path:
    r"""Returns a path to the same file for TensorFlow, which takes the paths of checkpoints for patterns.

    It finds none whose path has a `[` or a backslash, and takes no path that is not Unicode. The folder of such a path,
    which exists, is linked elsewhere.
    """
    path = Path(path)
    if sys.platform == "win32" or not _is_special(str(path)):
        return path
    return _link(os.path.abspath(path.parent)) / path.name


def _is_special(path: str) -> bool:
    return bool(re.search(r"[\[\\\udc80-\udcff]", path))


@functools.cache
def _link(folder: str) -> Path:
    """Makes a symbolic link to a folder, which is deleted when the program ends."""
    place = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    if _is_special(place):
        raise InputError(f"TMPDIR: expected a path without [ and \\, to link {folder} there, found {place}")
    link = Path(place, "link")
    link.symlink_to(folder)
    return link


def relative_path(path: Path | str, folder: Path | str) -> str:
    """Returns an absolute path as it is from a folder, with slashes; unchanged on another drive of Windows."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return Path(path).as_posix()


def write_json(path: Path | str, value: Any) -> None:
    """Writes indented UTF-8 JSON, atomically."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    with atomic_write(path, "wb") as file:  # a name on the disk may be no Unicode: Python's escape is also JSON's
        file.write(f"{text}\n".encode(errors="backslashreplace"))


def read_json(path: Path | str) -> Any:
    """Reads JSON in UTF-8, with or without a byte order mark; raises InputError for any other file."""
    try:
        return parse_json(path, Path(path).read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: expected JSON in UTF-8, found something else ({error})") from None


def parse_json(path: Path | str, text: str) -> Any:
    """Parses the text of a JSON file; raises InputError if it is not JSON, or an object in it has a key twice."""
    try:
        return json.loads(text, object_pairs_hook=unique_keys(path))
    except (ValueError, RecursionError) as error:  # the latter of thousands of open brackets
        raise InputError(f"{path}: expected JSON, found something else ({error})") from None


def unique_keys(path: Path | str) -> Callable[[list[tuple[str, Any]]], dict[str, Any]]:
    """Returns what makes objects for json.loads; it raises InputError for a key that is twice: the first would go."""

    def make_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        value = dict(pairs)
        if len(value) < len(pairs):
            key = Counter(key for key, _ in pairs).most_common(1)[0][0]
            raise InputError(f"{path}: the key {key!r} is twice in an object; expected each key once")
        return value

    return make_object


def check_schema(value: Any, schema: dict[str, Any]) -> None:
    """Raises InputError unless JSON is an object with these fields, each of its type; a float may be whole."""
    if not isinstance(value, dict):
        raise InputError(f"expected the fields {', '.join(schema)}, found {str(value)[:60]!r}")
    for name, kind in schema.items():
        if name not in value:
            raise InputError(f"{name} is missing")
        field = value[name]
        if isinstance(field, bool) or not isinstance(field, int | float if kind is float else kind):
            raise InputError(f"{name}: expected {getattr(kind, '__name__', kind)}, found {str(field)[:60]!r}")


def file_sha256(path: Path | str) -> str:
    """Returns the SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
