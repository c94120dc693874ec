"""A run as one .zip, and the folder that it is unpacked into: `--run` takes a folder, a .zip or its address.

The .zip holds a run folder, without what captioning does not need:

coco/config.json                            with names in the place of paths
coco/vocabulary.json
coco/cnn.h5 or cnn.weights.h5               unless the weights of the CNN are ImageNet's
coco/checkpoints/best/                      the weights: checkpoint, ckpt-1.index and ckpt-1.data-00000-of-00001
coco/history.csv, loss.png, metrics_*.json  what there is of them
coco/MODEL_CARD.md

`--run` unpacks it once, into `~/.cache/image-captioning/<SHA-256 of the .zip>/`. Nothing in a .zip is believed: it may
come from anybody.
"""

import atexit
import contextlib
import filecmp
import functools
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
from typing import Any

from captioning.base.cli import InputError, log
from captioning.base.downloads import BLOCK_BYTES, MAX_COMPRESSION_RATIO, download, redact_url
from captioning.base.files import check_disk_space, file_sha256, read_json, try_lock
from captioning.config.settings import DATA_PATHS
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.runs.run_folder import CONFIG_FILE, VOCABULARY_FILE, latest_run, read_config

CARD_FILE = "MODEL_CARD.md"
METRICS = re.compile(r"metrics_[\w.-]+\.json")
BEST = "checkpoints/best"
PREFIX = "ckpt-1"  # the name of every packed checkpoint
STATE_FILE = f"{BEST}/checkpoint"
STATE = f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'.encode()
REQUIRED_FILES = {CONFIG_FILE, VOCABULARY_FILE, STATE_FILE, f"{BEST}/{PREFIX}.index"}
# The names that files may have, and the largest size of each in bytes. Text is read into memory at once.
MAX_BYTES = {
    rf"{CONFIG_FILE}|{VOCABULARY_FILE}|{CARD_FILE}|{STATE_FILE}|history\.csv|{METRICS.pattern}": 50_000_000,
    rf"loss\.png|cnn(\.weights)?\.h5|{BEST}/{PREFIX}\.(index|data-\d{{5}}-of-\d{{5}})": 4_000_000_000,
}
MAX_FILES = 1000
MAX_ZIP_BYTES = 8_000_000_000  # of a download
RUN_NAME = re.compile(r"\w[\w.-]{0,79}")
ADDRESS = re.compile(
    r"(?P<url>(https://([\w.-]+|\[[\da-f:]+\])|http://(localhost|127(\.\d+){3}|\[::1\]))(:\d{1,5})?/[^#]*)"
    r"(#sha256=(?P<sha256>[\da-f]{64}))?",
    re.ASCII | re.IGNORECASE,
)

_DAMAGES = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError, ValueError, struct.error)


def open_run(run: str | Path | None) -> Path:
    """Returns a run folder.

    Args:
        run: the folder; a .zip that beyond.share packed, which is unpacked into the cache; the http(s) address of one,
            which is downloaded; or None for the latest run in runs/.

    Raises:
        InputError: the .zip is missing, damaged or no packed run; the download failed; or there is no latest run.
            A folder is not looked into.
    """
    if run is None:
        return latest_run()
    if (path := find_zip(run)) is None:
        return Path(run)
    cache = _cache_folder()
    folder = cache / file_sha256(path) / read_members(path)[0]
    with open(cache / ".lock", "a") as lock:
        if not try_lock(lock):
            log(f"{cache}: another process unpacks a run, waiting")
            try_lock(lock, wait=True)
        if not (folder / CONFIG_FILE).is_file():
            shutil.rmtree(folder.parent, ignore_errors=True)  # what a killed process left, or a user did not delete
            unpack_run(path, folder)
            log(f"{path} is unpacked into {folder}/")
    return folder


def find_zip(run: str | Path) -> Path | None:
    """Returns the .zip that a value of `--run` names, downloaded if it is an address; None if it names a folder.

    Raises:
        InputError: there is no such .zip, or the download failed.
    """
    if "://" in str(run):
        return _download_run(str(run))
    path = Path(run)
    if path.is_dir() or not (path.is_file() or path.suffix.lower() == ".zip"):
        return None
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a run folder, or a .zip of one")
    return path


def _download_run(address: str) -> Path:
    """Downloads a packed run into the cache, unless it is there."""
    if not (match := ADDRESS.fullmatch(address)):
        raise InputError(
            "--run: expected a folder, a .zip, or an address that begins with https:// (or with http://, on this "
            f"machine), without a name and a password; after it nothing, or #sha256= and 64 hexadecimal digits; found "
            f"{address.partition('://')[0]}://..."
        )
    url, sha256 = match["url"], match["sha256"]
    source = redact_url(url)
    name = re.sub(r"[^\w.-]", "_", source.rsplit("/", 1)[-1])[-80:].lstrip(".") or "run.zip"
    path = _cache_folder() / "downloads" / hashlib.sha256(address.encode()).hexdigest() / name
    if path.exists():
        log(f"{source}: its copy in {path.parent}/ is used; delete that to download it again")
    download(urllib.parse.quote(url, safe="%/:=&?~+!$,;'@()*[]"), path, max_bytes=MAX_ZIP_BYTES)
    try:
        if sha256 and (found := file_sha256(path)) != sha256.lower():
            raise InputError(f"{path}: expected a file whose SHA-256 is {sha256.lower()}, found {found}")
        read_members(path)
    except InputError as error:
        path.unlink()  # so that the next time it is downloaded again
        raise InputError(str(error).replace(str(path), source)) from None
    return path


def _cache_folder() -> Path:
    """Returns the folder of downloads and unpacked runs; if nothing can be written there, a temporary one."""
    try:
        root = os.environ.get("XDG_CACHE_HOME", "")
        cache = (Path(root) if os.path.isabs(root) else Path.home() / ".cache") / "image-captioning"
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=cache):
            return cache
    except (OSError, RuntimeError) as error:  # the latter if there is no home
        return _temporary_cache(str(error))


@functools.cache
def _temporary_cache(reason: str) -> Path:
    """Makes a folder that is deleted when the process ends."""
    cache = Path(tempfile.mkdtemp(prefix="image-captioning-"))
    atexit.register(shutil.rmtree, cache, ignore_errors=True)
    log(f"packed runs cannot be kept ({reason}): the run is unpacked into {cache}/, which is deleted at the end")
    return cache


def unpack_run(path: Path, folder: Path) -> None:
    """Unpacks a packed run as a folder, which is there only when it is complete and checked.

    Args:
        path: the .zip.
        folder: the run folder to make; one that is there already has to hold the same files.

    Raises:
        InputError: the .zip is damaged or not a packed run, the disk is full, or the folder holds something else.
    """
    _, members = read_members(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    num_bytes = sum(member.file_size for member in members.values())
    check_disk_space(folder.parent, num_bytes, f"unpacking {path}", "free some space")
    # One folder deeper than runs are: what a killed process leaves in runs/ is not taken for the latest run.
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder.parent) as part:
        run = Path(part) / folder.name
        with _refuse_damages(path, f"{part}{os.sep}"):
            _extract(path, members, run)
            _check_run(run)
        if not folder.exists():
            run.rename(folder)
        elif others := set(members).difference(filecmp.cmpfiles(run, folder, list(members), shallow=False)[0]):
            raise InputError(
                f"{folder}: expected a new folder, found another run or something else ({min(others)} differs); name "
                "a new one with --output"
            )


def read_members(path: Path) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Reads which files a .zip holds, before anything is unpacked.

    Returns:
        The name of the run, and the files by their names in the run folder.

    Raises:
        InputError: it is no .zip, or holds other files than a packed run, or too many or too large ones.
    """
    with _refuse_damages(path), zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
        if len(entries) > MAX_FILES:
            raise InputError(f"expected at most {MAX_FILES:,} files, found {len(entries):,}")
        files = [entry for entry in entries if not entry.is_dir()]  # other programs write entries of folders, too
        run_name = files[0].filename.split("/")[0] if files else ""
        members = {file.filename.removeprefix(f"{run_name}/"): file for file in files}
        if not RUN_NAME.fullmatch(run_name) or len(members) < len(files) or REQUIRED_FILES - members.keys():
            names = str([file.filename for file in files])[:150]
            raise InputError(f"expected one folder with {', '.join(sorted(REQUIRED_FILES))}, found {names}")
        for name, member in members.items():
            _check_member(name, member, run_name)
        num_bytes, packed_bytes = sum(file.file_size for file in files), path.stat().st_size
        if num_bytes > MAX_COMPRESSION_RATIO * packed_bytes:
            raise InputError(f"{packed_bytes:,} bytes that would unpack to {num_bytes:,}")
    return run_name, members


def _check_member(name: str, member: zipfile.ZipInfo, run_name: str) -> None:
    """Raises InputError if a file is none of a packed run by its name, its type or its size."""
    limit = next((limit for pattern, limit in MAX_BYTES.items() if re.fullmatch(pattern, name)), None)
    if limit is None or member.filename != f"{run_name}/{name}":
        raise InputError(f"{member.filename[:100]!r}: no file of a packed run")
    if stat.S_IFMT(member.external_attr >> 16) not in (0, stat.S_IFREG):  # 0: packed by Windows
        raise InputError(f"{member.filename!r}: expected a plain file, found a link or a device")
    if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise InputError(f"{member.filename!r}: expected no compression or deflate, found another")
    if member.file_size > limit:
        raise InputError(f"{member.filename!r}: {member.file_size:,} bytes, expected at most {limit:,}")
    if member.header_offset < 0:
        raise InputError(f"{member.filename!r}: begins before the .zip does")


def _extract(path: Path, members: dict[str, zipfile.ZipInfo], run: Path) -> None:
    """Writes the files of a .zip, whose names have been checked, into a new folder."""
    with zipfile.ZipFile(path) as archive:
        for name, member in members.items():
            (run / name).parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(run / name, "xb") as target:
                shutil.copyfileobj(source, target, BLOCK_BYTES)


def _check_run(run: Path) -> None:
    """Raises InputError if unpacked files do not belong together."""
    import inference  # which may import this module

    config, values = read_config(run), read_json(run / CONFIG_FILE)
    if values != without_paths(values):
        raise InputError(f"{CONFIG_FILE}: expected names of files and folders, found paths")
    if (run / STATE_FILE).read_bytes() != STATE:
        raise InputError(f"{STATE_FILE}: expected the name {PREFIX}, found another checkpoint")
    check_cnn(run, config.features.get("sha256"))
    inference.load_run(run)  # the vocabulary and the weights


def check_cnn(run: Path, sha256: str | None) -> None:
    """Checks that a run folder has the weights of its CNN, unless they are ImageNet's.

    Args:
        run: the run folder.
        sha256: the SHA-256 that the run's config.json has of them; None of ImageNet's.

    Raises:
        InputError: it has others, or none where it should, or some where it should not.
    """
    cnn_weights = find_cnn_weights(run)
    if bool(cnn_weights) != bool(sha256):
        expected, found = (f"{run}/cnn.h5 or cnn.weights.h5", "none") if sha256 else ("none", cnn_weights)
        raise InputError(f"weights of the CNN: {CONFIG_FILE} expects {expected}, found {found}")
    if cnn_weights:
        check_cnn_weights(cnn_weights, sha256)


@contextlib.contextmanager
def _refuse_damages(path: Path, hidden: str = "\0") -> Iterator[None]:
    """Turns whatever is wrong with a .zip into one line, without the name of a folder that nobody knows."""
    try:
        yield
    except (InputError, *_DAMAGES) as error:
        reason = str(error).strip().split("\n")[0].replace(hidden, "")[:300]
        raise InputError(
            f"{path}: damaged, or not a run that `python -m beyond.share` packed ({reason or type(error).__name__})"
        ) from None


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
