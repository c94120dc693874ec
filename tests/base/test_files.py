"""Atomic writing, JSON, locks and the room on the disk."""

import errno
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from captioning.base import files
from captioning.base.cli import InputError
from captioning.base.files import (
    atomic_write,
    check_output,
    check_schema,
    lock_folder,
    read_json,
    relative_path,
    try_lock,
    write_json,
)

ROOT = Path(__file__).parents[2]


# Writing.


def test_atomic_write_replaces_a_file_only_when_the_block_ends(tmp_path):
    path = tmp_path / "new/folder/file.txt"
    with atomic_write(path) as file:
        file.write("first")
        assert not path.exists()
    with atomic_write(str(path), "wb") as file:
        file.write(b"second\r\n")
        assert path.read_bytes() == b"first"
    assert path.read_bytes() == b"second\r\n"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")])
def test_atomic_write_keeps_the_old_file_on_failure(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_write(path) as file:
        file.write("half of the n")
        file.flush()
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path], "nothing is left behind"
    assert getattr(error, "filename", str(path)) == str(path), "a full disk says which"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows counts characters, and the whole path")
def test_atomic_write_allows_the_longest_names(tmp_path):
    with atomic_write(tmp_path / ("é" * 127)) as file:
        file.write("content")
    with pytest.raises(OSError, match="File name too long") as error, atomic_write(tmp_path / ("x" * 256)):
        pass
    assert error.value.filename == str(tmp_path / ("x" * 256))
    assert len(list(tmp_path.iterdir())) == 1, "nothing is left behind"


def test_check_output_refuses_to_replace_what_it_did_not_write(tmp_path):
    path = tmp_path / "page.html"

    def check(*inputs):
        check_output("--html", path, lambda path: path.read_text() == "page", inputs)

    check()
    path.write_text("page")
    check(tmp_path / "none.jpg")
    with pytest.raises(InputError, match=r"--html \S+page\.html: is read by this command"):
        check(tmp_path / "." / "page.html")
    path.write_text("photo")
    with pytest.raises(InputError, match=r"expected a new file, or an earlier one of its kind, found something else"):
        check()
    path.write_text("")  # as mktemp makes it
    check()
    path.unlink()
    path.mkdir()
    with pytest.raises(InputError, match="expected a file, found a folder"):
        check()


# JSON.


def test_write_json_and_read_json(tmp_path):
    value = {"a": [1, 2.5, None], "caption": "ein Äpfel 🍎"}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    text = (tmp_path / "a.json").read_bytes().decode("utf-8")
    assert "Äpfel 🍎" in text and text.endswith("}\n") and "\r" not in text


def test_write_json_keeps_names_that_are_not_unicode(tmp_path):
    name = b"caf\xe9".decode(errors="surrogateescape")  # as Python reads it from the disk
    write_json(tmp_path / "a.json", {name: [name, "café"]})
    assert read_json(tmp_path / "a.json") == {name: [name, "café"]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "expected JSON, found something else"),
        (b"[" * 100_000, "expected JSON, found something else"),
        ('"é"'.encode("latin-1"), "expected JSON in UTF-8"),
        (b'{"a": {"b": 1, "c": 2, "b": 3}}', "the key 'b' is twice in an object"),
    ],
)
def test_read_json_refuses_other_files(tmp_path, content, message):
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=message) as error:
        read_json(path)
    assert str(path) in str(error.value)


SCHEMA = {"name": str, "epoch": int, "loss": float, "rows": list, "weights": (str, int)}
VALID = {"name": "a", "epoch": 1, "loss": 0.5, "rows": [], "weights": 3}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected the fields name, epoch"),
        ({"name": "a"}, "epoch is missing"),
        (VALID | {"epoch": True}, "epoch: expected int, found 'True'"),
    ],
)
def test_check_schema_names_the_wrong_field(value, message):
    check_schema(VALID | {"loss": 1, "weights": "b", "more": None}, SCHEMA)
    with pytest.raises(InputError, match=message):
        check_schema(value, SCHEMA)


# Locks.


def test_relative_path_is_absolute_on_another_drive(tmp_path, monkeypatch):
    assert relative_path(tmp_path / "a/b", tmp_path / "c") == "../a/b"
    monkeypatch.setattr(os.path, "relpath", lambda *_: int("another drive"))  # which raises ValueError, as relpath does
    assert relative_path(tmp_path / "a/b", tmp_path / "c") == f"{tmp_path}/a/b"


def test_atomic_write_waits_for_a_scanner_of_windows(tmp_path, monkeypatch):
    tries = []

    def replace_third(source, target, replace=os.replace):
        tries.append(source)
        if len(tries) < 3:
            raise PermissionError(errno.EACCES, "Access is denied")
        replace(source, target)

    monkeypatch.setattr(files.os, "replace", replace_third)
    monkeypatch.setattr(files.time, "sleep", lambda _: None)
    with monkeypatch.context() as patch, atomic_write(tmp_path / "a") as file:
        file.write("text")
        patch.setattr(sys, "platform", "win32")
    assert (tmp_path / "a").read_text() == "text" and len(tries) == 3
    tries[:] = []
    with pytest.raises(PermissionError), atomic_write(tmp_path / "a"):
        pass
    assert len(tries) == 1, "elsewhere there is nothing to wait for"


def test_try_lock_tells_whether_another_process_has_it(tmp_path):
    with open(tmp_path / "a", "w") as first, open(tmp_path / "a", "w") as second:
        assert try_lock(first)
        assert not try_lock(second)
        first.close()
        assert try_lock(second)


@pytest.mark.skipif(sys.platform == "win32", reason="needs fcntl and SIGKILL")
def test_lock_folder_refuses_a_second_process_and_is_free_after_kill(tmp_path):
    code = (
        "import pathlib, sys, time\n"
        "from captioning.base.files import lock_folder\n"
        "with lock_folder(pathlib.Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(60)\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline().strip() == b"locked"
        with pytest.raises(InputError, match="in use by another process"), lock_folder(tmp_path):
            pass
        process.send_signal(signal.SIGKILL)
    with pytest.raises(ZeroDivisionError), lock_folder(tmp_path):
        raise ZeroDivisionError
    with lock_folder(tmp_path):
        pass


# Room on the disk.


def test_check_disk_space(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=2e9))
    files.check_disk_space(tmp_path, 2e9, "the cache", "use float16")
    with pytest.raises(InputError) as error:
        files.check_disk_space(tmp_path, 2.1e9, "the cache", "use float16")
    assert str(error.value) == f"the cache needs 2.1 GB in {tmp_path}, found 2.0 GB free; use float16"
