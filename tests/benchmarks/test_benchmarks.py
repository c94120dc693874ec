"""Every benchmark runs, with tiny sizes, and its last line is JSON. No speed is tested here."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from helpers.train_and_kill import build_small_cnn

import model
from benchmarks import captioning, features, memory, serving, training
from benchmarks.timing import interleaved_median_rates, items_per_second
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import ModelConfig
from captioning.decoder.losses import masked_cross_entropy
from captioning.images.feature_cache import CNN_FILE

SMALL_MODEL = ["--vocab-size", "20", "--units", "4", "--embedding-dim", "3"]
CONFIG = ModelConfig(vocab_size=30, embedding_dim=5, units=6)


@pytest.fixture(scope="module")
def caption_model():
    return model.build(CONFIG)


def read_result(capsys):
    """Returns what a benchmark printed last."""
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_items_per_second_divides_by_the_time(monkeypatch):
    seconds = iter([10.0, 14.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(seconds))
    assert items_per_second(lambda: None, 12) == 3


def test_interleaved_median_rates_alternates(capsys):
    order = []

    def make_variant(name, rates):
        def measure():
            order.append(name)
            return rates.pop(0)

        return measure

    variants = {"a": make_variant("a", [1.0, 9.0, 2.0]), "b": make_variant("b", [5.0, 4.0, 6.0])}
    assert interleaved_median_rates(variants, 3, "captions") == {"a": 2, "b": 5}
    assert order == ["a", "b"] * 3
    assert "a: 9.00 captions/s" in capsys.readouterr().err


@pytest.mark.slow
def test_training_main_compares_variants(tmp_path, capsys):
    path = tmp_path / "captions.csv"
    path.write_text("image,caption\n" + "".join(f"{i}.jpg,dog {'runs ' * (i % 3)}\n" for i in range(12)))
    sizes = ["--batch-size", "2", "--images", "10", "--rounds", "1", "--steps", "2", "--tutorial-steps", "1"]
    variants = ["--variants", "tutorial,plain,paper-lstm", "--dropout", "0.1"]
    training.main([*SMALL_MODEL, *sizes, *variants, "--annotations", str(path)])
    result = read_result(capsys)
    rates = result["captions_per_second"]
    assert list(rates) == ["tutorial", "plain", "paper-lstm"]
    assert result["ratio"] == pytest.approx(rates["plain"] / rates["tutorial"], rel=0.01)
    for name in ("plain", "paper-lstm"):
        assert result["ratios"][name] == pytest.approx(rates[name] / rates["tutorial"], rel=0.01)
    assert (result["captions"], result["longest"]) == (10, 5)


def test_training_parse_compares_the_default_decoder_with_the_tutorial():
    args = training.parse([])
    assert (args.variants, args.dropout, args.jit) == (("tutorial", "fused"), 0, "off")


@pytest.mark.parametrize(
    "argv", [["--variants", "tutorial"], ["--variants", "fused,fast"], ["--variants", "plain,plain"], ["--jit", "on"]]
)
def test_training_parse_refuses_what_cannot_be_compared(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        training.parse(argv)
    assert stop.value.code == 2
    assert f"{argv[0]}: expected " in capsys.readouterr().err


@pytest.fixture(scope="module")
def tutorial_model(caption_model):
    """The tutorial's model with the weights of `caption_model`."""
    tutorial = training.TutorialModel(CONFIG)
    tutorial(tf.zeros((1, 64, 2048)), tf.constant([[2, 3]]))  # builds it
    decoder = caption_model.decoder
    for name in ("W1", "W2", "V"):
        getattr(tutorial.decoder.attention, name).set_weights(getattr(decoder.attention, name).get_weights())
    for name in ("embedding", "gru", "fc1", "fc2"):
        getattr(tutorial.decoder, name).set_weights(getattr(decoder, name).get_weights())
    tutorial.encoder.set_weights(caption_model.encoder.fc.get_weights())
    return tutorial


@pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
def test_training_variants_have_the_same_loss(caption_model, tutorial_model, fused, rng, monkeypatch):
    monkeypatch.setattr(caption_model.decoder, "fused", fused)
    features = rng.random((2, 64, 2048), np.float32)
    image_index = tf.constant([0, 0, 1])
    tokens = tf.constant([[2, 5, 6, 7, 3], [2, 5, 8, 3, 0], [2, 9, 3, 0, 0]])
    outputs = caption_model(features, tokens, image_index)
    losses, _ = masked_cross_entropy(outputs.logits, outputs.targets)
    tutorial_loss = float(tutorial_model(tf.gather(features, image_index), tokens))
    assert tutorial_loss == pytest.approx(float(tf.reduce_sum(losses)) / 3, rel=1e-5)
    assert len(tutorial_model.trainable_variables) == len(caption_model.trainable_variables)


@pytest.mark.parametrize("variant", ["fused", "paper", "paper-lstm"])
def test_flop_per_caption_counts_the_products(variant):
    config = dataclasses.replace(CONFIG, **training.PROJECT_VARIANTS[variant][0])
    caption_model = model.build(config)
    decoder = caption_model.decoder

    def size(*layers):
        return sum(int(np.prod(layer.kernel.shape)) for layer in layers)

    first_state_size = 0
    if variant == "fused":
        cell, step_size = decoder.gru, size(decoder.fc1, decoder.fc2)
    else:
        cell, step_size = decoder.cell, size(decoder.f_beta, decoder.L_h, decoder.L_z, decoder.L_o)
        first_state_size = size(*filter(None, (decoder.f_init_h, decoder.f_init_c)))
    step_size += size(decoder.attention.W2, cell) + int(np.prod(cell.recurrent_kernel.shape))
    image_size = 4 * size(caption_model.encoder.fc) + 6 * size(decoder.attention.W1)
    expected = 64 * image_size + 6 * first_state_size + 6 * 7.5 * step_size
    assert training.flop_per_caption(config, 7.5) == expected


def test_sample_lengths_are_those_of_coco(rng):
    lengths = training.sample_lengths(100_000, rng)
    assert lengths.mean() == pytest.approx(12.5, abs=0.05)
    assert (lengths.min(), lengths.max()) == (10, 49)


@pytest.mark.slow
def test_captioning_main_compares_searches(capsys):
    sizes = ["--batch-size", "2", "--images", "3", "--tutorial-images", "2", "--rounds", "1"]
    captioning.main([*SMALL_MODEL, *sizes, "--only", "search"])
    result = read_result(capsys)["search"]
    rates = result["captions_per_second"]
    assert result["ratio"]["greedy"] == pytest.approx(rates["greedy"] / rates["tutorial"], abs=0.1)
    assert set(rates) == {"greedy", "beam 5", "tutorial"}


@pytest.mark.slow
def test_captioning_main_compares_a_folder_with_the_cnn(run, monkeypatch, capsys):
    monkeypatch.setattr(captioning, "train_small_run", lambda folder: shutil.copytree(run, folder / "run"))
    monkeypatch.setattr("features.build_feature_extractor", build_small_cnn)
    captioning.main(["--only", "folder", "--folder-images", "40", "--rounds", "1"])
    result = read_result(capsys)["folder"]
    assert result["images"] == 40
    expected = result["folder_images_per_second"] / result["cnn_images_per_second"]
    assert result["ratio"] == pytest.approx(expected, abs=0.01)


@pytest.mark.slow
def test_captioning_variants_have_the_same_captions(caption_model, rng):
    features = rng.random((3, 64, 2048), np.float32)
    expected = captioning.tutorial_captions(caption_model, features)
    assert captioning.project_captions(caption_model, features, batch_size=2, beam_size=1) == expected


@pytest.mark.slow
def test_features_main_compares_with_the_cnn(monkeypatch, capsys):
    def save_weights(folder, *_):
        folder.mkdir()
        (folder / CNN_FILE).write_text("stands for weights")
        return file_sha256(folder / CNN_FILE)

    monkeypatch.setattr("features._save_random_weights", save_weights)
    monkeypatch.setattr("features.build_feature_extractor", build_small_cnn)
    features.main(["--images", "4", "--batch-sizes", "2", "--rounds", "1", "--only", "cnn"])
    result = read_result(capsys)
    rates = result["images_per_second"]
    assert result["share_of_cnn"] == pytest.approx(rates["project"] / rates["cnn"], abs=0.01)
    assert set(rates) == {"project", "cnn", "tutorial"}


def test_features_main_measures_decoding(monkeypatch, capsys):
    monkeypatch.setattr(features, "SIZES", ((60, 40), (1300, 1200)))
    monkeypatch.setattr(features, "MIN_CPU_SECONDS", 0)
    features.main(["--only", "decoding", "--rounds", "1"])
    rates = read_result(capsys)["decoded_per_second_of_a_core"]
    assert list(rates) == ["60x40, full", "60x40, scaled", "1300x1200, full", "1300x1200, scaled"]
    assert min(rates.values()) > 0


@pytest.mark.slow
def test_features_main_measures_the_pipeline(capsys):
    features.main(["--only", "pipeline", "--pipeline-images", "70", "--readers", "3", "--cnn-rate", "2000"])
    result = read_result(capsys)["pipeline"]
    possible = min(result["decoding"], result["cnn"])
    assert result["share_of_possible"] == pytest.approx(result["pipeline"] / possible, rel=0.05)
    assert 0 < result["cnn"] < 2000


def test_features_main_measures_all_cnns(monkeypatch, capsys):
    layers = tf.keras.layers
    convolutions = [layers.Conv2D(4, 3, strides=2, padding="same"), layers.DepthwiseConv2D(3, padding="same")]

    def build(_, cnn):
        pixels = tf.keras.Input((8, 8, 3), dtype="uint8")
        cnn = tf.keras.Sequential([tf.keras.Input((8, 8, 3)), *convolutions, layers.Dense(5)])
        return tf.keras.Model(pixels, cnn(tf.keras.ops.cast(pixels, "float32")))

    assert features.count_multiplications(build("random", None)) == 16 * (3 * 3 * 3 * 4 + 3 * 3 * 4 + 4 * 5)
    monkeypatch.setattr(features, "CNNS", {"small": "its row"})
    monkeypatch.setattr("features.build_feature_extractor", build)
    features.main(["--only", "cnns", "--images", "3", "--rounds", "1"])
    [result] = read_result(capsys)["cnns"].values()
    assert result["images_per_second_of_a_core"] > 0 and result["billion_multiplications"] == 0


@pytest.mark.slow
def test_memory_main_stops_after_some_steps(capsys):
    memory.main(["--images", "250", "--captions", "1250", "--steps", "2", "--", *SMALL_MODEL])
    result = read_result(capsys)
    assert (result["images"], result["captions"], result["steps"]) == (250, 1250, 2)
    assert result["peak_memory_gib"] > 0.1
    assert result["reading_captions_per_second"] > 0
    assert result["seconds_to_first_step"] > 0


@pytest.mark.slow
def test_serving_main_measures_the_cnn_and_the_server(run, monkeypatch, capsys):
    monkeypatch.setattr("features.build_feature_extractor", build_small_cnn)
    serving.main(["--run", str(run), "--clients", "1", "2", "--requests", "3", "--rounds", "1", "--max-words", "3"])
    result = read_result(capsys)
    names = ["cnn, batch of 1", "cnn, batch of 8", "1 clients", "2 clients", "2 clients, one at a time"]
    assert list(result["images_per_second"]) == names
    assert set(result["seconds"]) == set(names[2:])
    assert 0 < result["seconds"]["1 clients"]["p50"] <= result["seconds"]["1 clients"]["p99"]
