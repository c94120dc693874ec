"""Damaged inputs, some 1,000 of them, given to the commands as they are run from a shell.

Each ends in success, with what is damaged named and skipped, or in one line and exit code 2; never in a traceback, a
hang or a changed good file. InceptionV3 and Java are left out.
"""

import contextlib
import faulthandler
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
from helpers.annotation_files import WRITERS
from helpers.damages import cut_and_flip, damage_features, damage_images, damage_text, edit_json
from helpers.quick_commands import quick_commands
from PIL import Image

import data_utils
import evaluate
import features
import inference
import train
from captioning.base.cli import Command, run_main
from captioning.base.files import file_sha256
from captioning.base.quiet_tensorflow import tf
from captioning.data import shapes
from captioning.output import plots, results
from captioning.runs.run_folder import latest_checkpoint

pytestmark = pytest.mark.slow

IMAGES = [f"images/shapes_{number:05}.png" for number in range(12)]
DATA = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--cnn-weights", "weights.h5"]
# With these settings an epoch suffices for captions that end: longer ones take longer to decode and to plot.
SMALL = ["--embedding-dim", "8", "--units", "16", "--epochs", "1", "--batch-size", "2", "--learning-rate", "0.05"]
ODD_CAPTIONS = ("", "?!?", "\x00", "\u200b", "word " * 500, "a" * 5000, "🐶 dog", "<end> <start>", "=1+1", "\ud800")
USUAL_ARGUMENTS = {
    evaluate: ["--split", "test"],
    features: DATA,
    inference: [f"shapes/{IMAGES[0]}"],
    train: [*DATA, *SMALL],
}


def mean_brightness_extractor(cnn_weights, cnn=None):
    """Stands for the CNN: all features of an image are its mean brightness."""

    def extractor(pixels, training=False):
        mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))  # (B,)
        return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis] / 255

    return extractor


def write_empty_plot(*args, **_):
    """Stands for plot_attention, which takes longer than all the rest."""
    path = next(argument for argument in args if isinstance(argument, Path))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()


@pytest.fixture(scope="module", autouse=True)
def run_dir(tmp_path_factory):
    """The folder of a run, in a folder with 12 images and their captions, on which it is trained for one epoch."""
    with quick_commands(), pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("damaged"))
        patch.setattr(features, "build_feature_extractor", mean_brightness_extractor)
        patch.setattr(results, "plot_attention", write_empty_plot)
        shapes.draw_dataset("shapes", num_images=len(IMAGES))
        Path("weights.h5").write_text("stands for weights")
        train.main(USUAL_ARGUMENTS[train])
        evaluate.main(USUAL_ARGUMENTS[evaluate])
        yield Path("runs/shapes")


@pytest.fixture
def run_command(capsys, monkeypatch):
    """Runs a command; returns its exit code, standard output, and lines of standard error without progress bars.

    Asserts that it succeeds, or ends in one line and exit code 2, and that no file that existed was changed.
    """

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside pytest
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # a hang ends the tests
        code = 0
        try:
            run_main(lambda: script.main([*map(str, arguments)]))
        except SystemExit as end:
            code = end.code
        finally:
            faulthandler.cancel_dump_traceback_later()
        out, err = capsys.readouterr()
        lines = [line for line in re.split(r"[\r\n]+", err) if line and "%|" not in line]
        mistakes = [line for line in lines if line.startswith(f"{script.__name__}.py: ")]
        assert code in (0, 2) and len(mistakes) >= (code == 2), lines
        assert code == 0 or lines[-1] == mistakes[-1], "the last line is the mistake"
        assert not re.search("warning", str(lines), re.IGNORECASE), lines
        assert not unknown_options(lines), "options that the command does not have"
        return code, out, lines

    def hash_files():
        return {path: file_sha256(path) for path in Path().rglob("*") if path.is_file()}

    before = hash_files()
    yield run
    after = hash_files()
    assert [path for path, sha256 in before.items() if after.get(path) != sha256] == [], "good files were changed"


def unknown_options(lines):
    """Returns the options in messages that the command does not have; other commands may be named with theirs."""
    text = re.sub(r"`python .*?`", "", " ".join(lines))
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", text)) - Command.options


@pytest.fixture
def check_damages(run_command):
    """Gives damages of a file to a command: each passes for good, is repaired, or is refused with its name."""

    def check(path, damages, script, arguments=None, is_repaired=False):
        path, problems = Path(path), []
        content = path.read_bytes()
        for description, damaged in damages:
            path.write_bytes(damaged)
            try:
                code, _, lines = run_command(script, *(arguments or USUAL_ARGUMENTS[script]))
                assert code == 0 or any(path.name in line or str(path.parent) in line for line in lines), lines
                assert not is_repaired or path.read_bytes() == content, "expected the file to be made again"
            except Exception as error:
                problems.append(f"{description}: {error!r}")
            finally:
                path.write_bytes(content)
        assert not problems, "\n".join(problems)

    return check


# Annotations.


@pytest.mark.parametrize("description", WRITERS)
def test_annotations_of_every_format_damaged(check_damages, description):
    names = ["".join(filter(str.isalnum, description)) + f"_{name}" for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg")]
    _, write = WRITERS[description]
    path = Path("formats") / description.replace(" ", "_")
    path.parent.mkdir(exist_ok=True)
    write({name: [f"a dog runs over {name}", "the dog"] for name in names}, path)
    folder = path if path.is_dir() else path.parent
    for name in names:
        (folder / name).touch()
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size) or [path]
    for file in files[:2]:
        damages = list(damage_text(file))
        with contextlib.suppress(ValueError):  # text, or JSON Lines
            damages += edit_json(file, (None, -1, "text"))
        check_damages(file, damages, data_utils, ["--annotations", path, "--images", folder])


# Images.


def test_images_damaged_are_skipped_by_features_and_refused_by_inference(run_command, monkeypatch):
    monkeypatch.setattr(results, "plot_attention", plots.plot_attention)
    Path("photos").mkdir()
    bad = dict(damage_images())
    for name, content in bad.items():
        (Path("photos") / name).write_bytes(content)
    good = {"wide.png": (3000, 1), "high.jpg": (1, 3000), "dot.png": (1, 1)}
    if sys.platform == "linux":
        good[os.fsdecode(b"caf\xe9.png")] = (40, 30)  # a name that is not Unicode
    for name, size in good.items():
        Image.new("RGB", size, "red").save(Path("photos") / name)
    names = [name for name in (*bad, *good) if name.isprintable()]

    Path("photos.csv").write_text("image,caption\n" + "".join(f"{name},a photo\n" for name in names))
    arguments = ["--annotations", "photos.csv", "--images", "photos", "--cnn-weights", "weights.h5"]
    code, _, lines = run_command(features, *arguments)
    assert code == 0, lines
    skipped = {line.split(": ")[0].removeprefix("skipped photos/") for line in lines if line.startswith("skipped")}
    cached = {path.name.removesuffix(".npy") for path in Path("features/photos").glob("*.npy")}
    assert skipped | cached == set(names) and not skipped & cached, "named, or really read"
    assert skipped < set(bad) and len(skipped) > 30

    images = [*sorted(skipped), *good]
    code, out, lines = run_command(
        inference, *(f"photos/{name}" for name in images), "--output-dir", "plots", "--plots"
    )
    assert code == 2 and len(out.splitlines()) == len(list(Path("plots").iterdir())) == len(good)
    for name in skipped:
        assert sum(line.startswith(f"inference.py: photos/{name}: ") for line in lines) == 1
    assert lines[-1] == f"inference.py: {len(skipped)} of {len(images)} images could not be captioned"


# Features.


@pytest.mark.parametrize("script", [evaluate, train])
def test_feature_files_damaged(check_damages, script):
    path = Path(f"features/shapes/{IMAGES[0]}.npy")
    check_damages(path, damage_features(path), script, is_repaired=script is train)


def test_feature_manifest_damaged(check_damages):
    path = "features/shapes/features.json"
    check_damages(path, [*edit_json(path), *damage_text(path)], features)


# Runs.


def test_config_damaged(check_damages, run_dir):
    path = run_dir / "config.json"
    check_damages(path, [*edit_json(path), *damage_text(path)], inference)
    check_damages(path, damage_text(path), train)


@pytest.mark.parametrize("script", [evaluate, train])
def test_vocabulary_damaged(check_damages, run_dir, script):
    path = run_dir / "vocabulary.json"
    words = json.loads(path.read_text())
    others = {"turned": words[::-1], "twice": [*words, words[-1]], "fewer": words[:-1], "more": [*words, "a b"]}
    damages = [(description, json.dumps(other).encode()) for description, other in others.items()]
    if script is evaluate:
        damages += [*edit_json(path), *damage_text(path)]
    check_damages(path, damages, script, is_repaired=script is train)


def test_best_checkpoint_damaged(check_damages, run_dir):
    for path in sorted((run_dir / "checkpoints/best").iterdir()):
        check_damages(path, cut_and_flip(path.read_bytes(), 2), evaluate)


def test_last_checkpoint_damaged(run_command, run_dir, tmp_path):
    """The training goes on with the one before it."""
    newest = Path(latest_checkpoint(run_dir / "checkpoints/last")).name
    for path in sorted((run_dir / "checkpoints/last").iterdir()):
        if not path.name.startswith(("checkpoint", newest)):  # which is not read
            continue
        for number, (_, damaged) in enumerate(cut_and_flip(path.read_bytes(), 2)):
            run = shutil.copytree(run_dir, tmp_path / path.name / str(number))
            (run / "checkpoints/last" / path.name).write_bytes(damaged)
            arguments = [*USUAL_ARGUMENTS[train], "--features-dir", "features/shapes", "--run", run]
            assert run_command(train, *arguments)[0] == 0


def test_cnn_weights_damaged(check_damages, run_dir):
    path = run_dir / "cnn.h5"
    check_damages(path, cut_and_flip(path.read_bytes(), 2), inference)


def test_history_damaged(check_damages, run_dir):
    path = run_dir / "history.csv"
    check_damages(path, damage_text(path), train)


def test_results_damaged(check_damages, run_dir):
    path = Path("results.json")
    path.write_bytes((run_dir / "captions_test.json").read_bytes())
    first, *rest = json.loads(path.read_text())
    odd = [(caption[:9], json.dumps([first | {"caption": caption}, *rest]).encode()) for caption in ODD_CAPTIONS]
    check_damages(path, [*edit_json(path), *damage_text(path), *odd], evaluate, ["--results", path, "--split", "test"])
