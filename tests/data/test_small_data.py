"""Few images: how they are split, and which epoch is chosen by one validation image."""

import dataclasses

import pytest
from helpers.runs import run_training

import evaluate
import inference
import train
from captioning.base.cli import InputError
from captioning.config.settings import DataConfig
from captioning.data.annotations import Example
from captioning.training import training_log
from captioning.training.validation import Validator
from data_utils import CaptionDataset, assign_splits
from tokenizer import Tokenizer

EXAMPLES = [Example(f"{number}.jpg", ("a dog",), number) for number in range(12)]


def split_sizes(num_images, **settings):
    """Splits so many images at random; returns the number of those for training, validation and testing."""
    examples = assign_splits(EXAMPLES[:num_images], DataConfig(**settings), {})
    return tuple(sum(example.split == split for example in examples) for split in ("train", "val", "test"))


def test_two_images_are_split_into_training_and_validation(capsys):
    assert split_sizes(2) == (1, 1, 0)
    message = "split: 2 images are too few to keep one for testing: there is no test image\n"
    assert capsys.readouterr().err == message
    assert split_sizes(2, test_fraction=0.0) == (1, 1, 0)
    assert capsys.readouterr().err == "", "none was asked for"


def test_too_few_images_to_split_are_refused():
    for num_images, val_fraction in ((1, 0.1), (3, 0.7)):
        message = f"^found {num_images} images, expected more: training and validation need at least one each$"
        with pytest.raises(InputError, match=message):
            split_sizes(num_images, val_fraction=val_fraction)


def test_more_images_have_one_in_every_split():
    assert [split_sizes(num_images) for num_images in (3, 4, 12)] == [(1, 1, 1), (2, 1, 1), (10, 1, 1)]


# Which epoch is chosen.


@pytest.fixture
def data(examples_and_cache, tmp_path):
    """12 images with three captions each, one of the images for validation; with their cache and tokenizer."""
    examples, cache = examples_and_cache
    examples = [
        dataclasses.replace(example, captions=(*example.captions, f"look, {example.captions[0]}"), split="")
        for example in examples[:12]
    ]
    dataset = CaptionDataset("small", tmp_path, tuple(assign_splits(examples, DataConfig(), {})))
    return dataset, cache, Tokenizer.fit(caption for example in dataset.split("train") for caption in example.captions)


@pytest.fixture(autouse=True)
def _without_plots(monkeypatch):
    monkeypatch.setattr(training_log, "plot_history", lambda *_: None)


@pytest.mark.slow
def test_epoch_without_a_caption_is_not_chosen_for_its_loss(data, tmp_path, monkeypatch, capsys):
    texts, losses = iter(("", "", "a dog", "a cat", "")), iter((1.0, 0.5, 2.5, 2.0, 0.25))
    monkeypatch.setattr(evaluate, "generate_captions", lambda *_: [inference.Caption(next(texts), (), (), None, 1.0)])
    monkeypatch.setattr(Validator, "loss", lambda _: next(losses))
    monkeypatch.setattr(train, "train_epoch", lambda *args: args[2].progress.token_count.assign(1))
    run_training(tmp_path / "run", data, epochs=5)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == (
        "too few validation images for CIDEr to choose the best epoch (found 1, expected at least 20): the validation "
        "loss chooses it"
    )
    assert lines[-1].startswith("best: epoch 4, validation loss 2.00; see ")
    assert lines.count("  (no words)") == 3
