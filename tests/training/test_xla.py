"""Training that XLA compiles, against training that it does not."""

import functools

import numpy as np
import pytest
from helpers.runs import LossRecorder, assert_same_checkpoint, read_checkpoint, run_training

import train
from beyond.cider.self_critical import SelfCritical
from captioning.base import devices
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.training.compiling import choose_compiler
from captioning.training.objective import CrossEntropy

SETTINGS = {"epochs": 1, "shuffle_by": "caption", "batch_size": 4, "dropout": 0.3, "ema_decay": 0.9}

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


class NumpyCrossEntropy(CrossEntropy):
    """Cross-entropy with a function that XLA cannot compile."""

    def loss(self, model, prepared):
        tokens = tf.numpy_function(np.copy, [prepared.tokens], tf.int32)
        return super().loss(model, prepared._replace(tokens=tf.ensure_shape(tokens, (None, None))))


@pytest.fixture
def gpu(monkeypatch):
    """Lets train.py believe that there is a GPU."""
    monkeypatch.setattr(devices, "has_gpu", lambda: True)


@pytest.mark.slow
def test_training_that_xla_compiles_has_the_losses_of_the_fused_decoder(data, tmp_path, capsys):
    settings = SETTINGS | {"dropout": 0.0}  # XLA draws other random numbers
    plain, compiled = LossRecorder(), LossRecorder()
    run_training(tmp_path / "plain", data, plain, **settings)
    run_training(tmp_path / "compiled", data, compiled, **settings, jit="on", features_on_gpu="on")
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=1e-4)
    assert "XLA compiles the training step, some seconds for each length of captions: 5, 10" in capsys.readouterr().err


@pytest.mark.slow
def test_training_goes_on_without_xla_where_it_cannot_compile(data, gpu, tmp_path, capsys):
    build = functools.partial(train.build_train_state, objective=lambda config: NumpyCrossEntropy(config.train))
    for jit in ("auto", "off"):
        run_training(tmp_path / jit, data, build=build, **SETTINGS, jit=jit, features_on_gpu="off")
    assert capsys.readouterr().err.count("training goes on as with --jit off") == 1
    assert_same_checkpoint(read_checkpoint(tmp_path / "auto"), read_checkpoint(tmp_path / "off"))
    with pytest.raises(tf.errors.OpError):
        run_training(tmp_path / "on", data, build=build, **SETTINGS, jit="on", features_on_gpu="off")


@pytest.mark.parametrize(
    ("settings", "objective", "expected"),
    [
        ({}, CrossEntropy, "on"),
        ({"jit": "off"}, CrossEntropy, "off"),
        ({"deterministic": True}, CrossEntropy, "off"),
        ({}, SelfCritical, "off"),
        ({"jit": "on"}, SelfCritical, "on"),
    ],
)
def test_xla_compiles_by_default_where_one_gpu_trains(gpu, settings, objective, expected):
    state = train.TrainState(None, None, None, None, objective)
    strategy, config = tf.distribute.get_strategy(), TrainConfig(**settings)
    assert choose_compiler(state, config, strategy).jit == expected
    assert choose_compiler(state, config, tf.distribute.MirroredStrategy(["CPU:0"])).jit == config.jit.replace(
        "auto", "off"
    )


def test_xla_compiles_nothing_by_default_on_a_cpu():
    state = train.TrainState(None, None, None, None, CrossEntropy)
    assert choose_compiler(state, TrainConfig(), tf.distribute.get_strategy()).jit == "off"
