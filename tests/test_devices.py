"""Training on several devices and several machines, in processes of their own: devices are set up once in each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf

import devices
import shapes
from common import InputError

SCRIPT = Path(__file__).with_name("on_devices.py")
ARGUMENTS = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--weights", "cnn.h5"]
ARGUMENTS += ["--units", "16", "--embedding-dim", "8", "--batch-size", "7", "--clip-norm", "0.3", "--patience", "0"]
ARGUMENTS += ["--epochs", "2", "--average-decay", "0.9"]


@pytest.fixture
def folder(tmp_path):
    """48 pictures of shapes, to be trained on here."""
    shapes.draw_dataset(tmp_path / "shapes", pictures=48)
    (tmp_path / "cnn.h5").write_text("stands for weights")
    return tmp_path


def start(folder, name, cpus, *arguments, **environment):
    """Starts a training process."""
    command = [sys.executable, SCRIPT, str(cpus), f"{name}.npz", *ARGUMENTS, *arguments]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def end(process):
    """Waits for its end, and returns what it said."""
    _, talk = process.communicate(timeout=240)
    assert process.returncode == 0, talk
    return talk


def result(folder, name):
    """The losses and the weights of a process."""
    found = np.load(folder / f"{name}.npz", allow_pickle=False)
    return found["losses"], [found[f"arr_{i}"] for i in range(len(found.files) - 1)]


def test_two_devices_train_as_one_does(folder):
    end(start(folder, "one", 1, "--run", "one"))
    end(start(folder, "two", 2, "--run", "two", "--strategy", "mirrored"))
    end(start(folder, "on", 2, "--run", "one", "--strategy", "mirrored", "--epochs", "3"))
    (losses, weights), (losses_of_two, weights_of_two) = result(folder, "one"), result(folder, "two")
    assert len(losses) > 10
    np.testing.assert_allclose(losses_of_two, losses, rtol=1e-4)
    for one, two in zip(weights, weights_of_two, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-3)
    assert len(result(folder, "on")[0]) == len(losses) / 2, "a run can be continued on other devices"


def free_port():
    with socket.socket() as found:
        found.bind(("localhost", 0))
        return found.getsockname()[1]


def test_two_workers_train_together_and_the_chief_writes(folder):
    end(start(folder, "one", 1, "--run", "one"))
    workers = [f"localhost:{free_port()}" for _ in range(2)]
    roles = [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}) for index in (0, 1)
    ]
    processes = [
        start(folder, f"worker{i}", 1, "--run", "both", "--strategy", "multiworker", TF_CONFIG=role)
        for i, role in enumerate(roles)
    ]
    talks = [end(process) for process in processes]
    losses, _ = result(folder, "one")
    for name in ("worker0", "worker1"):
        np.testing.assert_allclose(result(folder, name)[0], losses, rtol=1e-4)
    for first, second in zip(result(folder, "worker0")[1], result(folder, "worker1")[1], strict=True):
        np.testing.assert_array_equal(first, second)
    assert "val_loss" in talks[0] and "val_loss" not in talks[1]
    assert len((folder / "both/history.csv").read_text().splitlines()) == 3
    assert tf.train.latest_checkpoint(folder / "both/checkpoints/last").endswith("ckpt-4"), "written twice an epoch"


def test_a_gpu_that_cannot_be_used_is_said(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices.tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(devices, "NVIDIA", tmp_path / "version")
    devices.say_if_idle()
    assert capsys.readouterr().err == ""
    devices.NVIDIA.touch()
    devices.say_if_idle()
    assert "requirements-gpu.txt" in capsys.readouterr().err


@pytest.mark.parametrize("found", [None, "{", '{"cluster": {}}', '{"cluster": {"worker": []}, "task": 3}'])
def test_a_cluster_that_is_not_said(found, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if found:
        monkeypatch.setenv("TF_CONFIG", found)
    with pytest.raises(InputError, match="expected TF_CONFIG to be set on every machine"):
        devices.make_strategy("multiworker")
