"""What only a machine with a GPU can test, in two minutes: `python -m pytest --gpu tests/gpu`; skipped without --gpu.

The numbers are those of the checks of benchmarks/gpu.py, which also measures.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import gpu_checks
from benchmarks.gpu_common import SMALL
from captioning.base.quiet_tensorflow import tf

ROOT = Path(__file__).parents[2]

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _needs_gpu(request):
    if not request.config.getoption("gpu"):
        pytest.skip("needs a GPU: python -m pytest --gpu tests/gpu")
    assert tf.config.list_physical_devices("GPU"), "--gpu: TensorFlow finds no GPU; TF_CPP_MIN_LOG_LEVEL=0 shows why"


def failures(rows):
    return [row for row in rows if row["passed"] is False]


def test_features_losses_and_captions_are_those_of_a_cpu(tmp_path):
    """Of a CNN with random weights; of training steps, fused and plain; of greedy and beam search."""
    command = [sys.executable, "-m", "benchmarks.gpu_checks", "numbers", str(tmp_path), "--small", "--reference"]
    subprocess.run(command, cwd=ROOT, env=os.environ | {"CUDA_VISIBLE_DEVICES": "-1"}, check=True)
    rows = gpu_checks.check_numbers(tmp_path, SMALL, reference=False)
    assert len(rows) == 5 and not failures(rows)


def test_every_way_to_train_takes_a_step(tmp_path):
    """With soft and hard attention, in float32 and float16, with and without XLA."""
    rows = gpu_checks.check_variants(tmp_path, SMALL)
    assert len(rows) == 8 and not failures(rows)


def test_memory_grows_with_need_and_a_second_process_has_some(tmp_path):
    rows = gpu_checks.check_memory(tmp_path, SMALL)
    assert len(rows) == 3 and not failures(rows)


def test_products_are_in_full_float32():
    assert not tf.config.experimental.tensor_float_32_execution_enabled()
    ones = tf.fill((64, 64), 1 + 2.0**-12)  # which TF32 rounds to 1
    assert float(tf.reduce_max(tf.abs(tf.matmul(ones, ones) / 64 - (1 + 2.0**-12) ** 2))) < 1e-5
