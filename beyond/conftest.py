"""The tests of the guests, which use the fixtures of tests/."""

import os

from helpers.fixtures import *  # noqa: F403


def pytest_configure(config):
    """Hides GPUs, as tests/conftest.py does."""
    if not config.getoption("gpu", False):
        os.environ["CUDA_VISIBLE_DEVICES"] = "-1"
