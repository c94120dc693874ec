"""Training that XLA compiles, and with features in the memory of the device, against training without both."""

import dataclasses
import functools

import numpy as np
import pytest
from helpers.runs import LossRecorder, assert_same_checkpoint, make_config, read_checkpoint, run_training, stop_after
from helpers.runs import SimulatedKill

import train
from beyond.cider.self_critical import SelfCritical
from captioning.base import devices
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.training import resident_features
from captioning.training.objective import CrossEntropy
from captioning.training.resident_features import load_features

pytestmark = pytest.mark.usefixtures("compare_decoders_once")


@pytest.fixture(scope="module")
def plain(data, tmp_path_factory):
    """A run as on a CPU: its folder and its losses."""
    losses = LossRecorder()
    return run_training(tmp_path_factory.mktemp("runs") / "plain", data, losses), losses.losses


class UncompilableCrossEntropy(CrossEntropy):
    """Cross-entropy with a function that XLA cannot compile."""

    def loss(self, model, prepared):
        batch = prepared._replace(tokens=tf.ensure_shape(tf.numpy_function(np.copy, [prepared.tokens], tf.int32), (None, None)))
        return super().loss(model, batch)


@pytest.mark.slow
def test_training_that_xla_compiles_has_the_losses_of_the_fused_decoder(data, plain, tmp_path, capsys):
    losses = LossRecorder()
    run_training(tmp_path / "run", data, losses, jit="on", features_on_gpu="on")
    np.testing.assert_allclose(losses.losses, plain[1], rtol=1e-4)
    assert "XLA compiles the training step, some seconds for each length of captions: 5, 10 tokens" in capsys.readouterr().err
