"""Every benchmark runs, with tiny sizes, and its last line is JSON. No speed is tested here."""

import json
import shutil
import subprocess

import numpy as np
import pytest
from helpers.train_and_kill import build_small_cnn

import model
import train
from benchmarks import captioning, consensus, features, gpu, memory, serving, training
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from captioning.decoder.losses import loss_function

SMALL_MODEL = ["--vocab-size", "20", "--units", "4", "--embedding-dim", "3"]

pytestmark = pytest.mark.slow


def read_result(capsys):
    """Returns what a benchmark printed last."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


@pytest.fixture
def small_cnn(monkeypatch):
    """Replaces the CNN, and its random weights."""

    def save_weights(path, *_):
        path.parent.mkdir()
        path.write_text("stands for weights")
        return file_sha256(path)

    monkeypatch.setattr("features.save_random_cnn", save_weights)
    monkeypatch.setattr("features.build_feature_extractor", build_small_cnn)


def test_training_compares_variants_with_the_tutorial(tmp_path, capsys):
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\n" + "".join(f"{i}.jpg,dog {'runs ' * (i % 3)}\n" for i in range(12)))
    sizes = ["--batch-size", "2", "--images", "10", "--rounds", "1", "--steps", "1", "--tutorial-steps", "1"]
    variants = ["--variants", "tutorial,fused", "--annotations", str(path)]
    training.main([*SMALL_MODEL, *sizes, *variants])
    result = read_result(capsys)
    rates = result["captions_per_second"]
    assert result["ratio"] == pytest.approx(rates["fused"] / rates["tutorial"], rel=0.05)


def test_tutorial_and_project_have_the_same_loss_and_captions(rng):
    config = ModelConfig(vocab_size=30, embedding_dim=5, units=6)
    caption_model, tutorial = model.build(config), training.TutorialModel(config)
    tutorial(tf.zeros((1, 64, 2048)), tf.constant([[2, 3]]))  # builds it
    for name in ("W1", "W2", "V"):
        getattr(tutorial.decoder.attention, name).set_weights(
            getattr(caption_model.decoder.attention, name).get_weights()
        )
    for name in ("embedding", "gru", "fc1", "fc2"):
        getattr(tutorial.decoder, name).set_weights(getattr(caption_model.decoder, name).get_weights())
    tutorial.encoder.set_weights(caption_model.encoder.fc.get_weights())
    image_features = rng.random((3, 64, 2048), np.float32)
    tokens = tf.constant([[2, 5, 6, 7, 3], [2, 5, 8, 3, 0], [2, 9, 3, 0, 0]])
    outputs = caption_model(image_features, tokens)
    losses, _ = loss_function(outputs.logits, outputs.targets)
    assert float(tutorial(image_features, tokens)) == pytest.approx(float(tf.reduce_sum(losses)) / 3, rel=1e-5)
    expected = captioning.tutorial_captions(caption_model, image_features)
    assert captioning.project_captions(caption_model, image_features, batch_size=2) == expected


def test_captioning_compares_searches_and_a_folder(run, small_cnn, monkeypatch, capsys):
    captioning.main([*SMALL_MODEL, "--images", "3", "--tutorial-images", "2", "--rounds", "1", "--only", "search"])
    assert set(read_result(capsys)["search"]["ratio"]) == {"greedy", "beam 5", "sampled"}
    monkeypatch.setattr(captioning, "train_small_run", lambda folder: shutil.copytree(run, folder / "run"))
    captioning.main(["--only", "folder", "--folder-images", "40", "--rounds", "1"])
    assert read_result(capsys)["folder"]["ratio"] > 0


def test_features_measures_the_cnn_and_decoding(small_cnn, monkeypatch, capsys):
    monkeypatch.setattr(features, "SIZES", ((60, 40), (1300, 1200)))
    monkeypatch.setattr(features, "MIN_CPU_SECONDS", 0)
    features.main(["--images", "4", "--batch-sizes", "2", "--rounds", "1"])
    result = read_result(capsys)
    assert set(result["images_per_second"]) == {"project", "around", "cnn", "tutorial"}
    assert min(result["decoded_per_second_of_a_core"].values()) > 0
    cnn = tf.keras.Sequential([tf.keras.Input((8, 8, 3)), tf.keras.layers.Conv2D(4, 3, strides=2, padding="same")])
    monkeypatch.setattr("features.build_feature_extractor", lambda *_: cnn)
    monkeypatch.setattr(features, "find_cnn", lambda extractor: extractor)
    features.main(["--only", "cnns", "--images", "3", "--rounds", "1"])
    assert len(read_result(capsys)["cnns"]) == len(features.CNNS)
    assert features.count_multiplications(cnn) == 4 * 4 * 3 * 3 * 3 * 4


def test_gpu_compares_with_the_cpu(small_cnn, monkeypatch, capsys):
    monkeypatch.setattr(gpu, "SEARCHES", ((5, False),))
    with pytest.raises(SystemExit) as end:
        gpu.main(["--small", "--only", "numbers", "search", "features", "pytorch"])
    result = read_result(capsys)
    assert end.value.code == 0 and result["failed"] == []
    assert result["greedy captions, equal to the CPU's"] == "100%"
    report = gpu.Report()
    numbers = {"features": np.array([1.0, 2.0]), "losses": np.array([3.0]), "captions": np.array([[1, 2], [3, 4]])}
    others = {"features": np.array([1.0, 2.01]), "losses": np.array([3.001]), "captions": np.array([[1, 2], [3, 5]])}
    gpu.compare_numbers(report, others, numbers)
    assert len(report.failed) == 3, "each differs too much"


def test_gpu_runs_the_commands_of_a_whole_run(monkeypatch, tmp_path, capsys):
    commands = []

    def run(command, cwd, **_):
        commands.append(command[1:])
        return subprocess.CompletedProcess(command, len(commands) // 3, "", "why it failed")

    monkeypatch.setattr(gpu.subprocess, "run", run)
    report = gpu.Report()
    gpu.measure_whole_run(report, tmp_path, gpu.SMALL)
    assert [path.name for path, *_ in commands] == ["features.py", "train.py", "evaluate.py"]
    assert train.parse(commands[1][1:]).ema_decay == 0.998, "the recipe"
    assert report.failed == ["seconds, evaluate.py --beam-size 5"] and "why it failed" in capsys.readouterr().err


def test_consensus_measures_an_index(monkeypatch, capsys):
    monkeypatch.setattr(consensus, "CHANNELS", 16)
    consensus.main(["--images", "40", "--captions", "120"])
    result = read_result(capsys)
    assert result["milliseconds_batch_32"] > result["milliseconds_batch_1"] > 0


def test_memory_stops_after_some_steps(capsys):
    memory.main(["--images", "250", "--captions", "1250", "--steps", "2", "--", *SMALL_MODEL])
    result = read_result(capsys)
    assert result["peak_memory_gib"] > 0.1 and result["reading_captions_per_second"] > 0


def test_serving_measures_the_cnn_and_the_server(run, small_cnn, capsys):
    serving.main(["--run", str(run), "--clients", "2", "--requests", "3", "--rounds", "1", "--max-words", "3"])
    assert min(read_result(capsys)["images_per_second"].values()) > 0
