import subprocess
import sys
from pathlib import Path
from urllib.error import URLError

import pytest

from captioning.base.cli import InputError
from captioning.scores import java_scores
from captioning.scores.java_scores import JavaError, check_spice, has_java, java_version

REFERENCES = {0: ["a dog runs", "the dog"], 1: ["two men"]}
CAPTIONS = {0: ["a dog"], 1: ["men"]}


@pytest.mark.parametrize(
    ("returncode", "printed", "version"),
    [
        (0, 'openjdk version "17.0.15" 2025-04-15\nOpenJDK Runtime', 17),
        (0, 'java version "1.8.0_292"', 8),
        (0, 'openjdk version "25" 2025-09-16', 25),
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
    assert java_version() is None and has_java() is False


@pytest.mark.skipif(not has_java(), reason="METEOR needs Java")
def test_meteor_that_cannot_run_raises_and_does_not_hang(monkeypatch, tmp_path):
    from pycocoevalcap.meteor import meteor

    monkeypatch.setattr(meteor, "METEOR_JAR", str(tmp_path / "none.jar"))
    with pytest.raises(JavaError, match="METEOR's Java program failed; it needs 2 GB of memory"):
        java_scores.meteor({0: ["a dog"]}, {0: ["a dog"]})
    (tmp_path / "a b").mkdir()
    monkeypatch.setattr(meteor, "__file__", str(tmp_path / "a b/meteor.py"))
    with pytest.raises(JavaError, match="a folder with a space in its path"):
        java_scores.meteor({0: ["a dog"]}, {0: ["a dog"]})


# SPICE. Its parser is not there, so that a program of Python stands for the Java program.


@pytest.fixture
def spice_folder(tmp_path, monkeypatch):
    """A folder that pycocoevalcap takes for that of SPICE, with files that stand for CoreNLP."""
    from pycocoevalcap.spice import get_stanford_models, spice

    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(get_stanford_models, "SPICEDIR", str(tmp_path))
    (tmp_path / "lib").mkdir()
    for name in java_scores.CORENLP_JARS:
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


@pytest.mark.parametrize(
    ("version", "found"), [(None, "found none"), (17, "found Java 17"), (7, "found Java 7"), (0, "an unknown version")]
)
def test_check_spice_refuses_java_that_it_cannot_run_in(monkeypatch, version, found):
    monkeypatch.setattr(java_scores, "java_version", lambda: version)
    with pytest.raises(InputError, match=rf"--spice needs Java 8 to 15, .*{found}; put the java of version 8 or 11"):
        check_spice()


def test_check_spice_refuses_a_folder_that_it_cannot_write_into(monkeypatch, spice_folder):
    monkeypatch.setattr(java_scores, "java_version", lambda: 11)
    check_spice()
    monkeypatch.setattr(java_scores.os, "access", lambda path, mode: Path(path) != spice_folder)
    with pytest.raises(InputError, match=f"--spice writes into {spice_folder}, which is read-only"):
        check_spice()


def test_spice_returns_what_the_program_writes(spice_folder, monkeypatch, capfd):
    scores = "{'All': {'f': len(item['test']) / 10, 'pr': None}}"
    answer = f"[{{'image_id': item['image_id'], 'scores': {scores}}} for item in reversed(items)]"
    fake_java(spice_folder, monkeypatch, f"print('Parsing'); json.dump({answer}, out)")
    total, by_image = java_scores.spice(REFERENCES, CAPTIONS)
    assert by_image == pytest.approx([0.5, 0.3]) and total == pytest.approx(0.4)
    printed = capfd.readouterr()
    assert printed.out == "" and "Parsing" in printed.err


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("sys.exit(1)", r"SPICE's Java program failed \(.*exit status 1.*\); it needs 8 GB of memory"),
        ("out.write('half a')", "SPICE's Java program failed"),
        (
            "json.dump([{'image_id': number, 'scores': {'All': {'f': None}}} for number in (0, 1)], out)",
            "SPICE's Java program gave an image no score",
        ),
    ],
)
def test_spice_that_fails_raises(spice_folder, monkeypatch, program, message):
    fake_java(spice_folder, monkeypatch, program)
    with pytest.raises(JavaError, match=message):
        java_scores.spice(REFERENCES, CAPTIONS)


def test_spice_without_its_parser_and_without_a_network_raises(spice_folder, monkeypatch):
    from pycocoevalcap.spice import get_stanford_models

    def fail(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(get_stanford_models, "urlretrieve", fail)
    (spice_folder / "lib" / java_scores.CORENLP_JARS[0]).unlink()
    with pytest.raises(JavaError) as error:
        java_scores.spice(REFERENCES, CAPTIONS)
    assert str(error.value) == (
        "stanford-corenlp-3.6.0.jar could not be downloaded (<urlopen error no network>); put what "
        f"http://nlp.stanford.edu/software/stanford-corenlp-full-2015-12-09.zip holds of them into {spice_folder}/lib"
    )
