"""Downloads and archives: resumed, checked, and never outside their folder."""

import contextlib
import functools
import hashlib
import http.client
import os
import shutil
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from io import BufferedRandom

from common import InputError, atomic_write, locked, progress_bar, say

TRIES = 5  # in a row that bring nothing
PAUSE = 1.0  # seconds before the second try; doubled before each one after
TIMEOUT = 60  # seconds without a byte
BOMB = 100  # an archive that unpacks to more than so many times its size is refused


class _Unwanted(Exception):
    """An answer that another try will not change."""


class _OnlyHttp(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, request, file, code, message, headers, url):
        _check_address(url)
        return super().redirect_request(request, file, code, message, headers, url)


def _check_address(url: str) -> None:
    if not url.lower().startswith(("http://", "https://")):
        raise _Unwanted(f"expected an address that begins with http:// or https://, found {shown(url)!r}")
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise _Unwanted("expected an address without a name and a password in it")


def shown(url: str) -> str:
    """An address as it may be printed: without the name, password and query, which can hold secrets."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def download(
    url: str, path: Path, size: int | None = None, md5: str | None = None, quiet: bool = False, limit: int | None = None
) -> Path:
    """Downloads to `path` unless it is there; the file appears only when it is whole.

    What has been received is kept as `<path>.part`, and the next try, or the next run, asks the server for the
    rest. A second process that wants the same file waits for the first.

    Args:
        url: an http or https address.
        path: where the file goes.
        size: its length in bytes, if known; otherwise the server's word is taken.
        md5: of the whole file, in hexadecimal, if known.
        quiet: whether to show no progress.
        limit: more bytes than these are refused.

    Raises:
        InputError: the download failed, or size or MD5 are not those expected. Names the address and the folder.
    """
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    by_hand = (
        f"run the same command again, or download {shown(url)} yourself and put it into {path.parent}/ as {path.name}"
    )
    with _alone(path, part) as file:
        if file is None:  # another process has finished it
            return path
        with progress_bar(total=size, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
            try:
                _check_address(url)
                _fetch(url, file, size, limit, bar)
            except _Unwanted as error:
                if file.tell() == 0:
                    part.unlink()
                raise InputError(f"{path.name} cannot be downloaded from {shown(url)} ({error}); {by_hand}") from None
            except _TRANSIENT as error:
                kept = f"; {file.tell():,} bytes are kept" * (file.tell() > 0)
                if not kept:
                    part.unlink()
                reason = getattr(error, "reason", error) or type(error).__name__
                if isinstance(error, urllib.error.HTTPError):
                    reason = f"the server says {error.code} {error.reason}"
                raise InputError(
                    f"{path.name} cannot be downloaded from {shown(url)} ({reason}){kept}; {by_hand}"
                ) from None
        if wrong := _difference(file, size, md5):
            part.unlink()  # whole and wrong: nothing to go on from
            raise InputError(f"{path.name}: {wrong}; {by_hand}")
        os.replace(part, path)
    return path


def _difference(file: BufferedRandom, size: int | None, md5: str | None) -> str | None:
    """How a whole file differs from what is expected of it; None if it does not."""
    received = file.seek(0, os.SEEK_END)
    if size and received != size:
        return f"expected {size:,} bytes, received {received:,}"
    if md5:  # read only then: a file can have gigabytes
        file.seek(0)
        found = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if found != md5:
            return f"expected MD5 {md5}, found {found}"
    return None


@contextlib.contextmanager
def _alone(path: Path, part: Path) -> Iterator[BufferedRandom | None]:
    """The part file, opened for going on, for this process alone; None if another has made the whole file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(part, "ab+") as file:
            if not locked(file, wait=False):
                say(f"{path.name}: another process is downloading it, waiting")
                locked(file, wait=True)
            try:
                same = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
            except FileNotFoundError:
                same = False
            if path.exists():
                if same:
                    part.unlink()
                yield None
                return
            if same:  # not one that the process before has renamed or removed
                yield file
                return


_TRANSIENT = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


def _fetch(url: str, file: BufferedRandom, size: int | None, limit: int | None, bar) -> None:
    """Appends to `file` what it lacks, in several tries; raises the last error, or _Unwanted."""
    failed, last = 0, Exception()
    while True:
        before = file.seek(0, os.SEEK_END)
        if size and before > size:
            file.truncate(0)
            continue
        bar.n = before
        if size and before == size:
            return
        try:
            _fetch_rest(url, file, before, size, limit, bar)
            return
        except urllib.error.HTTPError as error:
            if error.code == 416 and before:  # asked for what lies behind the file's end
                file.truncate(0)
            elif error.code < 500 and error.code not in (408, 429):
                raise _Unwanted(f"the server says {error.code} {error.reason}") from None
            failed, last = failed + 1, error
        except _TRANSIENT as error:
            failed, last = (failed + 1 if file.seek(0, os.SEEK_END) == before else 1), error
        if failed >= TRIES:
            raise last
        time.sleep(PAUSE * 2 ** (failed - 1))


def _fetch_rest(url: str, file: BufferedRandom, before: int, size: int | None, limit: int | None, bar) -> None:
    """One request for what comes after `before` bytes."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={before}-"} if before else {})
    with urllib.request.build_opener(_OnlyHttp).open(request, timeout=TIMEOUT) as response:
        if before and response.status != 206:  # this server does not resume
            file.truncate(0)
            before = file.seek(0)
            bar.n = 0
        length = response.headers.get("Content-Length")
        total = before + int(length) if length else None
        if limit and total and total > limit:
            raise _Unwanted(f"expected at most {limit:,} bytes, the server announces {total:,}")
        if size and total and total != size:
            raise _Unwanted(f"expected {size:,} bytes, the server announces {total:,}")
        bar.total = size or total
        received = before
        while block := response.read(1 << 20):
            file.write(block)
            received += len(block)
            bar.update(len(block))
            if limit and received > limit:
                raise _Unwanted(f"expected at most {limit:,} bytes, received more")
        file.flush()
        if received < (expected := size or total or received):
            raise http.client.IncompleteRead(b"", expected - received)


def unpack(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Unpacks an archive's files with these endings into `folder`, skipping what is there.

    Raises:
        InputError: it is no zip, is damaged, is a decompression bomb, or something in it leads out of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            unpacked, packed = sum(m.file_size for m in content.infolist()), archive.stat().st_size
            if unpacked > BOMB * packed:
                raise InputError(
                    f"{archive}: {packed:,} bytes that would unpack to {unpacked:,}, expected at most {BOMB} times as "
                    "many; not unpacked"
                )
            members = [m for m in content.infolist() if m.filename.endswith(suffixes) and "__MACOSX" not in m.filename]
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                target = folder / member.filename
                link = stat.S_ISLNK(member.external_attr >> 16)
                if link or not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {member.filename!r} would be written outside {folder}; not unpacked")
                if not (target.exists() and target.stat().st_size == member.file_size):
                    with content.open(member) as source, atomic_write(target, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{archive}: damaged ({error}); delete it and run the same command again") from None
