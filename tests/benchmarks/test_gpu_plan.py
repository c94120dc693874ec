"""benchmarks/gpu_plan.py, and with it: a step on a GPU waits for hardly anything, a word of its loops for nothing."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import gpu_plan
from captioning.base.cli import InputError
from captioning.base.quiet_tensorflow import tf

MAX_WAITS = 5  # of a training step, outside its loops

try:
    gpu_plan.gpu_kernels()
except InputError as error:
    pytest.skip(str(error), allow_module_level=True)


def split_counts(plan):
    """Returns the counts outside all loops, and those of each loop."""
    return plan[""], [counts for loop, counts in plan.items() if loop]


@pytest.mark.slow
@pytest.mark.parametrize("mixed_precision", [False, True], ids=["32", "16"])
def test_training_step_waits_for_no_word(mixed_precision):
    outside, loops = split_counts(gpu_plan.plan_training(fused=True, mixed_precision=mixed_precision))
    assert len(loops) == 2, "forward and backward"
    for counts in (outside, *loops):
        assert counts.kernels and not counts.no_kernel
    assert not any(counts.to_host for counts in loops)
    assert len(outside.to_host) <= MAX_WAITS
    if not mixed_precision:  # whose optimizer is in a branch of Keras's, taken if the gradients are finite
        assert not any("cond/" in name for names in outside for name in names), "a branch waits"
        assert sum(bool(re.search(r"adam(_\d+)?/pow", name)) for name in outside.kernels) == 2, (
            "a power of each beta, not for each variable"
        )


@pytest.mark.slow
@pytest.mark.parametrize("beam_size", [1, 3])
def test_search_waits_once_a_word(beam_size):
    outside, (loop,) = split_counts(gpu_plan.plan_search(beam_size))
    assert loop.kernels and not loop.no_kernel and not outside.no_kernel
    assert len(loop.to_host) == 1 and loop.to_host[0].endswith("/LogicalAnd"), "only for whether it is the last one"


def test_plan_counts_what_a_loop_does():
    @tf.function
    def run(x, num_steps):
        x = tf.exp(x)  # the only kernel before the loop
        for i in tf.range(num_steps):
            tf.autograph.experimental.set_loop_options(shape_invariants=[(x, tf.TensorShape((None, None)))])
            x = tf.sin(x) + tf.cos(x)
            row = x[i : i + 1]  # a view
            best = tf.argmax(row, axis=1, output_type=tf.int32)[0]
            x = tf.numpy_function(np.copy, [x[:, best:]], tf.float32)  # the GPU has int32 indices in the host's memory
            x = tf.ensure_shape(x, (None, None))
        return x

    before, (loop,) = split_counts(gpu_plan.plan(lambda: run(tf.ones((3, 3)), 2)))
    assert before == ([before.kernels[0]], [], [], [], []) and before.kernels[0] == "Exp"
    assert [name.rsplit("/", 1)[1] for name in sorted(loop.kernels)][:3] == ["ArgMax", "Cos", "Sin"]
    (no_kernel,) = loop.no_kernel
    assert no_kernel.endswith("(PyFunc)")
    assert len(loop.to_host) == 2, "the argmax, and what numpy takes"
    assert len(loop.to_gpu) == 1, "what numpy returns"


def test_plan_knows_what_the_program_places_on_the_cpu():
    def make(device):
        @tf.function
        def run(table, index, row):
            with tf.device(device):
                chosen = tf.gather(table, index)
            return row * tf.cast(chosen, tf.float32)

        return run

    arguments = tf.range(5), tf.constant([1, 2]), tf.ones(2)
    anywhere, on_cpu = make(None), make("CPU:0")
    counts = [gpu_plan.plan(lambda run=run: run(*arguments))[""] for run in (anywhere, on_cpu)]
    assert [len(names) for names in counts[0]] == [3, 0, 0, 2, 0], "the table and the index are copied"
    assert [len(names) for names in counts[1]] == [2, 1, 0, 1, 0], "only the result is"


def test_plan_needs_a_tensorflow_with_kernels_for_gpus(monkeypatch):
    from tensorflow.python.framework import kernels

    monkeypatch.setattr(kernels, "get_all_registered_kernels", lambda: kernels.get_registered_kernels_for_op("PyFunc"))
    with pytest.raises(InputError, match="built for CUDA"):
        gpu_plan.gpu_kernels.__wrapped__()


def test_main_prints_a_table_and_json(monkeypatch, capsys):
    @tf.function
    def run(x):
        return tf.zeros(tf.cast(tf.reduce_sum(x), tf.int32))

    monkeypatch.setattr(gpu_plan, "PLANS", {"zeros": lambda: gpu_plan.plan(lambda: run(tf.ones(3)))})
    gpu_plan.main(["--names"])
    heading, row, name, last = capsys.readouterr().out.splitlines()
    assert heading.split()[:2] == ["kernels", "host"] and row.split() == ["zeros", "3", "0", "1", "0", "0"]
    assert name.strip() == "Cast"
    counts = {"kernels": 3, "host": 0, "to_host": 1, "to_gpu": 0, "no_kernel": 0}
    assert json.loads(last) == {"zeros": {"outside": counts}}


@pytest.mark.slow
def test_loops_of_training_stay_on_their_device():
    tests = Path(__file__).parent
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (tests.parent, tests)))}
    command = [sys.executable, tests / "helpers/loop_partitions.py"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert result.stdout.splitlines() == ["2"], "a number from the batch is sent to each iteration"
