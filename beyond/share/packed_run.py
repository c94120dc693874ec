"""A run as one .zip, and the folder that it is unpacked into: `--run` takes a folder, a .zip or its address.

The .zip holds a run folder, without what captioning does not need:

coco/config.json                            with names in the place of paths
coco/vocabulary.json
coco/cnn.h5 or cnn.weights.h5               unless the weights of the CNN are ImageNet's
coco/checkpoints/best/                      the weights: checkpoint, ckpt-1.index and ckpt-1.data-00000-of-00001
coco/history.csv, loss.png, metrics_*.json  what there is of them
coco/consensus.npz                          vectors of the training images, and their captions, if it was asked for
coco/MODEL_CARD.md

`--run` unpacks it once, into `~/.cache/image-captioning/<SHA-256 of the .zip>/`. Nothing in a .zip is believed: it may
come from anybody.
"""

import contextlib
import filecmp
import hashlib
import os
import re
import shutil
import stat
import struct
import tempfile
import urllib.parse
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, log
from captioning.base.downloads import BLOCK_BYTES, DAMAGES, MAX_COMPRESSION_RATIO, download, is_web_page, redact_url
from captioning.base.files import check_disk_space, file_sha256, read_json, user_cache
from captioning.config.settings import DATA_PATHS
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.runs.run_folder import CONFIG_FILE, VOCABULARY_FILE, read_config

CARD_FILE = "MODEL_CARD.md"
METRICS = re.compile(r"metrics_[\w.-]+\.json")
BEST = "checkpoints/best"
PREFIX = "ckpt-1"  # the name of every packed checkpoint
STATE_FILE = f"{BEST}/checkpoint"
STATE = f'model_checkpoint_path: "{PREFIX}"\nall_model_checkpoint_paths: "{PREFIX}"\n'.encode()
REQUIRED_FILES = {CONFIG_FILE, VOCABULARY_FILE, STATE_FILE, f"{BEST}/{PREFIX}.index"}
FILE_NAMES = re.compile(
    rf"{CONFIG_FILE}|{VOCABULARY_FILE}|{CARD_FILE}|history\.csv|loss\.png|{METRICS.pattern}|cnn(\.weights)?\.h5|"
    r"consensus\.npz|"  # of --choose consensus
    rf"{STATE_FILE}|{BEST}/{PREFIX}\.(index|data-\d{{5}}-of-\d{{5}})"
)
MAX_BYTES = 8_000_000_000  # of a .zip, and of what it unpacks to
RUN_NAME = re.compile(r"\w[\w.-]{0,79}")
SHA256_FRAGMENT = re.compile(r"(sha256=([\da-f]{64}))?", re.IGNORECASE)


def open_run(run: str | Path) -> Path:
    """Returns the folder of a packed run, given as a .zip or its address, which is unpacked into the cache.

    Raises:
        InputError: the .zip is missing, damaged or no packed run; or the download failed.
    """
    path = fetch_zip(run)
    folder = _cache_folder() / file_sha256(path) / read_members(path)[0]
    if not (folder / CONFIG_FILE).is_file():
        unpack_run(path, folder)
        log(f"{path} is unpacked into {folder}/")
    return folder


def fetch_zip(run: str | Path) -> Path:
    """Returns the .zip of a packed run, downloaded if its address is given.

    Raises:
        InputError: there is no such file, or the download failed.
    """
    if "://" in str(run):
        return _download_run(str(run))
    if not Path(run).is_file():
        raise InputError(f"{run}: no such file; expected a run folder, or a .zip of one")
    return Path(run)


def _download_run(address: str) -> Path:
    """Downloads a packed run into the cache, unless it is there."""
    url, _, fragment = address.partition("#")
    sha256 = SHA256_FRAGMENT.fullmatch(fragment)
    if not (sha256 and _is_safe_address(url)):
        raise InputError(
            "--run: expected a folder, a .zip, or an address that begins with https:// (or with http://, on this "
            f"machine), without a name and a password; after it nothing, or #sha256= and 64 hexadecimal digits; found "
            f"{address.partition('://')[0]}://..."
        )
    source = redact_url(url)
    path = _cache_folder() / "downloads" / hashlib.sha256(address.encode()).hexdigest() / "run.zip"
    if path.exists():
        log(f"{source}: its copy in {path.parent}/ is used; delete that to download it again")
    download(url, path, max_bytes=MAX_BYTES)
    try:
        if sha256[2] and (found := file_sha256(path)) != sha256[2].lower():
            raise InputError(f"{path}: expected a file whose SHA-256 is {sha256[2].lower()}, found {found}")
        read_members(path)
    except InputError as error:
        path.unlink()  # so that the next time it is downloaded again
        raise InputError(str(error).replace(str(path), source)) from None
    return path


def _is_safe_address(url: str) -> bool:
    """Tells whether an address is https, or http of this machine, and has no name and password in it."""
    try:
        parts = urllib.parse.urlsplit(url)
    except ValueError:
        return False
    is_local = parts.scheme == "http" and parts.hostname in ("localhost", "127.0.0.1", "::1")
    return "@" not in parts.netloc and (is_local or (parts.scheme == "https" and bool(parts.hostname)))


def _cache_folder() -> Path:
    """Returns the folder of downloads and unpacked runs; raises InputError if nothing can be written there."""
    cache = user_cache()
    with contextlib.suppress(OSError):
        cache.mkdir(parents=True, exist_ok=True)
    if not os.access(cache, os.W_OK):
        raise InputError(
            f"{cache}: cannot be written; set XDG_CACHE_HOME to another folder, or unpack the run with "
            "`python -m beyond.share` first"
        )
    return cache


def unpack_run(path: Path, folder: Path) -> None:
    """Unpacks a .zip as a run folder, which is there only when it is complete and checked.

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
        with _refuse_damages(path, f"{part}{os.sep}"), zipfile.ZipFile(path) as archive:
            for name, member in members.items():  # whose names have been checked
                (run / name).parent.mkdir(parents=True, exist_ok=True)
                with archive.open(member) as source, open(run / name, "xb") as target:
                    shutil.copyfileobj(source, target, BLOCK_BYTES)
            _check_run(run)
        try:
            run.rename(folder)
        except OSError:  # it is there already, perhaps from another process
            same, _, _ = filecmp.cmpfiles(run, folder, list(members), shallow=False)
            if others := members.keys() - same:
                raise InputError(
                    f"{folder}: expected a new folder, found another run or something else ({min(others)} differs); "
                    "delete it, or name a new one with --output"
                ) from None


def read_members(path: Path) -> tuple[str, dict[str, zipfile.ZipInfo]]:
    """Reads the name of the run in a .zip, and its files by their names in the run folder, before they are unpacked.

    Raises:
        InputError: it is no .zip, or holds other files than a packed run, or too large ones.
    """
    with _refuse_damages(path), zipfile.ZipFile(path) as archive:
        files = [entry for entry in archive.infolist() if not entry.is_dir()]  # other programs write folders, too
        run_name = files[0].filename.split("/")[0] if files else ""
        members = {file.filename.removeprefix(f"{run_name}/"): file for file in files}
        if not RUN_NAME.fullmatch(run_name) or len(members) < len(files) or REQUIRED_FILES - members.keys():
            names = str([file.filename for file in files])[:150]
            raise InputError(f"expected one folder with {', '.join(sorted(REQUIRED_FILES))}, found {names}")
        for name, file in members.items():
            if not FILE_NAMES.fullmatch(name) or file.filename != f"{run_name}/{name}":
                raise InputError(f"{file.filename[:100]!r}: no file of a packed run")
            is_plain = stat.S_IFMT(file.external_attr >> 16) in (0, stat.S_IFREG)  # 0: packed by Windows
            if not is_plain or file.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise InputError(f"{file.filename!r}: expected a plain file, found a link, or another compression")
            if file.header_offset < 0:
                raise InputError(f"{file.filename!r}: begins before the .zip does")
        num_bytes = sum(file.file_size for file in files)
        limit = min(MAX_BYTES, MAX_COMPRESSION_RATIO * path.stat().st_size)
        if num_bytes > limit:
            raise InputError(f"it would unpack to {num_bytes:,} bytes, expected at most {limit:,}")
    return run_name, members


def is_packed_run(path: Path) -> bool:
    """Tells whether a file is a packed run."""
    try:
        read_members(path)
    except InputError:
        return False
    return True


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
    """Checks that a run folder has the weights of its CNN with this SHA-256, or none if they are ImageNet's (None)."""
    cnn_weights = find_cnn_weights(run)
    if bool(cnn_weights) != bool(sha256):
        expected = f"{run}/cnn.h5 or cnn.weights.h5" if sha256 else "none"
        raise InputError(f"weights of the CNN: {CONFIG_FILE} expects {expected}, found {cnn_weights or 'none'}")
    if cnn_weights:
        check_cnn_weights(cnn_weights, sha256)


@contextlib.contextmanager
def _refuse_damages(path: Path, hidden: str = "\0") -> Iterator[None]:
    """Turns whatever is wrong with a .zip into one line, without the name of a folder that nobody knows."""
    try:
        yield
    except (InputError, *DAMAGES, RuntimeError, ValueError, struct.error) as error:
        with open(path, "rb") as file:
            if is_web_page(file):
                raise InputError(f"{path}: a web page, expected a packed run") from None
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
