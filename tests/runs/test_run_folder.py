import dataclasses
import json
import os
import re
import shutil

import pytest
from helpers.fixtures import MANIFEST

from captioning.base.cli import InputError
from captioning.base.files import file_sha256, read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNNS, INCEPTION_V3
from captioning.config.run_config import FORMAT, RunConfig
from captioning.config.settings import DataConfig, FeatureConfig, ModelConfig, TrainConfig
from captioning.runs.run_folder import (
    best_checkpoint,
    check_resumed,
    fill_locations,
    init_run_dir,
    latest_checkpoint,
    latest_run,
    read_config,
    restore_model,
    write_config,
)

CONFIG = RunConfig(
    model=ModelConfig(vocab_size=11, embedding_dim=3, units=5),
    train=TrainConfig(),
    data=DataConfig(),
    objective={},
    features=MANIFEST | {"folder": "features/coco"},
    unreadable_images=("bad.jpg",),
    data_fingerprint="0123",
    vocabulary_sha256="4567",
    moved_copies={"a.jpg": "val"},
)


class SmallModel(tf.Module):
    """Has a weight for each of a model's sizes."""

    def __init__(self, config):
        super().__init__()
        self.weights = [
            tf.Variable(tf.ones((size, 2))) for size in (config.vocab_size, config.embedding_dim, config.units)
        ]


def save_checkpoint(folder, value=1.0):
    """Saves the weights of a SmallModel, all of this value, and returns the prefix."""
    model = SmallModel(CONFIG.model)
    for variable in model.weights:
        variable.assign(tf.fill(variable.shape, value))
    return tf.train.CheckpointManager(tf.train.Checkpoint(model=model), str(folder), max_to_keep=1).save()


def save_vocabulary(path):
    write_json(path, ["a"])


@pytest.fixture
def run(tmp_path):
    """A run folder with both checkpoints."""
    run = tmp_path / "runs/small"
    init_run_dir(run, CONFIG, save_vocabulary, "imagenet")
    for name, value in (("best", 2.0), ("last", 3.0)):
        save_checkpoint(run / "checkpoints" / name, value)
    return run


# Checkpoints.


def test_latest_run_has_the_newest_checkpoint(run):
    folder = run.parent
    older = folder / "older"
    save_checkpoint(older / "checkpoints/last")
    for path in older.rglob("checkpoint"):
        os.utime(path, (1, 1))
    assert latest_run(folder) == run
    for path in run.rglob("checkpoint"):
        os.utime(path, (0, 0))
    assert latest_run(folder) == older


def test_best_checkpoint_falls_back_to_last(run):
    assert best_checkpoint(run) == latest_checkpoint(run / "checkpoints/best")
    shutil.rmtree(run / "checkpoints/best")
    assert best_checkpoint(run) == latest_checkpoint(run / "checkpoints/last")


def damage_checkpoint(folder):
    data = next(folder.glob("*.data-*"))
    data.write_bytes(data.read_bytes()[:-1])


def test_best_checkpoint_falls_back_from_a_damaged_one_in_one_line(run, capsys):
    best, last = run / "checkpoints/best/ckpt-1", run / "checkpoints/last/ckpt-1"
    damage_checkpoint(best.parent)
    for _ in range(2):
        assert best_checkpoint(run) == str(last)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.fullmatch(rf"{best} is damaged \(.+\): {last} is taken instead", line)
    write_config(run, dataclasses.replace(read_config(run), objective={"cnn_learning_rate": 1e-4}))
    with pytest.raises(InputError, match=rf"^{best} is damaged .* CNN fits no other weights; run its training again"):
        best_checkpoint(run)
    damage_checkpoint(last.parent)
    with pytest.raises(
        InputError, match=rf"^{best} is damaged \(.+\), and there is no other; put a copy back, or train"
    ):
        best_checkpoint(run)


def test_best_checkpoint_refuses_other_folders(tmp_path, run):
    with pytest.raises(InputError, match="not a run folder"):
        best_checkpoint(tmp_path)
    shutil.rmtree(run / "checkpoints")
    with pytest.raises(InputError, match="no checkpoint"):
        best_checkpoint(run)


@pytest.mark.parametrize("content", [b"\xff\xfe", b"", b'model_checkpoint_path: "ckpt-99"\n'])
def test_latest_checkpoint_is_found_without_its_state_file(run, content):
    folder = run / "checkpoints/last"
    (folder / "checkpoint").write_bytes(content)
    assert latest_checkpoint(folder) == str(folder / "ckpt-1")
    (folder / "ckpt-1.index").unlink()
    with pytest.raises(InputError, match=r"ckpt-\d+ is damaged \(its \.index is missing\)$"):
        latest_checkpoint(folder)


def test_restore_model_has_the_saved_weights(run):
    model = restore_model(best_checkpoint(run), CONFIG.model, SmallModel)
    assert all((variable.numpy() == 2).all() for variable in model.weights)


def test_restore_model_refuses_other_sizes_before_it_builds(run):
    def fail(config):
        raise AssertionError("a model of this size must not be built")

    config = dataclasses.replace(CONFIG.model, units=10**30)
    with pytest.raises(InputError, match=r"damaged, or not the weights of this config\.json .*no weights of size"):
        restore_model(best_checkpoint(run), config, fail)


# config.json.


def test_read_config_returns_what_write_config_wrote(run):
    write_config(run, CONFIG)
    assert read_config(run) == CONFIG
    assert json.loads((run / "config.json").read_text())["format"] == FORMAT


def test_paths_are_found_from_any_folder_and_move_with_the_project(tmp_path, monkeypatch):
    project = tmp_path / "project"
    (project / "notebooks").mkdir(parents=True)
    monkeypatch.chdir(project)
    data = DataConfig(annotations="captions.csv", images="/mnt/photos", val_list="lists/val.txt", data_dir="data")
    features = {**CONFIG.features, "weights": "weights.h5", "sha256": "89", "folder": "features/photos"}
    config = dataclasses.replace(CONFIG, data=data, features=features)
    run = project / "runs/photos"
    write_config(run, config)
    saved = json.loads((run / "config.json").read_text())
    assert saved["data"]["annotations"] == "../../captions.csv" and saved["data"]["images"] == "/mnt/photos"
    assert saved["data"]["val_list"] == "../../lists/val.txt" and saved["data"]["test_list"] is None
    assert saved["features"]["weights"] == "../../weights.h5" and saved["features"]["folder"] == "../../features/photos"
    assert saved["features"]["images"] == "../images", "which is relative to the features"
    assert read_config(run) == config
    monkeypatch.chdir("notebooks")
    read = read_config(run)
    assert (read.data.annotations, read.data.images, read.features["folder"]) == (
        "../captions.csv",
        "/mnt/photos",
        "../features/photos",
    )
    write_config(run, read)
    assert json.loads((run / "config.json").read_text()) == saved, "a resumed run keeps its paths"
    monkeypatch.chdir(tmp_path)
    project.rename(tmp_path / "moved")
    assert read_config(tmp_path / "moved/runs/photos").data.annotations == "moved/captions.csv"


def test_fill_locations_takes_those_of_the_run_that_is_resumed(run, tmp_path):
    new = fill_locations(tmp_path / "new", DataConfig(), FeatureConfig())
    assert new == (DataConfig(data_dir="data"), FeatureConfig())
    write_config(run, dataclasses.replace(CONFIG, data=DataConfig(data_dir="/mnt/data")))
    data, features = fill_locations(run, DataConfig(), FeatureConfig())
    assert (data.data_dir, features.features_dir) == ("/mnt/data", "features/coco")
    given = DataConfig(data_dir="here"), FeatureConfig(features_dir="there")
    assert fill_locations(run, *given) == given


def edit_config(run, **changes):
    path = run / "config.json"
    values = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in values.items() if value != "deleted"}))


@pytest.mark.parametrize("value", ["deleted", FORMAT - 1, FORMAT + 1])
def test_read_config_refuses_other_formats(run, value):
    edit_config(run, format=value)
    with pytest.raises(
        InputError, match=r"config\.json: .* made by another version .* train it again, or caption with"
    ):
        read_config(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {**CONFIG.model.to_json(), "heads": 8}}, "heads is not a setting"),
        ({"train": "deleted"}, "train is missing"),
        ({"features": {**CONFIG.features, "dtype": "int8"}}, "dtype: expected float16 or float32"),
        ({"features": {k: v for k, v in CONFIG.features.items() if k != "folder"}}, "folder is missing"),
        ({"unreadable_images": [1]}, "unreadable_images: expected names of images"),
        ({"moved_copies": {"a.jpg": "vall"}}, "moved_copies: expected splits of images"),
        ({"moved_copies": ["a.jpg"]}, "moved_copies: expected splits of images"),
        ({"data_fingerprint": None}, "data_fingerprint: expected str, found 'None'"),
    ],
)
def test_read_config_refuses_wrong_values(run, changes, message):
    edit_config(run, **changes)
    with pytest.raises(InputError, match=rf"not the config\.json of a run \(.*{re.escape(message)}"):
        read_config(run)


def test_init_run_dir_writes_settings_and_vocabulary(tmp_path):
    run = tmp_path / "new"
    init_run_dir(run, CONFIG, save_vocabulary, "imagenet")
    sha256 = file_sha256(run / "vocabulary.json")
    assert read_config(run) == dataclasses.replace(CONFIG, vocabulary_sha256=sha256)
    assert sorted(path.name for path in run.iterdir()) == ["config.json", "vocabulary.json"]


def test_init_run_dir_refuses_other_settings(run):
    before = (run / "config.json").read_bytes()
    config = dataclasses.replace(CONFIG, train=TrainConfig(batch_size=6))
    with pytest.raises(InputError, match=r"was trained with batch_size = 64, expected 6; give its settings to resume"):
        init_run_dir(run, config, save_vocabulary, "imagenet")
    assert (run / "config.json").read_bytes() == before
    init_run_dir(run, dataclasses.replace(CONFIG, train=TrainConfig(epochs=99)), save_vocabulary, "imagenet")
    assert read_config(run).train.epochs == 99, "more epochs may be asked for"


def test_init_run_dir_says_that_the_data_have_changed(run):
    for changes, message in (
        ({"data_fingerprint": "other"}, "was trained on other images, splits or captions than there are now; restore"),
        (
            {"unreadable_images": ("bad.jpg", "b.jpg")},
            r"trained without 1 images .*, found 2 such images now, b\.jpg is",
        ),
    ):
        model = dataclasses.replace(CONFIG.model, vocab_size=7)  # another, since the captions are others
        with pytest.raises(InputError, match=message):
            init_run_dir(run, dataclasses.replace(CONFIG, model=model, **changes), save_vocabulary, "imagenet")


def test_check_resumed_compares_all_that_is_known_without_the_data(run):
    few_words = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, vocab_size=830))
    write_config(run, few_words)
    check_resumed(run / "none", ModelConfig(units=7), CONFIG.train, CONFIG.data, CNNS["vgg19"])
    check_resumed(run, CONFIG.model, CONFIG.train, CONFIG.data, INCEPTION_V3)
    other_data = dataclasses.replace(CONFIG.data, num_captions=0)
    with pytest.raises(InputError, match="was trained with num_captions = None, expected 0; give its settings"):
        check_resumed(run, CONFIG.model, CONFIG.train, other_data, INCEPTION_V3)
    own_data = dataclasses.replace(CONFIG.data, annotations="a.csv")
    with pytest.raises(InputError, match=r"was trained with annotations = None, expected a\.csv"):
        check_resumed(run, CONFIG.model, CONFIG.train, own_data, INCEPTION_V3)
    for cnn, message in (
        (CNNS["vgg19"], "cnn = InceptionV3, expected VGG19"),
        (INCEPTION_V3.at(400), "299, expected 400"),
    ):
        with pytest.raises(InputError, match=f"{message}; give its settings to"):
            check_resumed(run, CONFIG.model, CONFIG.train, CONFIG.data, cnn)


def test_init_run_dir_restores_missing_or_damaged_vocabulary(run, capsys):
    init_run_dir(run, CONFIG, save_vocabulary, "imagenet")
    assert capsys.readouterr().err == ""
    for damage in (lambda path: path.unlink(), lambda path: path.write_text("[")):
        damage(run / "vocabulary.json")
        init_run_dir(run, CONFIG, save_vocabulary, "imagenet")
        assert "vocabulary.json is missing or damaged" in capsys.readouterr().err
        assert read_json(run / "vocabulary.json") == ["a"]


def test_init_run_dir_refuses_another_vocabulary(run):
    """As it would be without the --keep-words of the training: the weights know words by their places in it."""
    with pytest.raises(InputError, match="has another vocabulary than these captions and options give"):
        init_run_dir(run, CONFIG, lambda path: write_json(path, ["b"]), "imagenet")
    assert read_json(run / "vocabulary.json") == ["a"]


@pytest.mark.parametrize(
    ("name", "copy"),
    [("cnn.weights.h5", "cnn.weights.h5"), ("mine.weights.h5", "cnn.weights.h5"), ("mine.h5", "cnn.h5")],
)
def test_init_run_dir_keeps_the_first_copy_of_the_cnn_weights(tmp_path, name, copy):
    weights_file = tmp_path / name
    weights_file.write_text("weights")
    run = tmp_path / "run"
    init_run_dir(run, CONFIG, save_vocabulary, str(weights_file))
    assert (run / copy).read_text() == "weights"
    weights_file.write_text("other weights")
    init_run_dir(run, CONFIG, save_vocabulary, str(weights_file))
    assert [(path.name, path.read_text()) for path in run.glob("cnn*.h5")] == [(copy, "weights")]
