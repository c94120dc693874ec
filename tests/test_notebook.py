"""The notebook as it is committed: complete, without outputs, and in a form whose changes can be read. CI runs it."""

import json
from pathlib import Path

import nbformat
import pytest

PROJECT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def text():
    return (PROJECT / "notebooks/image_captioning.ipynb").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def cells(text):
    return json.loads(text)["cells"]


@pytest.fixture(scope="module")
def code(cells):
    """The source of every code cell, by the cell's id."""
    return {cell["id"]: "".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"}


def test_notebook_has_canonical_form_and_no_outputs(text, cells):
    notebook = json.loads(text)
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5), "cells have ids from 4.5 on"
    assert json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" == text, "as Jupyter writes it"
    for cell in cells:
        assert not cell.get("outputs") and not cell.get("execution_count"), f"clear the outputs of {cell['id']}"
