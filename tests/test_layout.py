"""The layout that CONTRIBUTING.md describes: what lies where, what imports what, and how long it may be."""

import ast
import graphlib
import re
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

# The scripts, and which of them each may import.
ALLOWED_SCRIPTS: dict[str, set[str]] = {
    "data_utils": set(),
    "tokenizer": set(),
    "model": set(),
    "features": {"data_utils"},
    "inference": {"data_utils", "features", "tokenizer", "model"},
    "serve": {"features", "inference"},
    "export": {"features", "tokenizer", "model", "inference"},
    "evaluate": {"data_utils", "features", "tokenizer", "model", "inference"},
    "train": {"data_utils", "features", "tokenizer", "model", "inference", "evaluate"},
    "demo": {"data_utils", "features", "tokenizer", "model", "inference", "evaluate", "train"},
}
SCRIPTS = [ROOT / f"{name}.py" for name in ALLOWED_SCRIPTS]
PACKAGE = sorted((ROOT / "captioning").rglob("*.py"))
MODULES = [path for path in PACKAGE if path.name != "__init__.py"]
FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


def relative(path):
    return path.relative_to(ROOT).as_posix()


def module_name(path):
    """Returns the name a file is imported by: `features`, `captioning.files`; `captioning` for its __init__.py."""
    return relative(path).removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def parse(path):
    return ast.parse(path.read_text(encoding="utf-8"), relative(path))


def project_imports(path):
    """Returns the names of the project's modules that a file imports, at its top or inside functions."""
    known = {module_name(other) for other in [*SCRIPTS, *PACKAGE]}
    imported = set()
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names} & known
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{relative(path)}:{node.lineno}: expected an absolute import, found a relative one"
            members = {f"{node.module}.{alias.name}" for alias in node.names} & known
            imported |= members or ({node.module} & known)
    return imported


def draw_imports():
    """Draws the import graph as CONTRIBUTING.md shows it.

    Modules stand in floors, from the ground up: a module imports only modules of lower floors. Each has a line with
    the modules that it imports; those of the package are named without `captioning.` and follow the scripts.
    """
    imports = {path: project_imports(path) for path in [*MODULES, *SCRIPTS]}
    paths = {module_name(path): path for path in imports}
    width = max(len(relative(path)) for path in imports)
    sorter = graphlib.TopologicalSorter({path: [paths[name] for name in imports[path]] for path in imports})
    sorter.prepare()
    lines = ["imports:"]
    while sorter.is_active():
        floor = sorted(sorter.get_ready(), key=relative)
        sorter.done(*floor)
        lines.append("")
        for path in floor:
            names = sorted(imports[path], key=lambda name: (name.startswith("captioning."), name))
            text = " ".join(name.removeprefix("captioning.") for name in names) or "-"
            indent = " " * (width + 2)
            lines += textwrap.wrap(text, 120, initial_indent=f"{relative(path):{width}}  ", subsequent_indent=indent)
    return "\n".join(lines) + "\n"


def public_definitions(body, prefix=""):
    """Yields the name and the node of every public function, class and method."""
    for node in body:
        if isinstance(node, FUNCTION | ast.ClassDef) and not node.name.startswith("_"):
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from public_definitions(node.body, f"{prefix}{node.name}.")


def test_scripts_are_the_only_files_at_the_top():
    assert {path.name for path in ROOT.glob("*.py")} == {path.name for path in SCRIPTS}


@pytest.mark.parametrize("path", PACKAGE, ids=relative)
def test_package_imports_no_script(path):
    assert not project_imports(path) & ALLOWED_SCRIPTS.keys()


@pytest.mark.parametrize("path", SCRIPTS, ids=relative)
def test_scripts_import_each_other_in_one_direction(path):
    assert project_imports(path) & ALLOWED_SCRIPTS.keys() <= ALLOWED_SCRIPTS[module_name(path)]


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGE], ids=relative)
def test_files_and_functions_are_short(path):
    num_lines = len(path.read_text(encoding="utf-8").splitlines())
    assert num_lines <= MAX_FILE_LINES, f"{relative(path)} has {num_lines} lines"
    lengths = {
        f"{relative(path)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for node in ast.walk(parse(path))
        if isinstance(node, FUNCTION)
    }
    assert not {name: length for name, length in lengths.items() if length > MAX_FUNCTION_LINES}


@pytest.mark.parametrize("path", [*SCRIPTS, *PACKAGE], ids=relative)
def test_public_definitions_have_docstrings(path):
    module = parse(path)
    assert ast.get_docstring(module)
    assert not [name for name, node in public_definitions(module.body) if not ast.get_docstring(node)]


def test_import_graph_needs_no_package_prefix():
    names = [path.stem for path in [*SCRIPTS, *MODULES]]
    assert len(names) == len(set(names)), "a module of captioning/ has the name of a script"


def test_import_graph_in_contributing_is_current():
    expected = draw_imports()
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    drawn = re.search(r"^```text\n(imports:\n.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if drawn is None or drawn.group(1) != expected:
        pytest.fail(f"CONTRIBUTING.md needs this block:\n\n```text\n{expected}```\n", pytrace=False)
