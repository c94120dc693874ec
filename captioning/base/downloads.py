"""Downloads that resume and are checked, and archives that cannot write outside their folder.

Connections, retries, proxies and certificates are those of `requests`, which comes with TensorFlow.
"""

import contextlib
import functools
import hashlib
import os
import re
import shutil
import stat
import time
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from io import BufferedRandom
from pathlib import Path
from typing import NamedTuple

import requests
import urllib3
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from captioning.base.cli import InputError, format_bytes, log, progress_bar
from captioning.base.files import atomic_write, try_lock

MAX_RETRIES = 5  # requests in a row that bring no data, after which a download fails
INITIAL_BACKOFF_S = 1.0  # pause after the first of them; doubled after each one
TIMEOUT_S = 60  # without any data
MAX_COMPRESSION_RATIO = 100  # an archive that unpacks to more than so many times its size is refused
MAX_CONNECTIONS = 16  # kept open to a server
BLOCK_BYTES = 1 << 20


class Archive(NamedTuple):
    """A zip file to download; its length and its MD5 are checked where they are known."""

    name: str  # of the file
    url: str
    num_bytes: int | None = None
    md5: str | None = None


class _WrongFileError(Exception):
    """The server's file is not the expected one: what was received of it is of no use."""


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
    rest, or for all of it if the server's file has changed. A second process that downloads the same file waits for
    the first.

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
    path.parent.mkdir(parents=True, exist_ok=True)
    part, version = path.with_name(f"{path.name}.part"), path.with_name(f"{path.name}.part.version")
    with _lock_part(part) as file:
        if path.exists():  # another process has completed it
            part.unlink()
            return path
        try:
            with progress_bar(total=num_bytes, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
                _fetch(url, file, version, num_bytes, max_bytes, bar)
            _check_content(file, num_bytes, md5)
            os.replace(part, path)
        except (requests.RequestException, _WrongFileError) as error:
            received, source = file.seek(0, os.SEEK_END), redact_url(url)
            is_kept = received and not isinstance(error, _WrongFileError)
            if not is_kept:
                part.unlink()
            kept = f"; {received:,} bytes are kept" if is_kept else ""
            raise InputError(
                f"{path.name} cannot be downloaded from {source} ({_describe(error)}){kept}; run the same command "
                f"again, or download {source} yourself and put it into {path.parent}/ as {path.name}"
            ) from None
        finally:
            if not part.exists():
                version.unlink(missing_ok=True)
    return path


@contextlib.contextmanager
def _lock_part(part: Path) -> Iterator[BufferedRandom]:
    """Opens the part file for appending and locks it, after any other process has finished with it."""
    while True:
        with open(part, "ab+") as file:
            if not try_lock(file):
                log(f"{part.stem}: another process is downloading it, waiting")
                try_lock(file, wait=True)
            try:
                is_current = os.path.samestat(os.fstat(file.fileno()), os.stat(part))
            except FileNotFoundError:
                is_current = False
            if is_current:  # otherwise another process has renamed or removed it meanwhile
                yield file
                return


def _fetch(
    url: str, file: BufferedRandom, version: Path, num_bytes: int | None, max_bytes: int | None, bar: tqdm
) -> None:
    """Appends what is missing to `file`; asks again for the rest if the connection is lost.

    Raises:
        requests.RequestException: the server cannot be reached or refuses, or requests bring no more data.
        _WrongFileError: the file is longer than expected.
    """
    num_failed = 0
    while num_failed < MAX_RETRIES:
        offset = file.seek(0, os.SEEK_END)
        if num_bytes and offset == num_bytes:
            return
        with _request(url, offset, version) as response:
            if response.status_code == 416 and offset:  # the server's file is shorter
                file.truncate(0)
                continue
            if not response.ok:
                raise requests.HTTPError(f"the server answered {response.status_code} {response.reason}")
            if response.status_code != 206:  # it sends everything: at first, or since its file has changed
                file.truncate(0)
                version.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified", ""))
            if _receive(response, file, num_bytes or max_bytes, bar):
                return
        num_failed = 1 if file.seek(0, os.SEEK_END) > offset else num_failed + 1
        time.sleep(INITIAL_BACKOFF_S * 2 ** (num_failed - 1))
    raise requests.ConnectionError("the connection was lost")


def _request(url: str, offset: int, version: Path) -> requests.Response:
    """Asks for what follows the first `offset` bytes of a file, or for all of it if it has changed since."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        raise requests.exceptions.InvalidURL(
            "expected an address that begins with http:// or https://, without a name and a password in it"
        )
    headers = {"Accept-Encoding": "identity"}  # the length of compressed data would be another
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version.exists() and (known := version.read_text()):
            headers["If-Range"] = known
    return _session().get(url, headers=headers, stream=True, timeout=TIMEOUT_S)


@functools.cache
def _session() -> requests.Session:
    """Returns the session of all downloads, in any thread; it keeps connections open for the next file."""
    retry = Retry(
        MAX_RETRIES - 1,
        status_forcelist=(408, 429, 500, 502, 503, 504),
        backoff_factor=INITIAL_BACKOFF_S,
        raise_on_status=False,
        respect_retry_after_header=False,  # it may ask for hours
    )
    session = requests.Session()
    for scheme in ("http://", "https://"):
        session.mount(scheme, HTTPAdapter(pool_maxsize=MAX_CONNECTIONS, max_retries=retry))
    return session


def _receive(response: requests.Response, file: BufferedRandom, max_bytes: int | None, bar: tqdm) -> bool:
    """Appends an answer to `file`; returns whether it came to its end."""
    received, length = file.seek(0, os.SEEK_END), response.headers.get("Content-Length")
    announced = received + int(length) if length else None
    if max_bytes and announced and announced > max_bytes:
        raise _WrongFileError(f"expected at most {max_bytes:,} bytes, the server announces {announced:,}")
    bar.n, bar.total = received, announced
    try:
        while block := response.raw.read1(BLOCK_BYTES):  # what has arrived, so that it is kept if no more comes
            file.write(block)
            received += len(block)
            bar.update(len(block))
            if max_bytes and received > max_bytes:
                raise _WrongFileError(f"expected at most {max_bytes:,} bytes, received more")
    except urllib3.exceptions.HTTPError:  # the connection was lost
        return False
    finally:
        file.flush()
    return announced in (None, received)


def _describe(error: Exception) -> str:
    """Returns the reason of a failed download, without the address that urllib3 names, which can hold secrets."""
    cause = error.args[0] if error.args else error
    return re.sub(r"^HTTPS?Connection[^:]*: ", "", str(getattr(cause, "reason", cause)))


def _check_content(file: BufferedRandom, num_bytes: int | None, md5: str | None) -> None:
    """Raises _WrongFileError if a complete file has another length or MD5."""
    received = file.seek(0, os.SEEK_END)
    if num_bytes and received != num_bytes:
        raise _WrongFileError(f"expected {num_bytes:,} bytes, received {received:,}")
    if md5:
        file.seek(0)
        found = hashlib.file_digest(file, functools.partial(hashlib.md5, usedforsecurity=False)).hexdigest()
        if found != md5:
            raise _WrongFileError(f"expected MD5 {md5}, found {found}")


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
