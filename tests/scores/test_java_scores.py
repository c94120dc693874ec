import subprocess
import sys
from urllib.error import URLError

import pytest

from captioning.base.cli import InputError
from captioning.scores import java_scores
from captioning.scores.java_scores import check_spice, compute_java_score, has_java, java_version

REFERENCES = {0: ["a dog runs", "the dog"], 1: ["two men"]}
CAPTIONS = {0: ["a dog"], 1: ["men"]}


@pytest.mark.parametrize(
    ("returncode", "printed", "version"),
    [
        (0, 'openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17),
        (0, 'java version "1.8.0_292"', 8),
        (0, "a java of another kind", 0),
        (1, "The operation couldn't be completed. Unable to locate a Java Runtime.", None),
    ],
)
def test_java_version_runs_it(monkeypatch, returncode, printed, version):
    done = subprocess.CompletedProcess([], returncode, "", printed)
    monkeypatch.setattr(java_scores.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(java_scores.subprocess, "run", lambda *_, **__: done)
    assert java_version() == version and has_java() is (version is not None)


def test_java_version_without_java(monkeypatch):
    monkeypatch.setattr(java_scores.shutil, "which", lambda name: None)
    assert java_version() is None


@pytest.mark.skipif(not has_java(), reason="METEOR needs Java")
def test_meteor_that_cannot_run_is_left_out_and_does_not_hang(monkeypatch, tmp_path, capsys):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", str(tmp_path / "none.jar"))
    assert compute_java_score("METEOR", {0: ["a dog"]}, {0: ["a dog"]}) is None
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("METEOR is left out: its Java program failed (")
    assert line.endswith("; it needs 2 GB of memory, and a folder without a space in its path")


# SPICE. Its parser is not there, so that a program of Python stands for the Java program.


@pytest.fixture
def spice_folder(tmp_path, monkeypatch):
    """A folder that pycocoevalcap takes for that of SPICE, with files that stand for CoreNLP."""
    from pycocoevalcap.spice import get_stanford_models, spice

    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(get_stanford_models, "SPICEDIR", str(tmp_path))
    (tmp_path / "lib").mkdir()
    for name in ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar"):
        (tmp_path / "lib" / name).touch()
    return tmp_path


def fake_java(folder, monkeypatch, program):
    """Puts a `java` first in PATH that runs a program of Python; `items` is what SPICE is given, `out` its answer."""
    path = folder / "bin/java"
    path.parent.mkdir()
    lines = (
        f"#!{sys.executable}",
        "import json, sys",
        "items = json.load(open(sys.argv[4]))",
        "out = open(sys.argv[sys.argv.index('-out') + 1], 'w')",
        program,
    )
    path.write_text("\n".join(lines))
    path.chmod(0o755)
    monkeypatch.setenv("PATH", str(path.parent))


@pytest.mark.parametrize(("version", "found"), [(None, "none"), (17, "Java 17"), (0, "Java of an unknown version")])
def test_check_spice_refuses_java_that_it_cannot_run_in(monkeypatch, version, found):
    monkeypatch.setattr(java_scores, "java_version", lambda: version)
    with pytest.raises(
        InputError, match=rf"--spice needs Java 8 to 15, found {found}; put the java of version 8 or 11"
    ):
        check_spice()


def test_spice_is_what_the_program_writes(spice_folder, monkeypatch, capfd):
    scores = "{'All': {'f': len(item['test']) / 10, 'pr': None}}"
    answer = f"[{{'image_id': item['image_id'], 'scores': {scores}}} for item in reversed(items)]"
    fake_java(spice_folder, monkeypatch, f"print('Parsing'); json.dump({answer}, out)")
    total, by_image = compute_java_score("SPICE", REFERENCES, CAPTIONS)
    assert by_image == pytest.approx([0.5, 0.3]) and total == pytest.approx(0.4)
    printed = capfd.readouterr()
    assert printed.out == "" and "Parsing" in printed.err


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("sys.exit(1)", "exit status 1"),
        ("out.write('half a')", ""),
        ("json.dump([{'image_id': i, 'scores': {'All': {'f': None}}} for i in (0, 1)], out)", "an image has no score"),
    ],
)
def test_spice_that_fails_is_left_out(spice_folder, monkeypatch, capsys, program, reason):
    fake_java(spice_folder, monkeypatch, program)
    assert compute_java_score("SPICE", REFERENCES, CAPTIONS) is None
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("SPICE is left out: its Java program failed (") and reason in line
    assert "; it needs 8 GB of memory, and in its folder, which it writes into, lib/ with " in line


def test_spice_without_its_parser_and_without_a_network_is_left_out(spice_folder, monkeypatch, capsys):
    from pycocoevalcap.spice import get_stanford_models

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(get_stanford_models, "urlretrieve", fail)
    (spice_folder / "lib/stanford-corenlp-3.6.0.jar").unlink()
    assert compute_java_score("SPICE", REFERENCES, CAPTIONS) is None
    line = capsys.readouterr().err.splitlines()[-1]
    assert "no network" in line and line.endswith("stanford-corenlp-full-2015-12-09.zip")
