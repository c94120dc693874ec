"""The README and the documents keep their promises: what they name exists."""

import ast
import csv
import re
import shlex
from pathlib import Path

import pytest
from helpers.train_and_kill import build_small_cnn
from PIL import Image

import features
import inference
import train

ROOT = Path(__file__).parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("beyond/*/README.md")])
DOCUMENT_IDS = [path.relative_to(ROOT).as_posix() for path in DOCUMENTS]
ON_GITHUB = "../../actions/"  # GitHub's pages of the repository, relative to its front page
README = (ROOT / "README.md").read_text(encoding="utf-8")
CODE = [
    *ROOT.glob("*.py"),
    *(path for folder in ("captioning", "beyond", "benchmarks") for path in ROOT.glob(f"{folder}/**/*.py")),
]
SOURCES = "".join(path.read_text(encoding="utf-8") for path in CODE)


def defined_names(path):
    """Functions and classes of a file; a method as Class.method."""
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            names |= {f"{node.name}.{child.name}" for child in node.body if isinstance(child, ast.FunctionDef)}
    return names


def named_places(text):
    """Yields (file, name) of every `file.py`: `name`, `name` in a text."""
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`[\w.]+`(?:, )?)+)", text):
        for name in re.findall(r"`([\w.]+)`", names):
            yield file, name


def test_tutorial_map_names_functions_that_exist():
    section = README.split("## The tutorial's map")[1].split("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("| ")][1:]
    places = list(named_places(section))
    assert len(rows) >= 15
    assert all(list(named_places(row)) for row in rows if not row.startswith("| ---")), "a row names no place"
    for file, name in places:
        assert name in defined_names(ROOT / file), f"{file} has no {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_documents_link_to_files_that_exist(path):
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith(("http", ON_GITHUB)):
            assert (path.parent / link).exists(), f"{path.name} links to {link}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_documents_name_files_that_exist(path):
    for name in re.findall(r"`([\w/]+/[\w/]+\.(?:py|md|yml|json|ipynb))`", path.read_text(encoding="utf-8")):
        if not name.startswith(("runs/", "features/", "data/")):
            assert (ROOT / name).exists(), f"{path.name} names {name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=DOCUMENT_IDS)
def test_documented_options_exist(path):
    if path.name == "CHANGELOG.md":
        return  # it also names options that are gone
    options = set(re.findall(r"(?<![\w-])--([a-z][a-z-]+)", path.read_text(encoding="utf-8")))
    for option in options - {"logdir", "gpu", "data-binary"}:  # of TensorBoard, pytest (tests/conftest.py) and curl
        name = option.removeprefix("no-").replace("-", "_")
        assert f"--{option}" in SOURCES or re.search(rf"^    {name}: .* = (path_)?option\(", SOURCES, re.MULTILINE), (
            option
        )


# The example of one's own images, as printed.


@pytest.mark.slow
def test_example_of_own_images_runs_as_printed(tmp_path, monkeypatch, capsys):
    section = README.split("### Your own images")[1].split("\n## ")[0]
    table, commands = re.findall(r"^```\n(.*?)^```$", section, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(tmp_path)
    Path("captions.csv").write_text(table, encoding="utf-8")
    names = dict.fromkeys(row["image"] for row in csv.DictReader(table.splitlines()))
    for number, name in enumerate([*(f"photos/{name}" for name in names), "photo.jpg"]):
        Path(name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (60, 40), (60 * number, 99, 0)).save(name)
    monkeypatch.setattr(features, "build_feature_extractor", build_small_cnn)
    for command in commands.splitlines():
        _, script, *args = shlex.split(command, comments=True)
        {"train.py": train, "inference.py": inference}[script].main(args)
    captions = capsys.readouterr().out.splitlines()
    assert len(captions) == 1 + 5 and all(captions), "one caption, and the five best; those of a folder are in its CSV"
    assert Path("photo_attention.png").exists() and "boat.jpg" in Path("results.csv").read_text()
    assert len(list(Path("features/photos").glob("*.npy"))) == len(names) == 2
    assert Path("runs/photos/config.json").exists()
