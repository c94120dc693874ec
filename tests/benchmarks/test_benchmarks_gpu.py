"""benchmarks/gpu.py: its checks run on a CPU in small, and what fails, hangs or is left out is said."""

import json
import subprocess
import sys

import numpy as np
import pytest

from benchmarks import gpu, gpu_checks

DEVICE_ROWS = [{"what": "GPU", "value": "none", "expected": None, "passed": None}]


@pytest.fixture
def run_fake(monkeypatch):
    """Replaces the processes of the checks by functions: name -> the rows, or what is raised or written."""

    def install(**answers):
        calls = []

        def run(command, env, stderr, timeout, **_):
            name = command[3]
            calls.append((name, "--reference" in command, env.get("CUDA_VISIBLE_DEVICES")))
            answer = answers.get(name, [])
            if isinstance(answer, Exception):
                raise answer
            if isinstance(answer, str):
                stderr.write(answer)
                stderr.flush()
                return subprocess.CompletedProcess(command, 1, "")
            return subprocess.CompletedProcess(command, 0, f"a line of a library\n{json.dumps(answer)}\n")

        monkeypatch.setattr(subprocess, "run", run)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
        return calls

    return install


def run_gpu(capsys, *argv):
    """Runs the benchmark; returns its exit code, its table and its JSON."""
    with pytest.raises(SystemExit) as stop:
        gpu.main(list(argv))
    lines = capsys.readouterr().out.splitlines()
    return stop.value.code, "\n".join(lines[:-1]), json.loads(lines[-1])


def test_a_check_that_fails_does_not_end_the_others(run_fake, capsys):
    good = [{"what": "loss", "value": 1, "expected": "1", "passed": True}]
    hanging = subprocess.TimeoutExpired("command", 1)
    run_fake(device=DEVICE_ROWS, variants="Traceback:\nValueError: no kernel", training=hanging, search=good)
    code, table, result = run_gpu(capsys, "--only", "variants", "training", "search")
    assert code == 1
    assert "ValueError: no kernel" in table and "not done after 150 s" in table
    assert "1 checks passed, 2 failed" in table
    assert [row["passed"] for row in result["rows"]] == [None, False, False, True]


def test_the_cpu_comes_first_where_it_is_compared(run_fake, capsys):
    calls = run_fake(device=DEVICE_ROWS)
    run_gpu(capsys, "--only", "numbers")
    assert calls == [("device", False, "0"), ("numbers", True, "-1"), ("numbers", False, "0")]


def test_what_is_left_out_is_said(run_fake, capsys, monkeypatch):
    calls = run_fake(device=DEVICE_ROWS)
    code, table, _ = run_gpu(capsys, "--small", "--only", "memory", "demo")
    assert code == 0 and [name for name, *_ in calls] == ["device"]
    assert "memory    left out" in table and "no GPU" in table
    assert "demo      left out" in table and "--small" in table
    monkeypatch.setattr(gpu, "MINUTES", 0.1)
    _, table, _ = run_gpu(capsys, "--only", "search")
    assert "0.1 minutes are over" in table


def test_an_unknown_check_is_refused(capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(["--only", "speed"])
    assert stop.value.code == 2 and "'speed'" in capsys.readouterr().err


def test_all_checks_have_a_function():
    assert [check.name for check in gpu.CHECKS] == list(gpu_checks.CHECKS)
    assert {check.name for check in gpu.CHECKS if check.compares} == set(gpu_checks.COMPARED)


def test_numbers_that_differ_from_the_cpu_fail(tmp_path, monkeypatch):
    numbers = {"features": [1.0, 2.0], "losses, fused": [3.0], "captions, greedy": [[1, 2], [3, 4]]}
    monkeypatch.setattr(gpu_checks, "compute_numbers", lambda *_: {k: np.array(v) for k, v in numbers.items()})
    assert gpu_checks.check_numbers(tmp_path, None, reference=True) == []
    assert all(row["passed"] for row in gpu_checks.check_numbers(tmp_path, None, reference=False))
    numbers.update({"features": [1.0, 2.01], "losses, fused": [3.001], "captions, greedy": [[1, 2], [3, 5]]})
    assert not any(row["passed"] for row in gpu_checks.check_numbers(tmp_path, None, reference=False))


@pytest.mark.slow
def test_numbers_are_of_features_losses_and_captions(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_checks, "compute_features", lambda *_: np.ones((2, 64, 2048)))  # InceptionV3 takes long
    numbers = gpu_checks.compute_numbers(tmp_path, gpu_checks.SMALL)
    assert [len(value) for value in numbers.values()] == [2, 5, 5, 8, 8]
    np.testing.assert_allclose(numbers["losses, fused"], numbers["losses, plain"], rtol=1e-5)
    assert numbers["losses, fused"][4] < numbers["losses, fused"][0], "it learns"


@pytest.mark.slow
def test_the_command_runs_in_small_on_a_cpu():
    command = [sys.executable, str(gpu.PROJECT / "benchmarks/gpu.py"), "--small", "--only", "memory"]
    result = subprocess.run(command, cwd=gpu.PROJECT.parent, capture_output=True, text=True, check=True)
    rows = json.loads(result.stdout.splitlines()[-1])["rows"]
    assert any(row["what"] == "one operation" and row["passed"] for row in rows)
    assert (rows[-1]["what"], rows[-1]["value"]) == ("left out", "no GPU")
