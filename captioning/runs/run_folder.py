"""The run folder: what train.py leaves, and everything that captioning needs.

runs/coco/config.json                        the settings of the run (`captioning.config.run_config.RunConfig`)
runs/coco/vocabulary.json                    the tokenizer
runs/coco/cnn*.h5                            the CNN's weights, unless they are ImageNet's
runs/coco/checkpoints/last, checkpoints/best the state of the training, and the weights with the best score

Paths in config.json are absolute, or relative to the run folder: the run is found from any folder, and can be moved
together with its data.
"""

import dataclasses
import functools
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError, first_line, log, log_once
from captioning.base.files import (
    atomic_write,
    check_schema,
    file_sha256,
    plain_path,
    read_json,
    relative_path,
    write_json,
)
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN
from captioning.config.guests import load_guest
from captioning.config.run_config import FORMAT, RunConfig
from captioning.config.settings import DATA_PATHS, DataConfig, FeatureConfig, ModelConfig, TrainConfig
from captioning.data.annotations import SPLITS
from captioning.images.feature_cache import check_manifest, find_cnn_weights

CONFIG_FILE = "config.json"
VOCABULARY_FILE = "vocabulary.json"
CONFIG_SCHEMA = {
    "model": dict,
    "train": dict,
    "data": dict,
    "objective": dict,
    "features": dict,
    "unreadable_images": list,
    "data_fingerprint": str,
    "vocabulary_sha256": str,
}


# Finding a run and its checkpoints.


def open_run(run: str | Path | None) -> Path:
    """Returns the run folder that `--run` names, which is checked when it is read; without a name, the latest run.

    A .zip of a folder, or its address, is unpacked.
    """
    if run is None:
        return latest_run()
    path = Path(run)
    is_zip = path.is_file() or (path.suffix.lower() == ".zip" and not path.is_dir())
    if is_zip or "://" in str(run):
        return load_guest("--run ZIP").open_run(run)
    return path


def latest_run(folder: Path | str = "runs") -> Path:
    """Returns the run whose checkpoint was written last."""
    checkpoints = sorted(Path(folder).glob("*/checkpoints/*/checkpoint"), key=lambda path: path.stat().st_mtime)
    if not checkpoints:
        raise InputError(
            f"no run with a checkpoint in {folder}/; train one with `python train.py`, or name one with --run"
        )
    return checkpoints[-1].parents[2]


def best_checkpoint(run: Path) -> str:
    """Returns the prefix of a run's best checkpoint, or of its last one if there is no best, or a damaged one."""
    if not (run / CONFIG_FILE).exists():
        raise InputError(f"{run}: not a run folder (it has no {CONFIG_FILE}); expected one that train.py made")
    problem = None
    for name in ("best", "last"):
        try:
            prefix = latest_checkpoint(run / "checkpoints" / name)
        except InputError as error:
            problem = problem or error
            continue
        if prefix:
            if problem and "cnn_learning_rate" in read_config(run).objective:
                raise InputError(f"{problem}, and {run}'s CNN fits no other weights; run its training again to mend it")
            if problem:
                log_once(f"{problem}: {prefix} is taken instead")
            return prefix
    if problem:
        raise InputError(f"{problem}, and there is no other; put a copy back, or train it again") from None
    raise InputError(f"{run}: no checkpoint in {run / 'checkpoints'}/; train it with `python train.py`")


def latest_checkpoint(folder: Path) -> str | None:
    """Returns the prefix of the latest checkpoint in a folder that is whole, or None if there is none at all.

    Raises:
        InputError: all are damaged.
    """
    damages = []
    for prefix in list_checkpoints(folder):
        if damage := _find_damage(prefix):
            damages.append(f"{prefix} is damaged ({damage})")
            continue
        if damages:
            log_once(f"{damages[0]}: {prefix} is taken instead")
        return prefix
    if damages:
        raise InputError(damages[0])
    return None


def list_checkpoints(folder: Path) -> list[str]:
    """Returns the prefixes of the checkpoints in a folder, the latest first.

    It is the one that the file `checkpoint` names. Others follow by their numbers, also where that file is damaged.
    """
    state = folder / "checkpoint"
    named = re.match(rb'model_checkpoint_path: "(ckpt-\d+)"\s', state.read_bytes()) if state.is_file() else None
    names = [path.stem for path in folder.glob("ckpt-*.index") if path.stem[5:].isdecimal()]
    names.sort(key=lambda name: int(name[5:]), reverse=True)
    latest = [named[1].decode()] if named else names[:1] or ["ckpt-1"] * state.is_file()
    return [str(folder / name) for name in dict.fromkeys(latest + names)]


def _find_damage(prefix: str) -> str | None:
    """Returns why a checkpoint cannot be read, in a few words; None if all of it can. It holds checksums."""
    files = ((path, path.stat()) for path in sorted(Path(prefix).parent.glob(f"{Path(prefix).name}.*")))
    return _try_to_read(prefix, tuple((str(path), stat.st_mtime_ns, stat.st_size) for path, stat in files))


@functools.cache  # as long as the files stay as they are
def _try_to_read(prefix: str, files: tuple[tuple[str, int, int], ...]) -> str | None:
    if not os.path.exists(f"{prefix}.index"):
        return "its .index is missing"
    try:
        reader = tf.train.load_checkpoint(str(plain_path(prefix)))
        for name in reader.get_variable_to_shape_map():
            reader.get_tensor(name)
    except (tf.errors.OpError, ValueError, IndexError) as error:
        return first_line(error)
    return None


def restore_model(prefix: str, config: ModelConfig, build: Callable[[ModelConfig], tf.keras.Model]) -> tf.keras.Model:
    """Builds a model and restores its weights from a checkpoint, which is refused if it is another model's."""
    sizes = {config.vocab_size, config.embedding_dim, config.units}
    try:
        shapes = tf.train.load_checkpoint(str(plain_path(prefix))).get_variable_to_shape_map().values()
        # Checked before the model is built: a damaged size could ask for more memory than there is.
        if missing := sizes - {size for shape in shapes for size in shape}:
            raise ValueError(f"no weights of size {min(missing)} in it")
        model = build(config)
    except (tf.errors.OpError, ValueError, IndexError) as error:
        raise _not_weights(prefix, error) from None
    restore_weights(prefix, model)
    return model


def restore_weights(prefix: str, model: tf.keras.Model) -> None:
    """Restores the weights of a model from a checkpoint, which is refused if it is damaged or another model's."""
    try:
        checkpoint = tf.train.Checkpoint(model=model)
        checkpoint.restore(str(plain_path(prefix))).expect_partial().assert_existing_objects_matched()
    except (tf.errors.OpError, ValueError, IndexError, AssertionError) as error:
        raise _not_weights(prefix, error) from None


def _not_weights(prefix: str, error: Exception) -> InputError:
    return InputError(f"{prefix}: damaged, or not the weights of this config.json ({first_line(error)})")


# config.json.


def write_config(run: Path, config: RunConfig) -> None:
    """Writes a run's config.json."""
    write_json(run / CONFIG_FILE, _map_paths(config.to_json(), lambda path: relocate(path, Path(), run)))


def relocate(path: str, old_folder: Path, new_folder: Path) -> str:
    """Returns a path that is relative to one folder as it is relative to another; an absolute one stays."""
    if not path or os.path.isabs(path):
        return path
    return relative_path(os.path.join(os.path.realpath(old_folder), path), os.path.realpath(new_folder))


def _map_paths(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """Returns the content of a config.json with its paths changed."""
    data, manifest = dict(values["data"]), dict(values["features"])
    for section, names in ((data, DATA_PATHS), (manifest, ("folder", "weights"))):
        for name in names:
            is_path = name != "weights" or section.get(name) not in ("imagenet", "random")
            if is_path and isinstance(section.get(name), str):
                section[name] = change(section[name])
    return {**values, "data": data, "features": manifest}


def read_config(run: Path) -> RunConfig:
    """Reads a run's config.json and checks every value; its paths are then relative to the current folder."""
    path = run / CONFIG_FILE
    values = read_json(path)
    if isinstance(values, dict) and values.get("format") != FORMAT:
        raise InputError(
            f"{path}: this run was made by another version (expected format {FORMAT}, found "
            f"{str(values.get('format'))[:60]}); train it again, or caption with the version that made it"
        )
    try:
        check_schema(values, CONFIG_SCHEMA)
        values = _map_paths(values, lambda path: relocate(path, run, Path()))
        check_manifest(values["features"])
        check_schema(values["features"], {"folder": str})
        if not all(isinstance(name, str) for name in values["unreadable_images"]):
            raise InputError(f"unreadable_images: expected names of images, found {values['unreadable_images']}")
        moved_copies = values.get("moved_copies", {})  # which runs of 1.0 do not have
        if not isinstance(moved_copies, dict) or not all(split in SPLITS for split in moved_copies.values()):
            raise InputError(f"moved_copies: expected splits of images, found {moved_copies}")
        return RunConfig(
            model=ModelConfig.from_json(values["model"]),
            train=TrainConfig.from_json(values["train"]),
            data=DataConfig.from_json(values["data"]),
            objective=values["objective"],
            features=values["features"],
            unreadable_images=tuple(values["unreadable_images"]),
            data_fingerprint=values["data_fingerprint"],
            vocabulary_sha256=values["vocabulary_sha256"],
            moved_copies=moved_copies,
        )
    except InputError as error:
        raise InputError(f"{path}: not the config.json of a run ({error})") from None


def find_config(run: Path) -> RunConfig | None:
    """Reads a folder's config.json, see `read_config`; None if it holds no run yet."""
    return read_config(run) if (run / CONFIG_FILE).exists() else None


def fill_locations(run: Path, data: DataConfig, features: FeatureConfig) -> tuple[DataConfig, FeatureConfig]:
    """Fills in where downloads and features are, if it is not said: as in the run that is resumed, else the default."""
    saved = find_config(run)
    if data.data_dir is None:
        data = dataclasses.replace(data, data_dir=(saved and saved.data.data_dir) or "data")
    if features.features_dir is None and saved:
        features = dataclasses.replace(features, features_dir=saved.features["folder"])
    return data, features


def check_resumed(run: Path, model: ModelConfig, train: TrainConfig, data: DataConfig, cnn: CNN) -> None:
    """Checks that a run, if there is one in the folder, has these settings: before downloads, and not after.

    `init_run_dir` compares what is known only once the data are there.
    """
    if not (saved := find_config(run)):
        return
    model = dataclasses.replace(model, vocab_size=saved.model.vocab_size)  # few captions have fewer words
    if difference := dataclasses.replace(saved, model=model, train=train, data=data).difference(saved):
        name, value, saved_value = difference
        raise _other_settings(run, name, saved_value, value)
    if bool(saved.data.annotations) != bool(data.annotations):  # where they are may change, but not from here to COCO
        raise _other_settings(run, "annotations", saved.data.annotations, data.annotations)
    if saved.cnn.name != cnn.name:
        raise _other_settings(run, "cnn", saved.cnn.name, cnn.name)
    if saved.cnn != cnn:
        raise _other_settings(run, "image_size", saved.cnn.image_size, cnn.image_size)


def _other_settings(run: Path, name: str, saved_value: Any, value: Any) -> InputError:
    advice = "restore them to resume it; to start anew, rename this folder or give another --run"
    if name == "unreadable_images":
        first = min(set(value) ^ set(saved_value))
        return InputError(
            f"{run} was trained without {len(saved_value):,} images that could not be read, found {len(value):,} such "
            f"images now, {first} is the first that is another; {advice}"
        )
    if name == "data_fingerprint":
        return InputError(f"{run} was trained on other images, splits or captions than there are now; {advice}")
    return InputError(
        f"{run} was trained with {name} = {saved_value}, expected {value}; give its settings to resume it; to "
        "start anew, rename this folder or give another --run"
    )


def init_run_dir(run: Path, config: RunConfig, save_vocabulary: Callable[[Path], None], cnn_weights: str) -> None:
    """Creates a run folder, or checks that an existing one was made with the same settings.

    Args:
        run: the folder.
        config: the settings; the SHA-256 of the vocabulary is filled in here.
        save_vocabulary: writes the vocabulary into a file.
        cnn_weights: the weights of the CNN. A file is copied into the folder, unless a copy is there: ImageNet's can be
            downloaded anywhere, others exist only on this machine.

    Raises:
        InputError: the folder holds a run with other settings; the setting and both values are named.
    """
    vocabulary = run / VOCABULARY_FILE
    if saved := find_config(run):
        if difference := config.difference(saved):
            name, value, saved_value = difference
            raise _other_settings(run, name, saved_value, value)
        if not vocabulary.exists() or file_sha256(vocabulary) != saved.vocabulary_sha256:
            log(f"{vocabulary} is missing or damaged: it is written again")
        with tempfile.TemporaryDirectory() as folder:
            save_vocabulary(Path(folder) / VOCABULARY_FILE)
            if file_sha256(Path(folder) / VOCABULARY_FILE) != saved.vocabulary_sha256:
                raise InputError(
                    f"{run} has another vocabulary than these captions and options give, and its weights know words by "
                    "their places in it; resume it with the --start and --keep-words of its training, or give another "
                    "--run to start anew"
                )
    save_vocabulary(vocabulary)
    if os.path.isfile(cnn_weights) and not find_cnn_weights(run):
        # Keras distinguishes two file formats by these endings.
        name = "cnn.weights.h5" if cnn_weights.endswith(".weights.h5") else "cnn.h5"
        with open(cnn_weights, "rb") as source, atomic_write(run / name, "wb") as target:
            shutil.copyfileobj(source, target)
    write_config(run, dataclasses.replace(config, vocabulary_sha256=file_sha256(vocabulary)))
