"""Packs a run as one .zip that `--run` takes on any machine, see `beyond.share.packed_run`."""

import dataclasses
import glob
import json
import re
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import inference
from beyond.consensus.index import INDEX_FILE, Index, is_current
from beyond.share.packed_run import (
    BEST,
    CARD_FILE,
    METRICS,
    PREFIX,
    RUN_NAME,
    STATE,
    STATE_FILE,
    check_cnn,
    without_paths,
)
from captioning.base.cli import InputError
from captioning.base.files import atomic_write, read_json
from captioning.config.options import Settings
from captioning.config.run_config import RunConfig
from captioning.config.settings import DecodeConfig
from captioning.runs.run_folder import CONFIG_FILE, VOCABULARY_FILE, best_checkpoint

CARD_TEMPLATE = Path(__file__).with_name("model_card.md")
INDEX = f"`{INDEX_FILE}` holds the names of the training images and their captions."
NO_INDEX = "The training images and their captions are not in the file; config.json names unreadable images and copies."
OPTIONAL_FILES = ("cnn.h5", "cnn.weights.h5", "history.csv", "loss.png")
PACKAGES = ("tensorflow", "keras", "numpy")  # whose versions the card names
EPOCH = (1980, 1, 1, 0, 0, 0)  # the time of every file in the .zip, the first that it can hold
FILE_MODE = 0o100644  # a plain file that its owner may write


def pack_run(run: Path, path: Path, with_consensus: bool = False) -> None:
    """Packs a run's best weights with all that captioning needs, its scores and a model card.

    Paths of this machine are left out, and the captions of the training images, unless `with_consensus` asks for the
    index of --choose consensus. The same run, packed by the same versions, gives the same bytes.

    Raises:
        InputError: something of the run is missing or damaged.
    """
    model, _, config = inference.load_run(run)
    check_cnn(run, config.features.get("sha256"))
    if with_consensus:
        _check_index(run, config)
    optional = (*OPTIONAL_FILES, INDEX_FILE) if with_consensus else OPTIONAL_FILES
    name, values = run_name(run), without_paths(config.to_json())
    config = dataclasses.replace(config, data=type(config.data)(**values["data"]), features=values["features"])
    paths = [path for path in sorted(run.glob("metrics_*.json")) if METRICS.fullmatch(path.name)]
    metrics = {path.name: read_json(path) for path in paths}
    for scored in metrics.values():  # beside the scores is the training caption that is the best one for all images
        if isinstance(scored, dict) and isinstance(scored.get("baselines"), dict) and not with_consensus:
            scored["baselines"].pop("constant", None)
    card = _make_card(name, config, metrics, model.count_params(), INDEX if with_consensus else NO_INDEX)
    files = {
        CARD_FILE: card.encode(errors="backslashreplace"),
        CONFIG_FILE: json.dumps(values, indent=2).encode(),
        VOCABULARY_FILE: (run / VOCABULARY_FILE).read_bytes(),
        STATE_FILE: STATE,
        **_read_checkpoint(best_checkpoint(run)),
        **{file: (run / file).read_bytes() for file in optional if (run / file).is_file()},
        **{file: json.dumps({**scored, "run": name}, indent=2).encode() for file, scored in metrics.items()},
    }
    with atomic_write(path, "wb") as target, zipfile.ZipFile(target, "w") as archive:
        for file, content in files.items():
            info = zipfile.ZipInfo(f"{name}/{file}", EPOCH)
            info.create_system, info.external_attr = 3, FILE_MODE << 16  # as on Unix, also where Windows packs it
            archive.writestr(info, content)  # not compressed: weights cannot be, and zlib's bytes differ by version


def _check_index(run: Path, config: RunConfig) -> None:
    """Raises InputError if a run has no index of --choose consensus, or one of other data."""
    path, hint = run / INDEX_FILE, f"make it with `python -m beyond.consensus --run {run}`"
    if not path.is_file():
        raise InputError(f"{path}: no such file; {hint}")
    if not is_current(Index.load(path), config):
        raise InputError(f"{path}: made from other images or captions, or for other weights; {hint}")


def run_name(run: Path) -> str:
    """Returns the name of a run folder, without what cannot be part of a file's name everywhere."""
    name = re.sub(r"[^\w.-]+", "_", run.resolve().name).lstrip(".-")[:80]
    return name if RUN_NAME.fullmatch(name) else "run"


def _read_checkpoint(prefix: str) -> dict[str, bytes]:
    """Returns the files of a checkpoint by their names in the .zip."""
    patterns = (".index", ".data-?????-of-?????")
    paths = [path for pattern in patterns for path in sorted(glob.glob(glob.escape(prefix) + pattern))]
    return {f"{BEST}/{PREFIX}{path.removeprefix(prefix)}": Path(path).read_bytes() for path in paths}


# The model card.


def _make_card(name: str, config: RunConfig, metrics: dict[str, Any], num_weights: int, index: str) -> str:
    """Fills model_card.md in: what a run is, how it was trained and scored, and its limits (Mitchell et al. 2019)."""
    features, data = config.features, config.data
    scores = [_score_row(file, scored) for file, scored in metrics.items()]
    cnn_weights = {"imagenet": "ImageNet's", "random": "random"}.get(features["weights"], "the author's")
    return CARD_TEMPLATE.read_text(encoding="utf-8").format(
        name=name,
        model_index=json.dumps(_model_index(name, str(data.annotations or data.dataset), metrics)),
        cnn=config.cnn.name,
        cnn_weights=cnn_weights + (f", SHA-256 `{features['sha256']}`" if "sha256" in features else ""),
        image_size=config.cnn.image_size,
        dtype=features["dtype"],
        source=f"the annotations `{data.annotations}`" if data.annotations else f"the dataset {data.dataset}",
        data=_list_changed(data),
        num_unreadable=len(config.unreadable_images),
        index=index,
        fingerprint=config.data_fingerprint,
        cell="an LSTM" if config.model.decoder == "paper-lstm" else "a GRU",
        attention=config.model.attention,
        vocab_size=config.model.vocab_size,
        num_weights=num_weights,
        model=", ".join(f"{field} {value}" for field, value in config.model.to_json().items()),
        train=_list_changed(config.train),
        versions=", ".join(f"{package} {version(package)}" for package in PACKAGES),
        scores="\n".join(scores) or "| TO FILL IN: none were measured, `evaluate.py` does | | | | |",
    )


def _list_changed(settings: Settings) -> str:
    """Returns the settings that are not the defaults, as `name value`, joined by commas."""
    defaults = type(settings)().to_json()
    changed = {name: value for name, value in settings.to_json().items() if value != defaults[name]}
    return ", ".join(f"{name} {value}" for name, value in changed.items()) or "none"


def _model_index(name: str, data: str, metrics: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the scores in the form that model hubs read at the head of a card, as `model-index`; its YAML is JSON."""
    results = [
        {
            "task": {"type": "image-to-text", "name": "Image Captioning"},
            "dataset": {"type": data, "name": data, "split": scored["split"]},
            "metrics": [
                {"type": score.split("-")[0].lower(), "name": f"{score}, {file}", "value": value}
                for score, value in scored["scores"].items()
            ],
        }
        for file, scored in metrics.items()
    ]
    return [{"name": name, "results": results}] if results else []


def _score_row(file: str, scored: Any) -> str:
    """Returns the row of the table of scores for a file of evaluate.py; raises InputError if it is something else."""
    try:
        names = {field.name for field in dataclasses.fields(DecodeConfig)}
        search = DecodeConfig(**{name: value for name, value in scored.items() if name in names})
        scores = ", ".join(f"{metric} {value:.1f}" for metric, value in scored["scores"].items())
        how = f"{search.describe()} ({_list_changed(search)})"
        return f"| {scored['split']} | {scored['images']:,} | {how} | {scored['tokenizer']} | {scores} |"
    except (InputError, AttributeError, KeyError, TypeError, ValueError) as error:
        raise InputError(
            f"{file}: expected the scores that evaluate.py writes ({error}); delete it, or score the run again"
        ) from None
