"""All tests: no network, and no GPU but with --gpu. The fixtures are in helpers/fixtures.py."""

import os

from helpers.fixtures import *  # noqa: F403

# They come first, so that no process is busy with one of them while the other has nothing left to do.
LONGEST_FILES = ("train", "damaged", "interruptions", "cnn_training", "self_critical_run", "devices")


def pytest_addoption(parser):
    parser.addoption("--gpu", action="store_true", help="let the tests use a GPU; only those in tests/gpu expect one")


def pytest_configure(config):
    """Hides GPUs, also from subprocesses, before TensorFlow looks for them: the tests compare numbers exactly."""
    if not config.getoption("gpu"):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"


def pytest_collection_modifyitems(items):
    names = [f"test_{name}.py" for name in LONGEST_FILES]
    items.sort(key=lambda item: names.index(item.path.name) if item.path.name in names else len(names))
