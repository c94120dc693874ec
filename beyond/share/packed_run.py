"""A run as one .zip file, and the folder that it is unpacked into: `--run` takes a folder, a .zip or its address.

The .zip holds one folder, named after the run, with the files below. It is unpacked once, into
`~/.cache/image-captioning/<SHA-256 of the .zip>/`, as a run folder like those of train.py.
"""

import atexit
import contextlib
import errno
import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import urllib.parse
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from beyond.share.model_weights import read_weights, write_checkpoint
from captioning.base.cli import InputError, log
from captioning.base.downloads import BLOCK_BYTES, MAX_COMPRESSION_RATIO, download, redact_url
from captioning.base.files import atomic_write, file_sha256, read_json, try_lock
from captioning.config.settings import DATA_PATHS
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.runs.run_folder import CONFIG_FILE, VOCABULARY_FILE, latest_run, read_config

WEIGHTS_FILE = "weights.npz"
CARD_FILE = "MODEL_CARD.md"
HISTORY_FILE = "history.csv"
METRICS = r"metrics_[\w.-]+\.json"
REQUIRED_FILES = {CONFIG_FILE, VOCABULARY_FILE, WEIGHTS_FILE}
# The largest size of each file, in bytes. Those of text are read at once.
MAX_BYTES = {
    rf"{CONFIG_FILE}|{VOCABULARY_FILE}|{CARD_FILE}|{HISTORY_FILE}|{METRICS}": 50_000_000,
    rf"{WEIGHTS_FILE}|cnn(\.weights)?\.h5": 4_000_000_000,
}
MAX_FILES = 1000
MAX_ZIP_BYTES = 4_000_000_000  # of a download
RUN_NAME = re.compile(r"\w[\w.-]{0,79}")

_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


def open_run(run: str | Path | None) -> Path:
    """Returns a run folder.

    Args:
        run: the folder; a .zip that beyond.export made, which is unpacked; the http(s) address of one,
            which is downloaded; or None for the latest run in runs/.

    Raises:
        InputError: the .zip is missing, damaged or no packed run; the download failed; or there is no latest run.
            A folder is not looked into.
    """
    if run is None:
        return latest_run()
    if "://" in str(run):
        return _open_address(str(run))
    path = Path(run)
    if path.is_dir() or not (path.is_file() or path.suffix.lower() == ".zip"):
        return path
    return unpack_run(path, str(path))


# Addresses.


def _open_address(address: str) -> Path:
    """Downloads a packed run, unless the cache has it, and unpacks it."""
    url, sha256 = _parse_address(address)
    source = redact_url(url)
    name = re.sub(r"[^\w.-]", "_", source.rsplit("/", 1)[-1])[-80:].lstrip(".") or "run.zip"
    cache = _cache_folder()
    path = cache / "downloads" / hashlib.sha256(url.encode()).hexdigest() / name
    if path.exists():
        if sha256 and file_sha256(path) != sha256:
            path.unlink()  # the file at this address was another one then
        else:
            log(f"{source}: its copy in {path.parent}/ is used; delete that to download it again")
    download(url, path, max_bytes=MAX_ZIP_BYTES)
    try:
        if sha256 and (found := file_sha256(path)) != sha256:
            raise InputError(f"{source}: expected a file whose SHA-256 is {sha256}, found {found}")
        return unpack_run(path, source, cache)
    except InputError:
        shutil.rmtree(path.parent, ignore_errors=True)  # so that the next time it is downloaded again
        raise


def _parse_address(address: str) -> tuple[str, str | None]:
    """Returns the address to download, and the SHA-256 that `#sha256=` after it demands, if it does."""
    try:
        parts = urllib.parse.urlsplit(address)
        host = parts.hostname or ""
        _ = parts.port  # raises ValueError if it is no number
    except ValueError:
        host = ""
    is_local = host in ("localhost", "::1") or re.fullmatch(r"127\.\d+\.\d+\.\d+", host)
    if not host.isascii() or not host or not (parts.scheme == "https" or (parts.scheme == "http" and is_local)):
        raise InputError(
            f"--run {redact_url(address) if host else address!r}: expected a folder, a .zip or an address that begins "
            "with https://"
        )
    digest = re.fullmatch(r"sha256=([0-9a-fA-F]{64})", parts.fragment)
    if parts.fragment and not digest:
        raise InputError(f"--run {redact_url(address)}: expected #sha256= and 64 hexadecimal digits after the address")
    url = urllib.parse.quote(parts._replace(fragment="").geturl(), safe="%/:=&?~+!$,;'@()*[]")
    return url, digest[1].lower() if digest else None


# The cache.


def _cache_folder() -> Path:
    """Returns the folder of unpacked runs; if nothing can be written there, one that is deleted at the end."""
    try:
        root = os.environ.get("XDG_CACHE_HOME", "")
        cache = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "image-captioning"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            pass
    except (OSError, RuntimeError) as error:  # the latter if there is no home
        cache = Path(tempfile.mkdtemp(prefix="image-captioning-"))
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        log(f"packed runs cannot be kept ({error}): the run is unpacked into {cache}/, which is deleted at the end")
    return cache


@contextlib.contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """Waits until no other process unpacks into the cache."""
    with open(cache / ".lock", "a") as file:
        if not try_lock(file):
            log(f"{cache}: another process unpacks a run, waiting")
            try_lock(file, wait=True)
        yield


def unpack_run(path: Path, source: str, cache: Path | None = None) -> Path:
    """Unpacks a packed run into the cache, unless it is there.

    A process that is killed leaves nothing that is taken for a run.

    Args:
        path: the .zip.
        source: what messages call it.
        cache: the folder of unpacked runs.

    Returns:
        The run folder.

    Raises:
        InputError: the file is missing or damaged, or is not a packed run.
    """
    cache = cache or _cache_folder()
    try:
        file = open(path, "rb")
    except FileNotFoundError:
        raise InputError(f"{source}: no such file; expected a run folder, or a .zip of one") from None
    with file, _lock(cache):
        target = cache / hashlib.file_digest(file, "sha256").hexdigest()
        if runs := list(target.glob(f"*/{CONFIG_FILE}")):
            return runs[0].parent
        part = cache / f"{target.name}.part"
        for leftover in (part, target):
            shutil.rmtree(leftover, ignore_errors=True)
        try:
            name = _unpack(file, part).name
            os.rename(part, target)
        except (InputError, *_DAMAGES) as error:
            reason = str(error).strip().split("\n")[0][:300].replace(f"{part}{os.sep}", "")
            raise InputError(
                f"{source}: damaged, or not a run that `python -m beyond.export --pack` packed ({reason})"
            ) from None
        finally:
            shutil.rmtree(part, ignore_errors=True)
    log(f"{source} is unpacked into {target / name}/")
    return target / name


# Unpacking.


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the content of a config.json with names instead of paths: a packed run tells nothing of a machine.

    The folder of downloaded datasets becomes the default one.
    """
    data, features = dict(values["data"]), dict(values["features"])
    for section, names in ((data, DATA_PATHS), (features, ("folder", "weights", "images"))):
        for name in names:
            if isinstance(path := section.get(name), str):
                last = re.split(r"[/\\:]", path)[-1]
                section[name] = last if last.strip(".") else "data"
    return {**values, "data": {**data, "data_dir": None}, "features": features}


def _unpack(file: IO[bytes], folder: Path) -> Path:
    """Unpacks an open .zip into a new folder and returns the run folder in it.

    Raises:
        InputError: it holds other files than a packed run, or they do not belong together. Damages raise `_DAMAGES`.
    """
    with zipfile.ZipFile(file) as archive:
        members = _check_members(archive, os.fstat(file.fileno()).st_size)
        run = folder / members[0].filename.split("/")[0]
        run.mkdir(parents=True)
        num_bytes = sum(member.file_size for member in members)
        if shutil.disk_usage(folder).free < 3 * num_bytes:  # weights in float16 are written as float32, too
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder.parent))
        for member in members:
            try:
                with archive.open(member) as source, atomic_write(run / member.filename.split("/")[1], "wb") as target:
                    shutil.copyfileobj(source, target, BLOCK_BYTES)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                raise zipfile.BadZipFile("a file begins before the .zip does") from None  # where zipfile seeks to
    config, values = read_config(run), read_json(run / CONFIG_FILE)
    if values != without_paths(values):
        raise InputError(f"{CONFIG_FILE}: expected names of files and folders, found paths")
    words = read_json(run / VOCABULARY_FILE)
    is_right = file_sha256(run / VOCABULARY_FILE) == config.vocabulary_sha256
    if not is_right or not isinstance(words, list) or len(words) != config.model.vocab_size:
        raise InputError(f"{VOCABULARY_FILE}: not that of {CONFIG_FILE}")
    cnn_weights, sha256 = find_cnn_weights(run), config.features.get("sha256")
    if bool(cnn_weights) != bool(sha256):
        raise InputError(f"expected the CNN's weights if {CONFIG_FILE} has their SHA-256, and none otherwise")
    if cnn_weights:
        check_cnn_weights(cnn_weights, sha256)
    weights = read_weights(run / WEIGHTS_FILE)
    sizes = {size for array in weights.values() for size in array.shape}
    if missing := {config.model.vocab_size, config.model.embedding_dim, config.model.units} - sizes:
        raise InputError(f"{WEIGHTS_FILE}: no weights of size {min(missing)}, which {CONFIG_FILE} has")
    write_checkpoint(run / "checkpoints/best", weights)
    (run / WEIGHTS_FILE).unlink()
    return run


def _check_members(archive: zipfile.ZipFile, num_packed: int) -> list[zipfile.ZipInfo]:
    """Returns the files of a .zip; raises InputError if they are not those of a packed run, or too large."""
    entries = archive.infolist()
    if len(entries) > MAX_FILES:
        raise InputError(f"expected at most {MAX_FILES:,} files, found {len(entries):,}")
    run_name = entries[0].filename.split("/")[0] if entries else ""
    # The entry of the folder itself is one that other programs write when they pack a run again.
    members = [entry for entry in entries if entry.filename != f"{run_name}/"]
    names = [member.filename.removeprefix(f"{run_name}/") for member in members]
    if not RUN_NAME.fullmatch(run_name) or len(set(names)) < len(names) or REQUIRED_FILES - set(names):
        raise InputError(f"expected a folder with {', '.join(sorted(REQUIRED_FILES))}, found {str(names)[:150]}")
    if sum(name.endswith(".h5") for name in names) > 1:
        raise InputError("expected one file of the CNN's weights, found two")
    for member, name in zip(members, names, strict=True):
        limit = next((limit for pattern, limit in MAX_BYTES.items() if re.fullmatch(pattern, name)), None)
        if limit is None or not member.filename.startswith(f"{run_name}/"):
            raise InputError(f"{member.filename[:100]!r}: no file of a packed run")
        file_type = stat.S_IFMT(member.external_attr >> 16)
        if file_type not in (0, stat.S_IFREG):  # 0 where no such system wrote it
            raise InputError(f"{member.filename!r}: expected a plain file, found a link or a device")
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InputError(f"{member.filename!r}: expected no compression or deflate, found another")
        if member.file_size > limit:
            raise InputError(f"{member.filename!r}: {member.file_size:,} bytes, expected at most {limit:,}")
    if (unpacked := sum(member.file_size for member in members)) > MAX_COMPRESSION_RATIO * num_packed:
        raise InputError(f"{num_packed:,} bytes that would unpack to {unpacked:,}")
    return members
