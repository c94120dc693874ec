"""What only a machine with a GPU can test: `python -m pytest --gpu tests/gpu`; skipped without --gpu.

The numbers are those of benchmarks/gpu.py, which also measures.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu
from captioning.base.quiet_tensorflow import tf

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_gpu(request):
    if not request.config.getoption("gpu"):
        pytest.skip("needs a GPU: python -m pytest --gpu tests/gpu")
    assert tf.config.list_physical_devices("GPU"), "--gpu: TensorFlow finds no GPU; TF_CPP_MIN_LOG_LEVEL=0 shows why"


@pytest.mark.parametrize("part", ["numbers", "training", "xla", "whole"])
def test_numbers_are_those_of_a_cpu_and_every_way_to_train_takes_steps(part, tmp_path):
    report = gpu.Report()
    gpu.PARTS[part](report, tmp_path, gpu.SMALL)
    assert report.results and not report.failed


def test_memory_grows_with_need_and_a_second_process_has_some():
    growth = [tf.config.experimental.get_memory_growth(each) for each in tf.config.list_physical_devices("GPU")]
    assert all(growth) or os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH") == "true"
    product = "tf.reduce_sum(tf.ones((512, 512)) @ tf.ones((512, 512)))"
    code = f"from captioning.base.quiet_tensorflow import tf; print(float({product}))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "134217728.0", done.stderr


def test_products_are_in_full_float32():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    ones = tf.fill((64, 64), 1 + 2.0**-12)  # which TF32 rounds to 1
    assert float(tf.reduce_max(tf.abs(tf.matmul(ones, ones) / 64 - (1 + 2.0**-12) ** 2))) < 1e-5
