"""Training on several devices and several machines, in processes of their own: devices are set up once in each."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import train
from captioning import devices, shapes
from captioning.cli import InputError
from captioning.quiet_tensorflow import tf

TESTS = Path(__file__).parent
SCRIPT = TESTS / "helpers/train_on_devices.py"
DATA_ARGS = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--cnn-weights", "cnn.h5"]
MODEL_ARGS = ["--units", "16", "--embedding-dim", "8"]
TRAIN_ARGS = ["--batch-size", "7", "--clip-norm", "0.3", "--patience", "0", "--epochs", "2", "--ema-decay", "0.9"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """48 images of shapes, and `one`, a run on a single device; features are shared by all runs."""
    folder = tmp_path_factory.mktemp("devices")
    shapes.draw_dataset(folder / "shapes", num_images=48)
    (folder / "cnn.h5").write_text("stands for weights")
    wait_for(start_training(folder, "one", 1, "--run", "one"))
    return folder


def start_training(folder, name, num_devices, *args, **environment):
    """Starts a process that trains."""
    path = os.pathsep.join(map(str, (TESTS.parent, TESTS)))
    return subprocess.Popen(
        [sys.executable, SCRIPT, str(num_devices), f"{name}.npz", *DATA_ARGS, *MODEL_ARGS, *TRAIN_ARGS, *args],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": path} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(process):
    """Waits for the end of a process; returns what it wrote to standard error."""
    _, log = process.communicate(timeout=240)
    assert process.returncode == 0, log
    return log


def read_result(folder, name):
    """Returns the losses and the weights of a process."""
    result = np.load(folder / f"{name}.npz", allow_pickle=False)
    return result["losses"], [result[f"arr_{i}"] for i in range(len(result.files) - 1)]


@pytest.mark.slow
def test_mirrored_strategy_trains_as_one_device(folder):
    wait_for(start_training(folder, "two", 2, "--run", "two", "--strategy", "mirrored"))
    (losses, weights), (losses_of_two, weights_of_two) = read_result(folder, "one"), read_result(folder, "two")
    assert len(losses) > 10
    np.testing.assert_allclose(losses_of_two, losses, rtol=1e-4)
    for one, two in zip(weights, weights_of_two, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-3)


@pytest.mark.slow
def test_multiworker_strategy_trains_as_one_device_and_the_chief_writes(folder):
    workers = [f"localhost:{free_port()}" for _ in range(2)]
    roles = [
        json.dumps({"cluster": {"worker": workers}, "task": {"type": "worker", "index": index}}) for index in (0, 1)
    ]
    processes = [
        start_training(folder, f"worker{i}", 1, "--run", "both", "--strategy", "multiworker", TF_CONFIG=role)
        for i, role in enumerate(roles)
    ]
    logs = [wait_for(process) for process in processes]
    losses, _ = read_result(folder, "one")
    for name in ("worker0", "worker1"):
        np.testing.assert_allclose(read_result(folder, name)[0], losses, rtol=1e-4)
    for first, second in zip(read_result(folder, "worker0")[1], read_result(folder, "worker1")[1], strict=True):
        np.testing.assert_array_equal(first, second)
    assert "val_loss" in logs[0]
    assert "val_loss" not in logs[1]
    assert len((folder / "both/history.csv").read_text().splitlines()) == 3
    assert tf.train.latest_checkpoint(folder / "both/checkpoints/last").endswith("ckpt-4"), "written twice an epoch"


@pytest.mark.slow
def test_run_resumes_on_other_devices(folder):
    losses, _ = read_result(folder, "one")
    resumed = ["--run", "one", "--strategy", "mirrored", "--epochs", "3"]
    wait_for(start_training(folder, "resumed", 2, *resumed))
    assert len(read_result(folder, "resumed")[0]) == len(losses) / 2


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


def test_warn_if_gpu_unused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: [])
    monkeypatch.setattr(devices, "NVIDIA_DRIVER_FILE", tmp_path / "version")
    devices.warn_if_gpu_unused()
    assert capsys.readouterr().err == ""
    devices.NVIDIA_DRIVER_FILE.touch()
    devices.warn_if_gpu_unused()
    assert "requirements-gpu.txt" in capsys.readouterr().err


@pytest.mark.parametrize("text", [None, "{", '{"cluster": {}}', '{"cluster": {"worker": []}, "task": 3}'])
def test_multiworker_without_tf_config_is_rejected(text, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match="expected TF_CONFIG to be set on every machine"):
        devices.make_strategy("multiworker")


def test_batch_smaller_than_the_number_of_devices_is_rejected(monkeypatch):
    class ThreeReplicas:
        num_replicas_in_sync = 3

    monkeypatch.setattr(devices, "make_strategy", lambda name: ThreeReplicas())
    with pytest.raises(InputError, match="--batch-size: expected at least 3, the number of devices, found 2"):
        train.main(["--batch-size", "2"])
