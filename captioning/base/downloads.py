"""Downloads that resume and are checked, and archives that cannot write outside their folder.

`requests`, which comes with TensorFlow, connects and follows redirects; urllib3's Retry repeats a request that fails.
What has been received of a file is kept as `<path>.part`, and the server is asked only for the rest of it.
"""

import functools
import hashlib
import os
import re
import shutil
import urllib.parse
import zipfile
import zlib
from collections.abc import Container
from io import BufferedRandom
from pathlib import Path
from typing import BinaryIO, NamedTuple

import requests
from requests.adapters import HTTPAdapter
from tqdm import tqdm
from urllib3.util import Retry

from captioning.base.cli import InputError, format_bytes, log, name_in_errors, progress_bar
from captioning.base.files import atomic_write, replace, try_lock

MAX_RETRIES = 5  # requests in a row that fail
INITIAL_BACKOFF_S = 1.0  # pause between them; doubled after each one
MAX_CONTINUATIONS = 20  # requests for the rest of a file whose connection is lost
TIMEOUT_S = 60  # without any data
MAX_CONNECTIONS = 16  # kept open to a server
BLOCK_BYTES = 1 << 20
RECEIVED_BYTES = 1 << 14  # written at a time, and lost at most when a connection is
MAX_COMPRESSION_RATIO = 100  # an archive that unpacks to more than so many times its size is refused
DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError)  # what zipfile raises for a damaged archive


class Archive(NamedTuple):
    """A zip file to download; its length and its MD5 are checked where they are known."""

    name: str  # of the file
    url: str
    num_bytes: int | None = None
    md5: str | None = None


class _WrongFileError(requests.RequestException):
    """The server's file is not the expected one: what was received of it is of no use."""


def bytes_to_download(archive: Archive, folder: Path) -> int | None:
    """Returns how many bytes of an archive are not in a folder yet; None if that is not known."""
    path = folder / archive.name
    if path.exists():
        return 0
    part = _part_of(path)
    return archive.num_bytes and max(0, archive.num_bytes - (part.stat().st_size if part.exists() else 0))


def _part_of(path: Path) -> Path:
    """Returns the file of what has been received of another one."""
    return path.with_name(f"{path.name}.part")


def redact_url(url: str) -> str:
    """Returns an address without its name, password, query and fragment, which can hold secrets."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:  # it is none
        return f"{url.partition('://')[0]}://..."
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()


def download(
    url: str,
    path: Path,
    num_bytes: int | None = None,
    md5: str | None = None,
    quiet: bool = False,
    max_bytes: int | None = None,
    is_temporary: bool = False,
) -> Path:
    """Downloads a file to `path`, unless it exists; it appears there only when it is complete.

    Args:
        url: an http or https address.
        path: the file to write, which is returned.
        num_bytes: its length, if known.
        md5: its MD5, in hexadecimal, if known.
        quiet: whether to hide the progress bar.
        max_bytes: a longer file is refused.
        is_temporary: whether it is deleted after use, so that the user cannot put it there.

    Raises:
        InputError: the download failed, the file is not the expected one, or another process downloads it.
    """
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = _part_of(path)
    version = path.with_name(f"{path.name}.part.version")  # what the server calls the version that it sent
    failure = None
    with name_in_errors(part), open(part, "ab+") as file:
        if not try_lock(file):
            raise InputError(f"{path} is being downloaded by another process; wait until it has ended")
        if not path.exists():  # otherwise that process has just ended
            try:
                if file.seek(0, os.SEEK_END) != num_bytes:
                    with progress_bar(total=num_bytes, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
                        _fetch(url, file, version, num_bytes or max_bytes, bar)
                _check_content(file, num_bytes, md5)
            except (requests.RequestException, ValueError) as error:  # the latter of what is no address
                failure = error
        received = file.seek(0, os.SEEK_END)
    # Now that it is closed: Windows replaces and deletes no open file.
    is_kept = bool(failure and received) and not isinstance(failure, _WrongFileError)
    if not (failure or path.exists()):
        replace(part, path)
    if not is_kept:
        part.unlink(missing_ok=True)
        version.unlink(missing_ok=True)
    if failure:
        source, kept = redact_url(url), f"; {received:,} bytes are kept" if is_kept else ""
        advice = (
            f"{kept}; run the same command again, or download {source} yourself and put it into {path.parent}/ as "
            f"{path.name}"
        )
        raise InputError(
            f"{path.name} cannot be downloaded from {source} ({_describe(failure)}){'' if is_temporary else advice}"
        )
    return path


def _fetch(url: str, file: BufferedRandom, version: Path, max_bytes: int | None, bar: tqdm) -> None:
    """Appends what is missing to `file`; asks again for the rest if the connection is lost."""
    for _ in range(MAX_CONTINUATIONS):
        with _request(url, file.seek(0, os.SEEK_END), version) as response:
            if response.status_code != 206:  # all of the file, or after 416 nothing: the server's file is shorter
                is_page = response.ok and response.headers.get("Content-Type", "").startswith("text/html")
                if is_page and file.tell():
                    raise requests.RequestException("received a web page, of a login perhaps")  # what is there stays
                file.truncate(0)
                version.write_text(response.headers.get("ETag") or response.headers.get("Last-Modified", ""))
            if response.status_code == 416:
                continue
            received = file.seek(0, os.SEEK_END)
            bar.n, bar.total = received, received + int(response.headers.get("Content-Length", 0))
            try:
                for block in response.iter_content(RECEIVED_BYTES):
                    received += file.write(block)
                    bar.update(len(block))
                    if max_bytes and received > max_bytes:
                        raise _WrongFileError(f"expected at most {max_bytes:,} bytes, received more")
                return
            except (requests.ConnectionError, requests.exceptions.ChunkedEncodingError):
                pass  # the connection is lost
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
    response = _session().get(url, headers=headers, stream=True, timeout=TIMEOUT_S)
    if parts.scheme == "https" and not all(hop.url.startswith("https:") for hop in (*response.history, response)):
        raise requests.exceptions.InvalidURL("it leads from https to an address without it")
    if not (response.ok or (offset and response.status_code == 416)):
        raise requests.HTTPError(f"the server answered {response.status_code} {response.reason}")
    return response


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


def _describe(error: Exception) -> str:
    """Returns why a download failed; of an address without its query, which can hold secrets."""
    cause = error.args[0] if error.args else error
    return re.sub(r"(://[^\s?#]*)[?#]\S*", r"\1", str(getattr(cause, "reason", cause)))


def _check_content(file: BufferedRandom, num_bytes: int | None, md5: str | None) -> None:
    """Raises _WrongFileError if a complete file has another length or MD5."""
    received = file.seek(0, os.SEEK_END)
    if is_web_page(file):
        raise _WrongFileError("received a web page, of an error or a login perhaps")
    if num_bytes and received != num_bytes:
        raise _WrongFileError(f"expected {num_bytes:,} bytes, received {received:,}")
    if md5:
        file.seek(0)
        found = hashlib.file_digest(file, "md5").hexdigest()
        if found != md5:
            raise _WrongFileError(f"expected MD5 {md5}, found {found}")


def is_web_page(file: BinaryIO) -> bool:
    """Tells whether an open file is HTML, which servers send instead of a file, and browsers save."""
    file.seek(0)
    return bool(re.match(rb"\s*<(!doctype html|html|head)\b", file.read(200), re.IGNORECASE))


def unpack(archive: Path, folder: Path, suffixes: tuple[str, ...], names: Container[str] | None = None) -> None:
    """Unpacks the files of a zip archive that end in `suffixes` into a folder; those that are there are skipped.

    `names` are those that are wanted; None for all.

    Raises:
        InputError: it is damaged, unpacks to too much, or would write outside the folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            packed = archive.stat().st_size
            unpacked = sum(member.file_size for member in content.infolist())
            if unpacked > MAX_COMPRESSION_RATIO * packed:
                raise InputError(
                    f"{archive}: {packed:,} bytes that would unpack to {unpacked:,}, expected at most "
                    f"{MAX_COMPRESSION_RATIO} times as many; not unpacked"
                )
            members = [member for member in content.infolist() if member.filename.endswith(suffixes)]
            members = [member for member in members if names is None or member.filename in names]
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                target = folder / member.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {member.filename!r} would be written outside {folder}; not unpacked")
                is_there = target.exists() and target.stat().st_size == member.file_size
                if is_there or "__MACOSX" in member.filename:
                    continue
                with content.open(member) as source, atomic_write(target, "wb") as file:
                    shutil.copyfileobj(source, file, BLOCK_BYTES)
    except DAMAGES as error:
        with open(archive, "rb") as file:
            damage = "a web page, expected an archive" if is_web_page(file) else f"damaged ({error})"
        raise InputError(f"{archive}: {damage}; delete it and run the same command again") from None


def fetch_archive(
    archive: Archive, folder: Path, suffixes: tuple[str, ...], names: Container[str] | None = None
) -> None:
    """Downloads an archive into a folder, unpacks it there, see `unpack`, and deletes it.

    An archive that the user has put into the folder is used instead, and kept.
    """
    path = folder / archive.name
    # For when unpacking is stopped: says which file was downloaded, and is to be deleted after all.
    mark = folder / f"{archive.name}.downloaded"
    if not path.exists():
        size = f", {format_bytes(archive.num_bytes)}," if archive.num_bytes else ""
        log(f"downloading {archive.name}{size} into {folder}/; it is deleted once it is unpacked")
        download(archive.url, path, archive.num_bytes, archive.md5)
        mark.write_text(_identify(path))
    unpack(path, folder, suffixes, names)
    if mark.exists():
        if mark.read_text() == _identify(path):
            path.unlink()
        mark.unlink()


def _identify(path: Path) -> str:
    """Returns what tells a file from another one that took its place."""
    stat = path.stat()
    return f"{stat.st_size} {stat.st_mtime_ns}"
