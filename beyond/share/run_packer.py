"""Packs a run as one .zip that `--run` takes on any machine, see `beyond.share.packed_run`.

The same run, packed by the same versions, gives the same bytes.
"""

import dataclasses
import hashlib
import io
import json
import platform
import re
import shutil
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from beyond.share.model_card import PackedFile, make_card
from beyond.share.model_weights import read_checkpoint, write_weights
from beyond.share.packed_run import (
    CARD_FILE,
    HISTORY_FILE,
    METRICS,
    RUN_NAME,
    WEIGHTS_FILE,
    without_paths,
)
from captioning.base.cli import InputError
from captioning.base.downloads import BLOCK_BYTES
from captioning.base.files import atomic_write, file_sha256, read_json
from captioning.images.feature_cache import check_cnn_weights, find_cnn_weights
from captioning.runs.run_folder import CONFIG_FILE, VOCABULARY_FILE, best_checkpoint, read_config

PACKAGES = ("tensorflow", "keras", "numpy", "pillow")
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every file in the .zip, the first that it can hold
FILE_MODE = 0o100644  # a plain file that its owner may write


def pack_run(run: Path, path: Path, weights_dtype: str = "float16") -> Path:
    """Packs a run's best weights with all that captioning needs, its scores and a model card.

    Paths of this machine are left out.

    Args:
        run: the run folder.
        path: the .zip to write.
        weights_dtype: `float16`, half as large and rounded, or `float32`.

    Returns:
        `path`.

    Raises:
        InputError: something of the run is missing or damaged, or a weight is too large for float16.
    """
    config = read_config(run)
    name = run_name(run)
    weights = read_checkpoint(best_checkpoint(run))
    if file_sha256(run / VOCABULARY_FILE) != config.vocabulary_sha256:
        raise InputError(f"{run / VOCABULARY_FILE}: not the vocabulary these weights were trained with")
    packed_weights = io.BytesIO()
    write_weights(packed_weights, weights, weights_dtype)
    values = without_paths(config.to_json())
    config = dataclasses.replace(config, data=type(config.data)(**values["data"]), features=values["features"])
    metrics = {file.name: _read_metrics(file, name) for file in sorted(run.glob("metrics_*.json"))}
    metrics = {file: scored for file, scored in metrics.items() if re.fullmatch(METRICS, file)}
    files: dict[str, bytes | Path] = {
        CONFIG_FILE: _to_json(values),
        VOCABULARY_FILE: run / VOCABULARY_FILE,
        WEIGHTS_FILE: packed_weights.getvalue(),
        **_find_cnn(run, config.features.get("sha256")),
        **({HISTORY_FILE: run / HISTORY_FILE} if (run / HISTORY_FILE).is_file() else {}),
        **{file: _to_json(scored) for file, scored in metrics.items()},
    }
    versions = {"Python": platform.python_version(), **{package: version(package) for package in PACKAGES}}
    num_weights = sum(array.size for array in weights.values())
    listed = [_describe(file, content) for file, content in files.items()]
    card = make_card(name, config, metrics, weights_dtype, num_weights, listed, versions)
    with atomic_write(path, "wb") as target, zipfile.ZipFile(target, "w") as archive:
        for file, content in {CARD_FILE: card.encode(), **files}.items():
            _add(archive, f"{name}/{file}", content)
    return path


def run_name(run: Path) -> str:
    """Returns the name of a run folder, without what cannot be part of a file's name everywhere."""
    name = re.sub(r"[^\w.-]+", "_", run.resolve().name).lstrip(".-")[:80]
    return name if RUN_NAME.fullmatch(name) else "run"


def _to_json(value: Any) -> bytes:
    """Returns JSON as `captioning.base.files.write_json` writes it."""
    return f"{json.dumps(value, indent=2, ensure_ascii=False)}\n".encode(errors="backslashreplace")


def _read_metrics(path: Path, name: str) -> dict[str, Any]:
    """Reads the scores that evaluate.py wrote, and puts the name of the run in the place of its path."""
    scored = read_json(path)
    if not isinstance(scored, dict) or not {"scores", "split", "images", "tokenizer"} <= scored.keys():
        raise InputError(f"{path}: expected the scores that evaluate.py writes; delete it, or score the run again")
    return {**scored, "run": name}


def _find_cnn(run: Path, sha256: str | None) -> dict[str, bytes | Path]:
    """Returns the file of the CNN's weights by its name in the .zip; nothing if they are ImageNet's."""
    if sha256 is None:
        return {}
    if not (cnn_weights := find_cnn_weights(run)):
        raise InputError(f"{run}: the weights of its CNN, cnn.h5 or cnn.weights.h5, are missing; put the file back")
    check_cnn_weights(cnn_weights, sha256)
    # Keras distinguishes two file formats by these endings.
    return {"cnn.weights.h5" if cnn_weights.endswith(".weights.h5") else "cnn.h5": Path(cnn_weights)}


def _describe(name: str, content: bytes | Path) -> PackedFile:
    """Returns the row of a file in the card."""
    if isinstance(content, Path):
        return PackedFile(name, content.stat().st_size, file_sha256(content))
    return PackedFile(name, len(content), hashlib.sha256(content).hexdigest())


def _add(archive: zipfile.ZipFile, name: str, content: bytes | Path) -> None:
    """Adds a file, not compressed: weights cannot be, and compressed bytes would depend on the version of zlib."""
    info = zipfile.ZipInfo(name, EPOCH)
    info.create_system = 3  # Unix, also if Windows packs it
    info.external_attr = FILE_MODE << 16
    info.file_size = content.stat().st_size if isinstance(content, Path) else len(content)
    with (
        open(content, "rb") if isinstance(content, Path) else io.BytesIO(content) as source,
        archive.open(info, "w") as target,
    ):
        shutil.copyfileobj(source, target, BLOCK_BYTES)
