"""The notebook as it is committed: whole, without outputs, and in a form whose changes can be read. CI executes it."""

import ast
import io
import json
import re
import sys
from pathlib import Path

import nbformat

from common import progress_bar

PATH = Path(__file__).parents[1] / "notebooks/image_captioning.ipynb"
TEXT = PATH.read_text(encoding="utf-8")
CELLS = json.loads(TEXT)["cells"]
CODE = {cell["id"]: "".join(cell["source"]) for cell in CELLS if cell["cell_type"] == "code"}


def test_it_is_a_notebook_written_to_be_compared():
    notebook = json.loads(TEXT)
    nbformat.validate(notebook)
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5), "cells have ids from 4.5 on"
    assert json.dumps(notebook, indent=1, ensure_ascii=False) + "\n" == TEXT, "as Jupyter writes it"


def test_it_has_no_outputs():
    for cell in CELLS:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None), f"clear the outputs of {cell['id']}"


def test_every_cell_is_python_without_definitions_that_the_scripts_have():
    theirs = {
        node.name
        for script in PATH.parents[1].glob("*.py")
        for node in ast.walk(ast.parse(script.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for name, source in CODE.items():
        own = {node.name for node in ast.walk(ast.parse(source, name)) if isinstance(node, ast.FunctionDef)}
        assert not own & theirs, f"the cell {name} should call {own & theirs}"


def test_the_form_has_every_choice_and_gives_nothing_away():
    fields = dict(re.findall(r"^(\w+) = (.*?)  # @param", "\n".join(CODE.values()), re.MULTILINE))
    assert fields == {
        "repository": '""',
        "dataset_name": '"shapes"',
        "num_captions": '""',
        "attention": '"soft"',
        "epochs": "0",
        "keep_on_drive": "False",
        "address_or_file": '""',
        "upload": "False",
        "beam_size": "5",
        "copy_to_drive": "False",
        "more_epochs": "1",
    }, "the defaults must run anywhere from top to bottom"
    assert next(iter(CODE)) == "setup" and CODE["setup"].startswith("repository ="), "the first thing to fill in"


def test_progress_is_live_in_a_notebook(monkeypatch):
    stream = type("OutStream", (io.StringIO,), {"__module__": "ipykernel.iostream"})
    for error, live in ((stream(), True), (io.StringIO(), False)):
        monkeypatch.setattr(sys, "stderr", error)
        with progress_bar(total=1) as bar:
            assert (bar.mininterval < 1) == live
