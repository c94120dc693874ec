"""Downloads that resume and are checked, and archives that cannot write outside their folder."""

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
from io import BufferedRandom
from pathlib import Path
from typing import Any, NamedTuple

from tqdm import tqdm

from captioning.base.cli import InputError, format_bytes, log, progress_bar
from captioning.base.files import atomic_write, try_lock

MAX_RETRIES = 5  # requests in a row that bring no data, after which a download fails
INITIAL_BACKOFF_S = 1.0  # pause before the second request; doubled before each one after
TIMEOUT_S = 60  # without any data
MAX_COMPRESSION_RATIO = 100  # an archive that unpacks to more than so many times its size is refused

BLOCK_BYTES = 1 << 20
_TRANSIENT_ERRORS = (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError)


class Archive(NamedTuple):
    """A zip file to download; its length and its MD5 are checked where they are known."""

    name: str  # of the file
    url: str
    num_bytes: int | None = None
    md5: str | None = None


class _PermanentError(Exception):
    """A failure that another request would not change."""


class _HttpOnlyRedirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects to http and https only."""

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        _check_url(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_url(url: str) -> None:
    """Raises _PermanentError unless an address is http or https, without a name and password."""
    if not url.lower().startswith(("http://", "https://")):
        raise _PermanentError(f"expected an address that begins with http:// or https://, found {redact_url(url)!r}")
    if "@" in urllib.parse.urlsplit(url).netloc:
        raise _PermanentError("expected an address without a name and a password in it")


def redact_url(url: str) -> str:
    """Returns an address without its name, password, query and fragment, which can hold secrets."""
    parts = urllib.parse.urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def download(
    url: str,
    path: Path,
    num_bytes: int | None = None,
    md5: str | None = None,
    quiet: bool = False,
    max_bytes: int | None = None,
) -> Path:
    """Downloads a file to `path`, unless it exists; it appears there only when it is complete.

    What has been received is kept as `<path>.part`. The next request, or the next run, asks the server only for the
    rest. A second process that downloads the same file waits for the first.

    Args:
        url: an http or https address.
        path: the file to write.
        num_bytes: its length, if known; otherwise the length that the server announces is expected.
        md5: its MD5, in hexadecimal, if known.
        quiet: whether to hide the progress bar.
        max_bytes: a longer file is refused.

    Returns:
        `path`.

    Raises:
        InputError: the download failed, or the length or the MD5 are not those expected. It names the address and the
            folder.
    """
    if path.exists():
        return path
    part = path.with_name(f"{path.name}.part")
    source = redact_url(url)
    hint = f"run the same command again, or download {source} yourself and put it into {path.parent}/ as {path.name}"
    with _locked_part(path, part) as file:
        if file is None:  # another process has completed it
            return path
        with progress_bar(total=num_bytes, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
            try:
                _check_url(url)
                _fetch(url, file, num_bytes, max_bytes, bar)
            except (_PermanentError, *_TRANSIENT_ERRORS) as error:
                received = file.tell()
                if not received:
                    part.unlink()
                is_resumable = received and not isinstance(error, _PermanentError)
                kept = f"; {received:,} bytes are kept" if is_resumable else ""
                raise InputError(
                    f"{path.name} cannot be downloaded from {source} ({_describe_error(error)}){kept}; {hint}"
                ) from None
        if problem := _integrity_error(file, num_bytes, md5):
            part.unlink()  # complete and wrong: there is nothing to resume
            raise InputError(f"{path.name}: {problem}; {hint}")
        os.replace(part, path)
    return path


def _describe_error(error: Exception) -> str:
    """Returns the reason of a failed download, for its message."""
    if isinstance(error, urllib.error.HTTPError):
        return f"the server answered {error.code} {error.reason}"
    return str(getattr(error, "reason", error) or type(error).__name__)


def _integrity_error(file: BufferedRandom, num_bytes: int | None, md5: str | None) -> str | None:
    """Returns how a complete file differs from what is expected; None if it does not."""
    received = file.seek(0, os.SEEK_END)
    if num_bytes and received != num_bytes:
        return f"expected {num_bytes:,} bytes, received {received:,}"
    if md5:
        file.seek(0)
        received_md5 = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if received_md5 != md5:
            return f"expected MD5 {md5}, found {received_md5}"
    return None


@contextlib.contextmanager
def _locked_part(path: Path, part: Path) -> Iterator[BufferedRandom | None]:
    """Opens the part file for appending and locks it; gives None if another process has completed the download."""
    path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        with open(part, "ab+") as file:
            if not try_lock(file, wait=False):
                log(f"{path.name}: another process is downloading it, waiting")
                try_lock(file, wait=True)
            # While this process waited, the other one may have renamed or removed the file that is now locked.
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
            except FileNotFoundError:
                is_current = False
            if path.exists():
                if is_current:
                    part.unlink()
                yield None
                return
            if is_current:
                yield file
                return


def _fetch(url: str, file: BufferedRandom, num_bytes: int | None, max_bytes: int | None, bar: tqdm) -> None:
    """Appends to `file` what is missing, with retries; raises the last error."""
    num_failed = 0
    while True:
        offset = file.seek(0, os.SEEK_END)
        if num_bytes and offset > num_bytes:
            file.truncate(0)
            continue
        bar.n = offset
        if num_bytes and offset == num_bytes:
            return
        try:
            _fetch_remaining(url, file, offset, num_bytes, max_bytes, bar)
            return
        except _TRANSIENT_ERRORS as error:
            if isinstance(error, urllib.error.HTTPError):
                _check_status(error, file, offset)
                num_failed += 1
            else:
                has_received = file.seek(0, os.SEEK_END) != offset
                num_failed = 1 if has_received else num_failed + 1
            if num_failed >= MAX_RETRIES:
                raise
        time.sleep(INITIAL_BACKOFF_S * 2 ** (num_failed - 1))


def _check_status(error: urllib.error.HTTPError, file: BufferedRandom, offset: int) -> None:
    """Prepares the next request after an HTTP error; raises _PermanentError if there is no use in one."""
    if error.code == 416 and offset:  # the range begins behind the end of the server's file
        file.truncate(0)
    elif error.code < 500 and error.code not in (408, 429):
        raise _PermanentError(_describe_error(error)) from None


def _fetch_remaining(
    url: str, file: BufferedRandom, offset: int, num_bytes: int | None, max_bytes: int | None, bar: tqdm
) -> None:
    """Makes one request for what follows the first `offset` bytes, and appends the answer to `file`."""
    request = urllib.request.Request(url, headers={"Range": f"bytes={offset}-"} if offset else {})
    with urllib.request.build_opener(_HttpOnlyRedirects).open(request, timeout=TIMEOUT_S) as response:
        if offset and response.status != 206:  # the server does not resume and sends everything
            file.truncate(0)
            offset = file.seek(0)
            bar.n = 0
        announced = _announced_bytes(response, offset, num_bytes, max_bytes)
        bar.total = num_bytes or announced
        received = offset
        while block := response.read(BLOCK_BYTES):
            file.write(block)
            received += len(block)
            bar.update(len(block))
            if max_bytes and received > max_bytes:
                raise _PermanentError(f"expected at most {max_bytes:,} bytes, received more")
        file.flush()
        expected = num_bytes or announced or received
        if received < expected:
            raise http.client.IncompleteRead(b"", expected - received)


def _announced_bytes(response: Any, offset: int, num_bytes: int | None, max_bytes: int | None) -> int | None:
    """Returns the length of the file that the server announces, if it does; raises _PermanentError if it is wrong."""
    content_length = response.headers.get("Content-Length")
    if not content_length:
        return None
    total = offset + int(content_length)
    if max_bytes and total > max_bytes:
        raise _PermanentError(f"expected at most {max_bytes:,} bytes, the server announces {total:,}")
    if num_bytes and total and total != num_bytes:
        raise _PermanentError(f"expected {num_bytes:,} bytes, the server announces {total:,}")
    return total


def unpack(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Unpacks the files of a zip archive that end in `suffixes` into a folder; those that are there are skipped.

    Raises:
        InputError: it is not a zip, is damaged, is a decompression bomb, or holds a link or a path that leads out of
            the folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            _check_compression_ratio(archive, content)
            members = [
                member
                for member in content.infolist()
                if member.filename.endswith(suffixes) and "__MACOSX" not in member.filename
            ]
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                target = folder / member.filename
                is_link = stat.S_ISLNK(member.external_attr >> 16)
                if is_link or not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {member.filename!r} would be written outside {folder}; not unpacked")
                if target.exists() and target.stat().st_size == member.file_size:
                    continue
                with content.open(member) as source, atomic_write(target, "wb") as file:
                    shutil.copyfileobj(source, file, BLOCK_BYTES)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{archive}: damaged ({error}); delete it and run the same command again") from None


def _check_compression_ratio(archive: Path, content: zipfile.ZipFile) -> None:
    """Raises InputError if an archive is a decompression bomb."""
    unpacked = sum(member.file_size for member in content.infolist())
    packed = archive.stat().st_size
    if unpacked > MAX_COMPRESSION_RATIO * packed:
        raise InputError(
            f"{archive}: {packed:,} bytes that would unpack to {unpacked:,}, expected at most {MAX_COMPRESSION_RATIO} "
            "times as many; not unpacked"
        )


def fetch_archive(archive: Archive, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Downloads an archive into a folder, unpacks its files that end in `suffixes` there, and deletes it.

    An archive that the user has put into the folder is used instead, and kept.
    """
    path = folder / archive.name
    is_user_provided = path.exists()
    if not is_user_provided:
        size = f", {format_bytes(archive.num_bytes)}," if archive.num_bytes else ""
        log(f"downloading {archive.name}{size} into {folder}/; it is deleted once it is unpacked")
    unpack(download(archive.url, path, archive.num_bytes, archive.md5), folder, suffixes)
    if not is_user_provided:
        path.unlink()
