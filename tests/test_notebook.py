"""The notebook as it is committed: complete, without outputs, and in a form whose changes can be read. CI runs it."""

import json
from pathlib import Path

import nbformat

PROJECT = Path(__file__).parents[1]


def test_notebook_has_canonical_form_and_no_outputs():
    text = (PROJECT / "notebooks/image_captioning.ipynb").read_text(encoding="utf-8")
    notebook = json.loads(text)
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5), "cells have ids from 4.5 on"
    assert json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" == text, "as Jupyter writes it"
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and not cell.get("execution_count"), f"clear the outputs of {cell['id']}"
