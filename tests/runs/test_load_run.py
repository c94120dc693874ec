"""Finding and loading a run: its weights, vocabulary and settings, and its dataset, checked against each other."""

import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data_utils
from captioning.base.cli import InputError
from captioning.config.run_config import FORMAT
from captioning.runs import run_folder
from captioning.runs.run_folder import open_run, read_config
from inference import load_run


def test_open_run_leaves_folders_to_the_core_and_the_rest_to_the_guest(run, tmp_path, monkeypatch):
    opened = []
    guest = SimpleNamespace(open_run=lambda run: opened.append(run) or Path("unpacked"))
    monkeypatch.setattr(run_folder, "load_guest", {"--run ZIP": guest}.get)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    (tmp_path / "packed").touch()
    assert open_run(None) == run.relative_to(tmp_path)
    assert open_run(run) == open_run(str(run)) == run and open_run("folder.zip") == Path("folder.zip")
    assert open_run("none") == Path("none"), "an error is reported when it is read"
    assert open_run("") == Path(), "not the latest: a variable of the shell may be empty"
    assert opened == []
    others = ["packed", Path("none.zip"), "https://example.com/run.zip"]
    assert [open_run(each) for each in others] == [Path("unpacked")] * 3 and opened == others


def test_load_run_restores_what_was_saved(run, small_model, tokenizer):
    caption_model, loaded_tokenizer, config = load_run(run)
    assert loaded_tokenizer.index_word == tokenizer.index_word and config == read_config(run)
    for variable, expected in zip(caption_model.trainable_variables, small_model.trainable_variables, strict=True):
        np.testing.assert_array_equal(variable, expected)


def test_load_run_refuses_vocabulary_of_other_weights(run):
    path = run / "vocabulary.json"
    words = json.loads(path.read_text())
    words[-1], words[-2] = words[-2], words[-1]
    path.write_text(json.dumps(words))
    with pytest.raises(InputError, match="not the vocabulary these weights were trained with"):
        load_run(run)


def test_load_run_refuses_settings_of_other_weights(run):
    path = run / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"model": config["model"] | {"units": 20}}))
    with pytest.raises(InputError, match=r"damaged, or not the weights of this config\.json"):
        load_run(run)
    path.write_text(json.dumps({"format": FORMAT, "model": {}}))
    with pytest.raises(InputError, match=r"not the config\.json of a run"):
        load_run(run)


# The dataset of the run.


def test_load_run_dataset_excludes_unreadable_images(run, saved_dataset):
    config = read_config(run)
    assert data_utils.load_run_dataset(config).examples == saved_dataset.examples
    unreadable = saved_dataset.examples[0].image_path
    smaller = saved_dataset.exclude({unreadable})
    config = dataclasses.replace(config, unreadable_images=(unreadable,), data_fingerprint=smaller.fingerprint)
    assert data_utils.load_run_dataset(config).examples == saved_dataset.examples[1:]


def test_load_run_dataset_moves_copies_as_in_training(run, saved_dataset):
    copies = {example.image_path: "test" for example in saved_dataset.split("val")}
    moved = saved_dataset.move(copies)
    assert len(moved.split("test")) == len(saved_dataset.split("test")) + len(copies) and not moved.drawn_splits
    config = dataclasses.replace(read_config(run), moved_copies=copies, data_fingerprint=moved.fingerprint)
    assert data_utils.load_run_dataset(config).examples == moved.examples


def test_load_run_dataset_refuses_changed_data(run, saved_dataset, monkeypatch):
    config = read_config(run)
    with pytest.raises(InputError, match="the data have changed since this run was trained"):
        data_utils.load_run_dataset(dataclasses.replace(config, data_fingerprint="0123"))

    def fail(*_):
        raise InputError("no such file")

    monkeypatch.setattr(data_utils, "load_dataset", fail)
    with pytest.raises(InputError, match=r"the data of the run's config\.json: no such file"):
        data_utils.load_run_dataset(config)
