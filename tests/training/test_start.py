"""Training that starts from the weights of another run."""

import dataclasses
import functools

import numpy as np
import pytest
from helpers.runs import run_training

import model
import train
from captioning.base.cli import InputError
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import FeatureConfig, ModelConfig
from captioning.runs.run_folder import init_run_dir, read_config
from captioning.training import start
from captioning.training.input_pipeline import TrainData
from captioning.training.validation import Validator
from tokenizer import SPECIAL_TOKENS, Tokenizer


@pytest.mark.parametrize("decoder", ["tutorial", "paper", "paper-lstm"])
def test_copy_weights_gives_every_word_its_own(tmp_path, run_config, tokenizer, decoder):
    run, config = tmp_path / "run", dataclasses.replace(run_config.model, decoder=decoder)
    source = model.build(config)
    init_run_dir(run, dataclasses.replace(run_config, model=config), tokenizer.save, "imagenet")
    tf.train.CheckpointManager(tf.train.Checkpoint(model=source), str(run / "checkpoints/best"), 1).save()
    new = Tokenizer((*SPECIAL_TOKENS, "unseen", "dog", "a"))
    target = model.build(dataclasses.replace(config, vocab_size=len(new)))
    drawn = [variable.numpy() for variable in target.trainable_variables]
    start.copy_weights(run, new, target)
    by_word = {id(variable): axis for variable, axis in target.decoder.variables_by_word()}
    assert len(by_word) == 3
    for before, after, trained in zip(drawn, target.trainable_variables, source.trainable_variables, strict=True):
        axis = by_word.get(id(after))
        if axis is None:
            np.testing.assert_array_equal(after, trained)
            continue
        ids = [*range(4), tokenizer.word_index["dog"], tokenizer.word_index["a"]]
        np.testing.assert_array_equal(np.delete(after, 4, axis), np.take(trained, ids, axis))
        unseen = np.mean(trained) if after.shape.rank == 1 else np.take(before, 4, axis)
        np.testing.assert_allclose(np.take(after, 4, axis), unseen, rtol=1e-6)


def test_a_start_has_the_score_of_its_run(run, run_config, small_model, tmp_path, dataset, cache, tokenizer, capsys):
    data = TrainData(dataset, cache, Tokenizer((*SPECIAL_TOKENS, *reversed(tokenizer.index_word[4:]))))
    build = functools.partial(train.build_train_state, start=functools.partial(start.copy_weights, run, data.tokenizer))
    run_training(tmp_path / "new", data, build=build, epochs=1, units=16)
    log, words = capsys.readouterr().err, len(tokenizer)
    loss = Validator(small_model, data._replace(tokenizer=tokenizer), run_config.train).loss()
    assert f"--start {run}: knows {words} of {words} words" in log
    assert f"score of the initial weights: validation loss {loss:.2f}" in log


def test_start_settings_are_those_of_the_run(run):
    settings = start.start_settings(run)
    assert (settings["units"], settings["embedding_dim"], settings["decoder"]) == (16, 8, "tutorial")
    assert (settings["cnn"], settings["image_size"], settings["cnn_weights"]) == ("inception_v3", 299, "imagenet")
    features, sizes = FeatureConfig(), ModelConfig(units=16, embedding_dim=8)
    start.check_start(run, features, sizes)
    for wrong, message in (
        ((features, dataclasses.replace(sizes, units=64)), "expected its units, 16, found 64; leave the option out"),
        ((FeatureConfig(cnn="vgg19"), sizes), "expected its CNN, inception_v3, 299, found vgg19"),
        ((FeatureConfig(cnn_weights="random"), sizes), "expected its weights of the CNN, imagenet, found random"),
    ):
        with pytest.raises(InputError, match=f"{run}: {message}"):
            start.check_start(run, *wrong)


def test_the_weights_of_the_cnn_are_those_in_the_run(tmp_path, run_config, tokenizer):
    weights = tmp_path / "weights.h5"
    weights.write_text("of the start")
    sha256 = file_sha256(weights)
    config = dataclasses.replace(run_config, features=run_config.features | {"weights": "random", "sha256": sha256})
    init_run_dir(tmp_path / "run", config, tokenizer.save, str(weights))
    settings = start.cnn_settings(tmp_path / "run", read_config(tmp_path / "run"))
    assert settings["cnn_weights"] == str(tmp_path / "run/cnn.h5")
    features = FeatureConfig(cnn_weights=settings["cnn_weights"])
    start.check_start(tmp_path / "run", features, config.model)
    weights.write_text("others")
    with pytest.raises(InputError, match="not the weights of the CNN"):
        start.check_start(tmp_path / "run", FeatureConfig(cnn_weights=str(weights)), config.model)


def test_keep_words_appends_the_new_ones(run, run_config, dataset, cache, tokenizer):
    data = TrainData(dataset, cache, Tokenizer((*SPECIAL_TOKENS, "unseen", "dog")))
    joined, config = start.keep_words(run, data, run_config)
    assert joined.tokenizer.index_word == (*tokenizer.index_word, "unseen")
    assert config.model.vocab_size == len(tokenizer) + 1


def test_keep_words_needs_a_start():
    with pytest.raises(InputError, match="--keep-words is for --start"):
        train.parse(["--keep-words"])
