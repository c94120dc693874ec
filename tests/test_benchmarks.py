"""Every benchmark runs, with tiny sizes, and its last line is JSON. No speed is tested here."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

TINY = ["--batch-size", "2", "--vocabulary-size", "20", "--units", "4", "--embedding-dim", "3"]


@pytest.fixture(autouse=True)
def beside_each_other(monkeypatch):
    """A script finds what lies in its own folder."""
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "benchmarks")


def benchmark(name):
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parents[1] / f"benchmarks/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_training(tmp_path, capsys):
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\n" + "".join(f"{i}.jpg,a dog runs {'fast ' * (i % 3)}\n" for i in range(12)))
    arguments = [*TINY, "--annotations", str(path), "--pictures", "10", "--rounds", "1"]
    benchmark("training").main([*arguments, "--steps", "2", "--tutorial-steps", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = found["captions_per_second"]
    assert found["ratio"] == pytest.approx(rates["suite"] / rates["tutorial"], rel=0.01)
    assert (found["captions"], found["longest"]) == (10, 7)


def test_both_ways_of_training_have_the_same_loss():
    module = benchmark("training")
    config = module.model.ModelConfig(30, 5, 6)
    ours, theirs = module.model.build(config), module.Tutorial(config)
    pictures = np.random.default_rng(0).random((2, 64, 2048), np.float32)
    tokens = tf.constant([[2, 5, 6, 7, 3], [2, 5, 8, 3, 0], [2, 9, 3, 0, 0]])
    batch, picture = tf.gather(pictures, [0, 0, 1]), tf.constant([0, 0, 1])
    theirs(batch, tokens)
    for name in ("W1", "W2", "V"):
        getattr(theirs.decoder.attention, name).set_weights(getattr(ours.decoder.attention, name).get_weights())
    for name in ("embedding", "gru", "fc1", "fc2"):
        getattr(theirs.decoder, name).set_weights(getattr(ours.decoder, name).get_weights())
    theirs.encoder.set_weights(ours.encoder.fc.get_weights())
    taught = ours(pictures, tokens, picture)
    losses, _ = module.train.word_losses(taught, module.train.next_words(tokens, taught))
    assert float(theirs(batch, tokens)) == pytest.approx(float(tf.reduce_sum(losses)) / 3, rel=1e-5)
    assert len(theirs.trainable_variables) == len(ours.trainable_variables)


def test_lengths_are_like_those_of_coco():
    lengths = benchmark("training").draw_lengths(100_000, np.random.default_rng(0))
    assert lengths.mean() == pytest.approx(12.5, abs=0.05)
    assert (lengths.min(), lengths.max()) == (10, 49)


def test_captioning(capsys):
    arguments = [*TINY, "--pictures", "3", "--tutorial-pictures", "2", "--rounds", "1", "--skip-process"]
    benchmark("captioning").main(arguments)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = found["captions_per_second"]
    assert found["ratio"]["greedy"] == pytest.approx(rates["greedy"] / rates["tutorial"], abs=0.1)
    assert set(rates) == {"greedy", "beam 5", "tutorial"}


def test_both_ways_of_captioning_say_the_same():
    module = benchmark("captioning")
    captioner = module.model.build(module.model.ModelConfig(30, 5, 6))
    pictures = np.random.default_rng(0).random((5, 64, 2048), np.float32)
    assert module.suite_captions(captioner, pictures, 2, 1) == module.tutorial_captions(captioner, pictures)


def test_features(capsys):
    benchmark("features").main(["--pictures", "4", "--batch-sizes", "2", "--rounds", "1"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    rates = found["pictures_per_second"]
    assert found["share_of_cnn"] == pytest.approx(rates["suite"] / rates["cnn"], abs=0.01)


def test_memory(capsys):
    arguments = ["--pictures", "250", "--captions", "1250", "--steps", "2", "--"]
    benchmark("memory").main([*arguments, "--vocabulary-size", "20", "--units", "4", "--embedding-dim", "3"])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert (found["pictures"], found["captions"], found["steps"]) == (250, 1250, 2)
    assert found["peak_memory_gib"] > 0.1 and found["reading_captions_per_second"] > 0 < found["seconds_to_first_step"]
