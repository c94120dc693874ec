"""The command `python -m beyond.serve`, and its captions of batches."""

import functools
import importlib.util
import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import numpy as np
import pytest
from helpers.train_and_kill import build_small_cnn
from helpers.web import draw_png

import beyond.serve.__main__ as serve
import features
import model
from beyond.serve import server
from beyond.serve.settings import ServerConfig
from captioning.base.cli import InputError
from captioning.config.settings import DecodeConfig
from inference import Captioner

ROOT = Path(__file__).parents[3]
PIXELS = np.stack([np.full((299, 299, 3), value, np.uint8) for value in (0, 90, 180, 255)])
build_once = functools.cache(model.build)  # of one size, so that its decoding is compiled once
SETTINGS = [
    DecodeConfig(max_words=3),
    DecodeConfig(max_words=3, beam_size=3, captions=2),
    DecodeConfig(max_words=3, sample=True, captions=2, temperature=3.0),
]


@pytest.fixture
def small_run(run, monkeypatch):
    """The run, without InceptionV3."""
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    monkeypatch.setattr(model, "build", build_once)
    return run


# The captions.


@pytest.mark.slow
def test_compile_captioner_leaves_nothing_of_the_cnn_to_compile(small_run, monkeypatch):
    calls = []

    def build_counting_cnn(cnn_weights, cnn):
        cnn = build_small_cnn(cnn_weights)
        return lambda pixels, training: calls.append(len(calls)) or cnn(pixels, training)

    monkeypatch.setattr(features, "build_feature_extractor", build_counting_cnn)
    captioner = Captioner.load(small_run, DecodeConfig(max_words=3))
    serve.compile_captioner(captioner)
    calls.clear()
    for count, config in ((1, SETTINGS[0]), (1, SETTINGS[1]), (2, SETTINGS[0]), (4, SETTINGS[0]), (3, SETTINGS[1])):
        assert len(captioner.with_decoding(config).caption_pixels(PIXELS[:count])) == count
    assert not calls


# The command line.


def test_server_is_for_this_machine_by_default():
    assert ServerConfig.from_args(serve.parse([])) == ServerConfig("127.0.0.1", 8000, None, 20, 8, 50, 30)


@pytest.mark.slow
def test_main_warns_if_other_machines_are_let_in(small_run, monkeypatch, capsys):
    monkeypatch.setattr(server, "run", lambda app, server: server.close())  # as if Ctrl-C came at once
    limits = []
    monkeypatch.setattr(serve, "set_max_megapixels", limits.append)
    options = ["--host", "0.0.0.0", "--port", "0", "--max-words", "3", "--max-megapixels", "7", "--quiet"]
    serve.main(["--run", str(small_run), *options])
    out, err = capsys.readouterr()
    assert out.startswith("http://0.0.0.0:") and out.endswith("/\n") and out.count("\n") == 1
    assert err == "--host 0.0.0.0: anybody who reaches this machine can caption with it; there is no password\n"
    assert limits == [7]


def test_main_refuses_a_port_in_use_before_it_loads_the_run():
    with server.listen(ServerConfig(port=0)) as listener, pytest.raises(InputError, match="Address already in use"):
        serve.main(["--port", str(listener.getsockname()[1]), "--run", "no/such/run"])


def test_main_names_packages_that_are_missing(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as error:
        serve.main(["--run", "no/such/run"])
    assert str(error.value) == "the server needs werkzeug and waitress; run `pip install werkzeug waitress`"


# The process.

SCRIPT = """
import signal
import features
import beyond.serve.__main__ as serve
from captioning.base.cli import run_main
from helpers.train_and_kill import build_small_cnn
features.build_feature_extractor = build_small_cnn
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background commands ignore it
run_main(serve.main)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for one process")
def test_process_answers_and_ends_by_ctrl_c(run):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    command = [sys.executable, "-c", SCRIPT, "--run", str(run), "--port", "0", "--max-words", "3"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        url = process.stdout.readline().strip()
        with urllib.request.urlopen(
            urllib.request.Request(f"{url}caption", draw_png(), {"Content-Type": "a/b"})
        ) as reply:
            assert len(json.load(reply)["words"]) == 3
        idle = urllib.request.urlopen(f"{url}health")  # a connection that is open does not hold it up
        lines = [process.stderr.readline().strip() for _ in range(3)]  # the connections have threads of their own
        process.send_signal(signal.SIGINT)
        try:
            _, errors = process.communicate(timeout=20)
        finally:
            process.kill()  # if it has not ended, the test fails and does not wait for it
        idle.close()
    assert process.returncode == 0, errors
    assert errors == "stopped\n"
    assert lines[0] == f"run: {run}"
    assert sorted(line.rsplit(" ", 2)[0] for line in lines[1:]) == ["GET /health 200", "POST /caption 200"]
