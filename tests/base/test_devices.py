"""Training on several devices and several machines: in processes, since devices are set up once in a process."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from captioning.base import devices, quiet_tensorflow
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf
from captioning.data import shapes

TESTS = Path(__file__).parents[1]
DATA_ARGS = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--cnn-weights", "cnn.h5"]
MODEL_ARGS = ["--units", "16", "--embedding-dim", "8"]
TRAIN_ARGS = ["--batch-size", "7", "--clip-norm", "0.3", "--patience", "0", "--ema-decay", "0.9", "--epochs", "2"]

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def make_job(run, strategy="none", name=None, num_devices=1, tf_config=None, copies=()):
    """Returns a job for train_on_devices.py."""
    args = [*DATA_ARGS, *MODEL_ARGS, *TRAIN_ARGS, "--features-dir", "features", "--strategy", strategy]
    job = {"name": name or run, "run": run, "num_devices": num_devices, "args": args}
    return job | {"tf_config": tf_config, "copies": copies}


def free_port():
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Runs on 48 images of shapes: of one device, and after its first epoch resumed on two devices and two workers."""
    folder = tmp_path_factory.mktemp("devices")
    shapes.draw_dataset(folder / "shapes", num_images=48)
    (folder / "cnn.h5").write_text("stands for weights")
    addresses = [f"localhost:{free_port()}" for _ in range(2)]
    roles = [{"cluster": {"worker": addresses}, "task": {"type": "worker", "index": index}} for index in (0, 1)]
    workers = [make_job("workers", "multiworker", f"worker_{i}", tf_config=role) for i, role in enumerate(roles)]
    groups = [[make_job("one", copies=["two", "workers"])], [make_job("two", "mirrored", num_devices=2), *workers]]
    (folder / "groups.json").write_text(json.dumps(groups))
    done = subprocess.run(
        [sys.executable, TESTS / "helpers/train_on_devices.py", "groups.json"],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (TESTS.parent, TESTS)))},
        stderr=subprocess.PIPE,
        text=True,
        timeout=240,
    )
    logs = "".join(f"{path.name}:\n{path.read_text()}\n" for path in sorted(folder.glob("*.log")))
    assert done.returncode == 0, done.stderr + logs
    return folder


def read_result(folder, name):
    """Returns the losses of all steps and the weights at the end."""
    result = np.load(folder / f"{name}.npz", allow_pickle=False)
    return result["losses"], [result[name] for name in result.files if name.startswith("arr_")]


@pytest.mark.slow
@needs_fork
def test_mirrored_strategy_resumes_and_trains_as_one_device(folder):
    (losses, weights), (losses_of_two, weights_of_two) = read_result(folder, "one"), read_result(folder, "two")
    assert len(losses_of_two) == len(losses) / 2 > 5, "one epoch of two is left"
    assert "resuming" in (folder / "two.log").read_text()
    np.testing.assert_allclose(losses_of_two, losses[len(losses) // 2 :], rtol=1e-4)
    for one, two in zip(weights, weights_of_two, strict=True):
        np.testing.assert_allclose(two, one, atol=2e-3)


@pytest.mark.slow
@needs_fork
def test_every_replica_has_random_numbers_of_its_own(folder):
    one, two = (np.load(folder / f"{name}.npz", allow_pickle=False)["draws"] for name in ("one", "two"))
    np.testing.assert_array_equal(two[0], one[0], err_msg="the first device draws as a single one does")
    assert np.abs(two[1] - two[0]).min() > 0


@pytest.mark.slow
@needs_fork
def test_multiworker_strategy_trains_as_one_device_and_the_chief_writes(folder):
    losses, _ = read_result(folder, "one")
    names = ("worker_0", "worker_1")
    for name in names:
        np.testing.assert_allclose(read_result(folder, name)[0], losses[len(losses) // 2 :], rtol=1e-4)
    for first, second in zip(*(read_result(folder, name)[1] for name in names), strict=True):
        np.testing.assert_array_equal(first, second)
    logs = [(folder / f"{name}.log").read_text() for name in names]
    assert "val_loss" in logs[0]
    assert "val_loss" not in logs[1]
    assert len((folder / "workers/history.csv").read_text().splitlines()) == 3
    latest = tf.train.latest_checkpoint(folder / "workers/checkpoints/last")
    assert latest.endswith("ckpt-4"), "written twice an epoch"


def test_is_chief_is_the_first_worker_or_the_chief():
    class Strategy:
        def __init__(self, jobs, task_type, task_id):
            cluster = {job: ["localhost:1", "localhost:2"] for job in jobs}
            self.cluster_resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(
                tf.train.ClusterSpec(cluster), task_type=task_type, task_id=task_id
            )

    assert devices.is_chief(tf.distribute.get_strategy())
    assert devices.is_chief(Strategy(["worker"], "worker", 0))
    assert not devices.is_chief(Strategy(["worker"], "worker", 1))
    assert devices.is_chief(Strategy(["chief", "worker"], "chief", 0))
    assert not devices.is_chief(Strategy(["chief", "worker"], "worker", 0))


def test_gpus_compute_in_full_float32_and_take_memory_by_need():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    assert os.environ["TF_FORCE_GPU_ALLOW_GROWTH"] == "true"


def test_check_xla_says_that_it_fails(monkeypatch):
    devices.check_xla()

    def fail(*_, **__):
        raise tf.errors.InternalError(None, None, "no libdevice\nsecond line")

    monkeypatch.setattr(tf, "function", fail)
    with pytest.raises(InputError, match=r"^--jit on: XLA cannot be used here \(no libdevice\); train with --jit off$"):
        devices.check_xla()


def test_functions_have_the_same_number_whatever_came_before():
    numbers = set()
    for num_before in (1, 3):
        for _ in range(num_before):
            tf.function(lambda x: x)(tf.zeros(()))
        devices.number_functions_anew()
        name = tf.function(lambda x: x).get_concrete_function(tf.TensorSpec(())).name.decode()
        numbers.add(int(re.findall(r"\d+", name)[-1]) % 100_000)
    assert len(numbers) == 1, "XLA's cache would not be used"


@pytest.mark.parametrize(("error", "expected"), [(0, 2**40), (999, 0), (None, 0)])
def test_free_gpu_memory_is_what_the_driver_says(monkeypatch, error, expected):
    class Driver:
        def __getattr__(self, name):
            def call(*args):
                if name == "cuDeviceGet":
                    assert args[1] == 1, "the first GPU that is visible is the machine's second"
                if name == "cuMemGetInfo_v2":
                    args[0]._obj.value = 2**40
                return error

            return call

    def load(name):
        if error is None:
            raise OSError(name)
        return Driver()

    gpu = tf.config.PhysicalDevice("/physical_device:GPU:1", "GPU")
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda _: [gpu])
    monkeypatch.setattr(devices.ctypes, "CDLL", load)
    assert devices.free_gpu_memory() == expected


@pytest.fixture
def set_xla_flags(tmp_path, monkeypatch):
    """Sets the flags on a machine with a GPU, from flags of the user's; returns both environment variables."""
    (tmp_path / "driver/0").mkdir(parents=True)
    (tmp_path / "driver/0/information").write_text("Model: \t\t NVIDIA H200\nIRQ: 17\n")
    monkeypatch.setattr(quiet_tensorflow, "NVIDIA_DRIVER_FILES", (tmp_path,))
    monkeypatch.setattr(quiet_tensorflow, "NVIDIA_GPUS", tmp_path / "driver")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "a cache"))

    def set_flags(xla_flags="", tf_xla_flags="", version="2.21.0"):
        monkeypatch.setenv("XLA_FLAGS", xla_flags)
        monkeypatch.setenv("TF_XLA_FLAGS", tf_xla_flags)
        quiet_tensorflow.set_xla_flags(version)
        return os.environ["XLA_FLAGS"], os.environ["TF_XLA_FLAGS"]

    return set_flags


def test_xla_flags_are_set_where_there_is_a_gpu(set_xla_flags, tmp_path, monkeypatch):
    folder = tmp_path / "a cache/image-captioning/xla/2.21.0_NVIDIA_H200"
    xla_flags, tf_xla_flags = set_xla_flags()
    assert "CONDITIONAL,WHILE," in xla_flags and xla_flags.endswith(" --xla_gpu_autotune_level=0")
    assert tf_xla_flags.split(" --")[0] == f"--tf_xla_persistent_cache_directory='{folder}'"
    assert folder.is_dir() and quiet_tensorflow.xla_cache() == str(folder)
    assert set_xla_flags(version="2.22.0") == ("", ""), "an unknown flag would end the process"
    monkeypatch.setattr(quiet_tensorflow, "NVIDIA_DRIVER_FILES", ())
    assert set_xla_flags() == ("", "") and quiet_tensorflow.xla_cache() is None


def test_xla_flags_of_the_user_stay(set_xla_flags, tmp_path, monkeypatch):
    mine, cache = "--xla_gpu_enable_command_buffer= --xla_dump_to=x", "--tf_xla_persistent_cache_directory=mine"
    xla_flags, tf_xla_flags = set_xla_flags(mine, cache)
    assert xla_flags == f"{mine} --xla_gpu_graph_min_graph_size=1 --xla_gpu_autotune_level=0"
    assert tf_xla_flags == f"{cache} --tf_xla_persistent_cache_device_types=GPU"
    assert quiet_tensorflow.xla_cache() == "mine"
    assert set_xla_flags("flags.txt", cache)[0] == "flags.txt", "a file, to which nothing can be added"
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert set_xla_flags()[1] == "", "no folder can be made there"


@pytest.mark.slow
def test_tensorflow_knows_the_xla_flags(set_xla_flags):
    code = "import tensorflow as tf; print(tf.function(lambda x: x + 1, jit_compile=True)(tf.zeros(())).numpy())"
    for flags, is_known in (("", True), ("--xla_gpu_no_such_flag=1", False)):
        set_xla_flags(flags, version=tf.__version__)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True)
        assert (done.returncode == 0) == is_known


@pytest.fixture
def check_gpus(monkeypatch):
    """Runs check_gpus with GPUs, each a name and a compute capability; returns those that stay visible of some.

    `built_for` is None for a TensorFlow that does not say which kernels it has.
    """

    def check(*gpus, built_for=devices.BUILT_FOR):
        visible = []
        details = {name: {"device_name": name, "compute_capability": capability} for name, capability in gpus}
        build_info = {"cuda_compute_capabilities": built_for} if built_for else {}
        monkeypatch.setattr(tf.config, "list_physical_devices", lambda device_type: list(details))
        monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: details[gpu])
        monkeypatch.setattr(tf.config, "set_visible_devices", lambda gpus, _: visible.extend(gpus))
        monkeypatch.setattr(tf.sysconfig, "get_build_info", lambda: build_info)
        devices.check_gpus.__wrapped__()
        return visible

    return check


@pytest.mark.parametrize("hidden", [None, "-1"])
def test_check_gpus_names_a_gpu_that_cannot_be_used(hidden, check_gpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(devices, "NVIDIA_DRIVER_FILES", (tmp_path / "version", tmp_path / "dxg"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    check_gpus()
    assert capsys.readouterr().err == "", "there is no driver"
    devices.NVIDIA_DRIVER_FILES[1].touch()
    if hidden is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    check_gpus()
    assert ("requirements-gpu.txt" in capsys.readouterr().err) == (hidden is None)


def test_check_gpus_hides_those_without_kernels(check_gpus, capsys):
    assert check_gpus(("Tesla T4", (7, 5)), ("H200", (9, 0))) == []
    assert capsys.readouterr().err == "", "both are used"
    assert check_gpus(("RTX 5090", (12, 0)), ("RTX 4090", (8, 9))) == ["RTX 4090"]
    message = capsys.readouterr().err
    assert message.count("\n") == 1 and "no kernels for RTX 5090, of compute capability 12.0" in message
    assert "(on Colab choose another runtime than G4, which has a GPU of 12.0)" in message


@pytest.mark.parametrize("can_compute", [True, False])
def test_check_gpus_tries_new_ones_where_the_kernels_are_not_known(check_gpus, monkeypatch, capsys, can_compute):
    tried = []
    monkeypatch.setattr(devices, "can_compute", lambda number: tried.append(number) or can_compute)
    visible = check_gpus(("Tesla T4", (7, 5)), ("RTX PRO 6000", (12, 0)), built_for=None)
    assert tried == [1] and visible == ([] if can_compute else ["Tesla T4"])
    assert ("no kernels for RTX PRO 6000, of compute capability 12.0: it" in capsys.readouterr().err) != can_compute


@pytest.mark.slow
def test_can_compute_finds_no_gpu_here():
    assert not devices.can_compute(0)


def test_another_backend_of_keras_ends_in_one_line():
    command = [sys.executable, "-m", "beyond.cider"]
    variables = os.environ | {"KERAS_BACKEND": "torch"}
    done = subprocess.run(command, cwd=TESTS.parent, env=variables, capture_output=True, text=True)
    expected = "beyond.cider: KERAS_BACKEND: expected tensorflow, found torch\n"
    assert (done.returncode, done.stdout, done.stderr) == (2, "", expected)


@pytest.mark.parametrize(
    ("capability", "built_for", "expected"),
    [
        ((8, 6), ["sm_80"], True),
        ((8, 0), ["sm_86"], False),
        ((9, 0), ["sm_80", "compute_90"], True),
        ((12, 0), [], True),
        (None, ["sm_60"], True),
    ],
)
def test_has_kernels(capability, built_for, expected):
    details = {} if capability is None else {"compute_capability": capability}
    assert devices.has_kernels(details, built_for) == expected


EVALUATOR = '{"cluster": {"worker": ["localhost:1"]}, "task": {"type": "evaluator", "index": 0}}'


@pytest.mark.parametrize("text", [None, "{", '{"cluster": {"worker": []}, "task": 3}', EVALUATOR])
def test_multiworker_without_tf_config_is_rejected(text, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(InputError, match="expected TF_CONFIG to be set on every machine"):
        devices.make_strategy("multiworker")
