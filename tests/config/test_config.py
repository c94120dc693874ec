"""Settings: their checks, their options on the command line, and their JSON."""

import dataclasses
import json
import math

import pytest

import beyond.cider.self_critical
import beyond.finetune.__main__
import beyond.paper.objective
import beyond.serve.settings  # noqa: F401  all have settings
from captioning.base.cli import InputError, make_parser
from captioning.config.options import Settings, add_options
from captioning.config.run_config import RunConfig
from captioning.config.settings import RECIPES, DataConfig, DecodeConfig, ModelConfig, TrainConfig

CLASSES = Settings.__subclasses__()


def parse(settings, *arguments, **kwargs):
    """Returns the settings that a command line gives."""
    parser = make_parser("Does something.")
    add_options(parser.add_argument_group("options"), settings, **kwargs)
    return settings.from_args(parser.parse_args(arguments))


# Values.


@pytest.mark.parametrize(
    ("settings", "name", "value"),
    [
        (TrainConfig, "batch_size", 0),
        (TrainConfig, "learning_rate", math.nan),
        (TrainConfig, "ema_decay", 1.0),
        (TrainConfig, "clip_norm", math.inf),
        (TrainConfig, "seed", 2**32),
        (TrainConfig, "shuffle_by", "picture"),
        (TrainConfig, "batch_size", True),
        (TrainConfig, "batch_size", 8.0),
        (TrainConfig, "batch_size", "8"),
        (TrainConfig, "batch_size", None),
        (DataConfig, "dataset", "imagenet"),
    ],
)
def test_settings_refuse_impossible_values(settings, name, value):
    with pytest.raises(InputError, match=f"^{name}: expected .*, found '{value}'"):
        settings(**{name: value})


def test_settings_allow_what_the_fields_allow():
    assert TrainConfig(learning_rate=1).learning_rate == 1, "a float may be whole"
    assert TrainConfig(ema_decay=0).ema_decay == 0
    assert DataConfig(dataset=None, annotations="a.csv", num_captions=0).num_captions == 0
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().epochs = 3


# JSON.


@pytest.mark.parametrize("settings", CLASSES)
def test_json_and_options_have_every_setting(settings):
    config = settings()
    assert settings.from_json(json.loads(json.dumps(config.to_json()))) == config
    assert parse(settings) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ([1, 2], "expected beam_size, length_penalty"),
        ({**DecodeConfig().to_json(), "width": 3}, "width is not a setting"),
        (
            {**DecodeConfig().to_json(), "beam_size": [3]},
            r"beam_size: expected a whole number of at least 1, found '\[3\]'",
        ),
    ],
)
def test_from_json_refuses_other_values(values, message):
    with pytest.raises(InputError, match=message):
        DecodeConfig.from_json(values)


def test_from_json_gives_settings_that_were_added_later_their_defaults():
    values = TrainConfig(epochs=3).to_json()
    del values["ema_decay"]
    assert TrainConfig.from_json(values) == TrainConfig(epochs=3)


# The command line.


def test_add_options_reads_every_type_of_value():
    config = parse(TrainConfig, "--epochs", "3", "--learning-rate", "1", "--shuffle-by", "caption", "--no-fused")
    assert config == TrainConfig(epochs=3, learning_rate=1.0, shuffle_by="caption", fused=False)
    assert parse(TrainConfig, "--mixed-precision").mixed_precision is True
    config = parse(DataConfig, "--num-captions", "all", "--annotations", "a.csv", "--images", "photos")
    assert config == DataConfig(num_captions=0, annotations="a.csv", images="photos")
    assert parse(DataConfig, "--num-captions", "20").num_captions == 20


def test_add_options_takes_other_defaults_and_a_part_of_the_fields():
    assert parse(TrainConfig, "--epochs", "3", defaults=RECIPES["best"] | {"epochs": 9}) == TrainConfig(
        epochs=3, **{name: value for name, value in RECIPES["best"].items() if "dropout" not in name}
    )
    assert parse(DataConfig, defaults={"dataset": None}) == DataConfig(dataset=None)
    parser = make_parser("Does something.")
    add_options(parser, TrainConfig, only=("epochs", "jit"))
    assert vars(parser.parse_args(["--jit", "on"])) == {"epochs": 20, "jit": "on"}


@pytest.mark.parametrize(
    ("settings", "arguments", "message"),
    [
        (ModelConfig, ["--dropout", "1.5"], "expected a number of at least 0 and below 1, found '1.5'"),
        (TrainConfig, ["--learning-rate", "fast"], "expected a number above 0, found 'fast'"),
        (TrainConfig, ["--jit", "maybe"], "invalid choice: 'maybe'"),
        (DataConfig, ["--num-captions", "some"], "expected a whole number of at least 0, or all, found 'some'"),
    ],
)
def test_add_options_refuses_impossible_values(settings, arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        parse(settings, *arguments)
    assert end.value.code == 2
    assert message in capsys.readouterr().err


def test_add_options_shows_help_and_defaults(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    parser = make_parser("Does something.")
    for settings in (DataConfig, ModelConfig, TrainConfig):
        add_options(parser, settings)
    page = " ".join(parser.format_help().split())
    assert "--ema-decay X decay of the exponential moving average" in page
    assert "--units N size of the GRU's state and of the attention (default: 512)" in page
    assert "--num-captions N|all captions to use" in page
    assert "(default: None)" not in page
    assert "--fused, --no-fused" in page


# A run's config.json.


@pytest.fixture
def run_config():
    return RunConfig(
        model=ModelConfig(vocab_size=20),
        train=TrainConfig(epochs=3),
        data=DataConfig("shapes"),
        objective={},
        features={"cnn": "InceptionV3", "weights": "imagenet", "dtype": "float16", "folder": "features/shapes"},
        unreadable_images=("a.jpg",),
        data_fingerprint="0123",
        vocabulary_sha256="4567",
    )


@pytest.mark.parametrize(
    ("section", "changes", "difference"),
    [
        ("model", {"units": 100}, ("units", 512, 100)),
        ("train", {"batch_size": 5}, ("batch_size", 64, 5)),
        ("train", {"epochs": 9, "patience": 1, "fused": False, "jit": "on", "checkpoint_minutes": 0.0}, None),
        ("data", {"split_seed": 1}, ("split_seed", 0, 1)),
        ("data", {"annotations": "moved.csv", "images": "elsewhere", "data_dir": "disk"}, None),
    ],
)
def test_run_config_difference_of_settings(run_config, section, changes, difference):
    other = dataclasses.replace(run_config, **{section: dataclasses.replace(getattr(run_config, section), **changes)})
    assert run_config.difference(run_config) is None
    assert run_config.difference(other) == difference


def test_run_config_difference_of_data_and_objective(run_config):
    other = dataclasses.replace(run_config, unreadable_images=())
    assert run_config.difference(other) == ("unreadable_images", ("a.jpg",), ())
    other = dataclasses.replace(run_config, data_fingerprint="89")
    assert run_config.difference(other) == ("data_fingerprint", "0123", "89")
    other = dataclasses.replace(run_config, objective={"samples": 5})
    assert run_config.difference(other) == ("samples", None, 5)
    assert other.difference(run_config) == ("samples", 5, None)


def test_run_config_difference_of_features(run_config):
    def with_features(**changes):
        return dataclasses.replace(run_config, features=run_config.features | changes)

    assert run_config.difference(with_features(folder="elsewhere", images="../moved")) is None
    assert run_config.difference(with_features(weights="random")) == ("weights", "imagenet", "random")
    assert run_config.difference(with_features(sha256="ab")) == ("sha256", None, "ab")
    another_cnn = with_features(cnn="VGG19", weights="random", image_size=224, sha256="ab")
    assert run_config.difference(another_cnn) == ("cnn", "InceptionV3", "VGG19"), "what it is about comes first"
    first, second = with_features(weights="a.h5", sha256="ab"), with_features(weights="moved/a.h5", sha256="ab")
    assert first.difference(second) is None, "a weights file is its SHA-256"
    assert first.difference(with_features(weights="a.h5", sha256="cd")) == ("sha256", "ab", "cd")
