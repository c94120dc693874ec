"""The layout that CONTRIBUTING.md describes: what lies where, and what may import what."""

import ast
import functools
import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
SCRIPTS = [
    ROOT / f"{name}.py"
    for name in ("data_utils", "features", "tokenizer", "model", "train", "inference", "evaluate", "demo")
]
# A folder imports only those before it.
FOLDERS = ["base", "config", "images", "data", "decoder", "runs", "output", "scores", "training"]
CORE = sorted((ROOT / "captioning").rglob("*.py"))
GUESTS = sorted(path for path in (ROOT / "beyond").rglob("*.py") if "tests" not in path.parts)
MAX_FUNCTION_LINES = 60
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path):
    return path.relative_to(ROOT).as_posix()


@functools.cache
def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def imports(path):
    """The first two parts of all that a file imports, as `captioning.base`, at its top or inside functions."""
    nodes = list(ast.walk(parse(path)))
    names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    names += [f"{node.module}.{x.name}" for node in nodes if isinstance(node, ast.ImportFrom) for x in node.names]
    return {".".join(name.split(".")[:2]) for name in names}


def test_scripts_are_the_only_files_at_the_top():
    assert set(ROOT.glob("*.py")) == set(SCRIPTS)


def test_folders_import_in_one_direction():
    for path in (path for path in CORE if path.parent.name in FOLDERS):
        later = FOLDERS[FOLDERS.index(path.parent.name) + 1 :]
        assert not imports(path) & {f"captioning.{folder}" for folder in later}, relative(path)


def test_core_names_no_guest():
    """But for one table, which names modules that an option asks for."""
    for path in (*SCRIPTS, *CORE):
        if path.name != "guests.py":
            assert not re.search(r"\bbeyond[./]|from beyond", path.read_text(encoding="utf-8")), relative(path)


def test_functions_are_short():
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in (*SCRIPTS, *CORE, *GUESTS)
        for node in ast.walk(parse(path))
        if isinstance(node, FUNCTION)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}
