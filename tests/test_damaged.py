"""Damaged inputs, hundreds of them, fed to the commands as a person runs them.

Each ends in success, with what is bad named and skipped, or in one line and exit code 2; never in a traceback, a hang
or a changed good file. The damages are seeded; InceptionV3 and Java are left out.
"""

import copy
import faulthandler
import functools
import io
import json
import math
import os
import re
import sys
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

import data_utils
import evaluate
import features
import inference
import model
import shapes
import tokenizer
import train
from common import file_sha256, run_command

COUNT = Counter()  # inputs fed, by kind
DATA = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--weights", "weights.h5"]
SMALL = ["--epochs", "1", "--batch-size", "8", "--embedding-dim", "8", "--units", "16"]
USUAL = {
    evaluate: ["--split", "test"],
    features: DATA,
    inference: ["shapes/images/shapes_00000.png"],
    train: [*DATA, *SMALL],
}
WRONG = (None, True, -1, 10**30, 0.5, math.nan, "text", [], ["text"], {"text": 1})


class Damage(NamedTuple):
    """A damaged file."""

    what: str
    content: bytes
    plausible: bool = False  # whether it may pass for good: a bit of a caption, or a number that could be


@pytest.fixture(scope="module", autouse=True)
def work(tmp_path_factory):
    """A folder with 12 drawn pictures, their captions in all formats, and a run trained on them for one epoch."""

    def cnn(pixels, training=False):
        mean = tf.reduce_mean(tf.cast(pixels, tf.float32), axis=(1, 2, 3))
        return tf.ones((tf.shape(pixels)[0], 64, 2048)) * mean[:, tf.newaxis, tf.newaxis] / 255

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("damaged"))
        patch.setattr(features, "build_cnn", lambda weights: cnn)
        patch.setattr(model, "build", functools.cache(model.build))  # so that the search is compiled once
        patch.setattr(evaluate, "has_java", lambda: False)
        images = json.loads(shapes.draw_dataset("shapes", pictures=12).read_text())["images"]
        for image in images:
            del image["shapes"]
        rows = [(f"images/{i['filename']}", i["cocoid"], s["raw"]) for i in images for s in i["sentences"]]
        coco = {
            "images": [{"id": i["cocoid"], "file_name": f"images/{i['filename']}"} for i in images],
            "annotations": [{"image_id": number, "caption": caption} for _, number, caption in rows],
        }
        for name, text in {
            "shapes/dataset_shapes.json": json.dumps({"images": images}),
            "coco.json": json.dumps(coco),
            "captions.csv": "image,caption\n" + "".join(f'{name},"{text}"\n' for name, _, text in rows),
            "tokens.txt": "".join(f"{name}#0\t{text}\n" for name, _, text in rows),
            "weights.h5": "stands for weights",
        }.items():
            Path(name).write_text(text)
        train.main(USUAL[train])
        evaluate.main(USUAL[evaluate])
        yield


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs a command: its exit code, standard output, and the lines of standard error without progress bars."""

    def run(script, *arguments):
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py"])
        sys.stderr.reconfigure(errors="backslashreplace")  # as it is outside pytest
        faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)  # a hang ends the tests
        code = 0
        try:
            run_command(lambda: script.main([*map(str, arguments)]))
        except SystemExit as end:
            code = end.code
        finally:
            faulthandler.cancel_dump_traceback_later()
        printed = capsys.readouterr()
        return code, printed.out, [line for line in re.split(r"[\r\n]+", printed.err) if line and "%|" not in line]

    hashes = lambda: {path: file_sha256(path) for path in Path().rglob("*") if path.is_file()}
    before = hashes()
    yield run
    after = hashes()
    assert [path for path, found in before.items() if after.get(path) != found] == [], "good files were changed"


@pytest.fixture
def feed(command):
    """Feeds damages of one file to a command, and asserts that each is refused in one line, named, or repaired."""

    def judge(path, damage, script, arguments, usual):
        name = f"{script.__name__}.py: "
        code, out, lines = command(script, *arguments)
        own = [line for line in lines if line.startswith(name)]
        named = any(path.name in line or str(path.parent) in line for line in (own if code else lines))
        if code not in (0, 2) or len(own) != (code == 2) or re.search("warning", str(lines), re.IGNORECASE):
            return "expected success, or exit code 2 and one line"
        if code and own != lines[-1:]:
            return "expected the mistake in the last line"
        return None if named or damage.plausible or (code == 0 and out == usual) else "expected the file to be named"

    def feed(kind, path, damages, script, arguments=None, repaired=False):
        path, problems = Path(path), []
        arguments, whole = arguments or USUAL[script], path.read_bytes()
        usual = command(script, *arguments)[1]
        for damage in damages:
            COUNT[kind] += 1
            path.write_bytes(damage.content)
            try:
                problem = judge(path, damage, script, arguments, usual)
                if repaired and path.read_bytes() != whole:
                    problem = "expected the file to be made anew"
            except Exception as error:
                problem = f"a traceback: {error!r}"
            finally:
                path.write_bytes(whole)
            if problem:
                problems.append(f"{damage.what}: {problem}")
        assert not problems, "\n".join(problems)

    return feed


# Damages.


def cut_and_flipped(content, count, text=False):
    """Nothing, beginnings of a file, which of text lines may pass for good, and the file with some bits flipped."""
    dice = np.random.default_rng(0)
    yield Damage("empty", b"")
    for _ in range(count):
        size = int(dice.integers(1, len(content) - 2))
        yield Damage(f"cut to {size} bytes", content[:size], plausible=text)
        flipped = bytearray(content)
        places = dice.integers(0, 8 * len(content), dice.integers(1, 5)).tolist()
        for place in places:
            flipped[place // 8] ^= 1 << place % 8
        yield Damage(f"bits {places} flipped", bytes(flipped), plausible=True)


def recoded(content):
    """A text file in other encodings, and what is no text of this kind."""
    for code in ("utf-16", "utf-16-le", "utf-32", "cp037"):
        yield Damage(code, content.decode().encode(code))
    yield Damage("Latin-1", content + "café".encode("latin-1"))
    yield Damage("brackets", b"[" * 100_000)
    yield Damage("zeros", bytes(1000))


def fields(content, path=()):
    """The way to every field of JSON; of a list, to its first."""
    if isinstance(content, dict | list) and content:
        for key in content if isinstance(content, dict) else [0]:
            yield (*path, key)
            yield from fields(content[key], (*path, key))


def edited(path, values=WRONG):
    """JSON with each of its fields replaced by each wrong value, and deleted."""
    content = json.loads(Path(path).read_text())
    for *way, last in fields(content):
        for value in (*values, "deleted"):
            changed = copy.deepcopy(content)
            parent = functools.reduce(lambda inner, key: inner[key], way, changed)
            plausible = type(value) is type(parent[last]) in (int, str)
            if value == "deleted":
                del parent[last]
                plausible = last == 0  # a row less
            else:
                parent[last] = value
            name = ".".join(map(str, (*way, last)))
            yield Damage(f"{name} {str(value)[:10]}", json.dumps(changed).encode(), plausible)


def damaged_text(path, count=5, text=False):
    """All that can be done to a text file."""
    content = Path(path).read_bytes()
    return [*cut_and_flipped(content, count, text), *recoded(content)]


# Annotations.


@pytest.mark.parametrize("name", ["shapes/dataset_shapes.json", "coco.json", "captions.csv", "tokens.txt"])
def test_annotations(feed, name):
    is_json = name.endswith(".json")
    damages = [*damaged_text(name, 8, text=not is_json), *(edited(name) if is_json else ())]
    feed("annotations", name, damages, features, ["--annotations", name, *DATA[2:]])


WORDLESS = ("", " ", ".", "?!?", "___", "🐶", "☃ ☃", "\x00", "\u200b", "\u00a0", "-- --")
ODD = (
    "dog",
    "word " * 500,
    "a" * 5000,
    "🐶 dog",
    "犬",
    "<end> <start>",
    "café",
    "NULL",
    "a\x00b",
    "=1+1",
    "\u202eright",
)


def test_captions(command):
    captions = (*WORDLESS, *ODD)
    names = [f"images/shapes_{number:05}.png" for number in range(12)]
    odd = [(names[i % 12], caption) for i, caption in enumerate(captions)]
    rows = [*((name, "a good caption") for name in names), *odd]
    Path("odd.csv").write_text("image,caption\n" + "".join(f"{name},{caption}\n" for name, caption in rows))
    COUNT["captions"] += len(captions)
    code, _, lines = command(train, "--annotations", "odd.csv", *DATA[2:], *SMALL, "--run", "odd")
    assert code == 0, lines
    skipped = [line for line in lines if line.startswith("skipped")]
    assert skipped == [
        f"skipped odd.csv: a caption without a word: {name!r} {caption!r}" for name, caption in odd[: len(WORDLESS)]
    ]


def test_quoting(feed):
    content = Path("captions.csv").read_bytes()
    lines = {  # and whether it can be read
        'X,"a dog\n': True,
        '"X","a ""big"" dog"\n': True,
        'X,a "big" dog\n': True,
        'X,"a "big" dog"\n': True,
        "X,a dog,,,,\n": True,
        '"X,a dog\n': False,
        'X,"a dog\nX,a cat\nX,"a bird"\n': False,
        'X,"a dog\n\n\n\n\n running"\n': False,
        "X;a dog\n": False,
        "X\ta dog\n": False,
        "'X','a dog, running'\n": False,
        "X\n": False,
        ",a dog\n": False,
        '"",""\n': False,
        'X,"' + "a dog " * 30_000 + '"\n': False,
        "../X,a dog\n": False,
        "images\\X,a dog\n": False,
        "X\x00,a dog\n": False,
        "X" * 5000 + ",a dog\n": False,
    }
    damages = [
        Damage(repr(line[:40]), content + line.replace("X", "images/shapes_00000.png").encode(), good)
        for line, good in lines.items()
    ]
    feed("quoting", "captions.csv", damages, features, ["--annotations", "captions.csv", *DATA[2:]])


def test_split_lists_and_captions_alone(feed):
    names = [f"shapes_{number:05}.png\n" for number in range(12)]
    for split, chosen in (("train", names[:8]), ("val", names[8:])):
        Path(f"{split}.txt").write_text("".join(chosen))
    content = Path("val.txt").read_bytes()
    damages = damaged_text("val.txt", text=True)
    damages += [Damage("a name more", b"none.png\n" + content), Damage("a name twice", names[0].encode() + content)]
    damages += [Damage("marked as UTF-8", b"\xef\xbb\xbf" + content), Damage("lines without names", b"\n \n\n")]
    arguments = ["--annotations", "captions.csv", "--images", "shapes"]
    feed("lists", "val.txt", damages, data_utils, [*arguments, "--train-list", "train.txt", "--val-list", "val.txt"])
    damages = [Damage(d.what, d.content, d.what in ("utf-16-le", "brackets", "zeros")) for d in recoded(content)]
    feed("lists", "val.txt", damages, tokenizer, ["val.txt"])


# Pictures.


def damaged_pictures():
    """Damaged JPEGs and PNGs, by name."""
    dice = np.random.default_rng(0)
    picture = Image.fromarray(dice.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for kind, (form, settings) in {
        "a.jpg": ("RGB", {}),
        "progressive.jpg": ("RGB", {"progressive": True}),
        "b.png": ("RGB", {}),
        "palette.png": ("P", {}),
    }.items():
        file = io.BytesIO()
        picture.convert(form).save(file, "JPEG" if "jpg" in kind else "PNG", **settings)
        whole = file.getvalue()
        for number, damage in enumerate(cut_and_flipped(whole, 10)):
            yield f"{number}_{kind}", damage.content
        for number in range(5):  # in the header, where sizes and kinds are
            flipped = bytearray(whole)
            flipped[int(dice.integers(8, 40))] ^= 1 << int(dice.integers(8))
            yield f"header_{number}_{kind}", bytes(flipped)
        if "png" in kind:
            for size in (70_000, 2**31 - 1, 0):
                header = whole[12:16] + size.to_bytes(4) * 2 + whole[24:29]
                yield f"size_{size}_{kind}", whole[:12] + header + zlib.crc32(header).to_bytes(4) + whole[33:]
        else:
            place = re.search(b"\xff[\xc0\xc2]\x00\x11\x08", whole).end()
            yield f"size_65535_{kind}", whole[:place] + b"\xff" * 4 + whole[place + 4 :]
    yield from {
        "text.jpg": b"no picture",
        "page.png": b"<html>404</html>",
        "program.png": b"\x7fELF" + bytes(99),
    }.items()


def test_pictures(command):
    Path("photos").mkdir()
    bad = dict(damaged_pictures())
    for name, content in bad.items():
        (Path("photos") / name).write_bytes(content)
    good = {"wide.png": (3000, 1), "high.jpg": (1, 3000), "dot.png": (1, 1)}
    if sys.platform == "linux":
        good[os.fsdecode(b"caf\xe9.png")] = (40, 30)  # a name that is not Unicode
    for name, size in good.items():
        Image.new("RGB", size, "red").save(Path("photos") / name)
    names = [name for name in (*bad, *good) if name.isprintable()]
    COUNT["pictures"] += len(bad) + len(good)

    Path("photos.csv").write_text("image,caption\n" + "".join(f"{name},a photo\n" for name in names))
    code, _, lines = command(features, "--annotations", "photos.csv", "--images", "photos", "--weights", "weights.h5")
    assert code == 0, lines
    skipped = {line.split(": ")[0].removeprefix("skipped photos/") for line in lines if line.startswith("skipped")}
    cached = {path.name.removesuffix(".npy") for path in Path("features/photos").glob("*.npy")}
    assert skipped | cached == set(names) and not skipped & cached, "named, or really read"
    assert skipped < set(bad) and len(skipped) > 50

    pictures = [*sorted(skipped), *good]
    code, out, lines = command(inference, *(f"photos/{name}" for name in pictures), "--output-dir", "plots")
    assert code == 2 and len(out.splitlines()) == len(list(Path("plots").iterdir())) == len(good)
    for name in skipped:
        assert sum(line.startswith(f"inference.py: photos/{name}: ") for line in lines) == 1
    assert lines[-1] == f"inference.py: {len(skipped)} of {len(pictures)} pictures could not be captioned"
    for name in sorted(skipped)[::12]:
        code, out, lines = command(inference, f"photos/{name}")
        assert (code, out) == (2, "") and lines[-1].startswith(f"inference.py: photos/{name}: ") and len(lines) == 2


# Features.


def damaged_features(path):
    """Files that are no features, some of them of the same size."""
    whole = path.read_bytes()
    yield from (damage for damage in cut_and_flipped(whole, 5) if "flipped" not in damage.what)
    for place in range(0, 128, 16):
        yield Damage(f"byte {place} flipped", whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
    rows = np.load(path)
    for what, array in {
        "turned": rows.T,
        "of another type": rows.view(np.int16),
        "a stack": rows[np.newaxis],
        "half as many": rows[:32].astype(np.float32),
        "in Fortran's order": np.asfortranarray(rows),
        "big-endian": rows.astype(">f2"),
        "complex": rows[:, :512].astype(np.complex64),
        "pickled": np.array([["pickled"] * 4] * 4, object),
        "pickled, as large": np.array([["p" * (len(whole) - 325)]], object),
        "a number": np.array(1.0),
        "none": rows[:0],
    }.items():
        file = io.BytesIO()
        np.save(file, array)
        yield Damage(what, file.getvalue())
    yield Damage("zeros", bytes(len(whole)))


@pytest.mark.parametrize("script", [features, evaluate, train])
def test_features(feed, script):
    path = Path("features/shapes/images/shapes_00000.png.npy")
    feed("features", path, damaged_features(path), script, repaired=script is not evaluate)


@pytest.mark.parametrize("script", [features, evaluate])
def test_what_features_are(feed, script):
    path = "features/shapes/features.json"
    feed("features.json", path, [*edited(path), *damaged_text(path)], script)


# Runs.


@pytest.mark.parametrize("script", [inference, evaluate, train])
def test_config(feed, script):
    path = "runs/shapes/config.json"
    damages = [*edited(path, ("text", -1) if script is train else WRONG), *damaged_text(path)]
    if script is not train:  # which alone reads the settings of the training
        damages = [damage for damage in damages if not damage.what.startswith("training.")]
    if script is inference:  # it draws what it captions, which takes a while
        damages = [damage for damage in damages if damage.what.startswith(("model", "features", "vocabulary"))][::3]
    feed("config.json", path, damages, script)


@pytest.mark.parametrize("script", [evaluate, train])
def test_vocabulary(feed, script):
    path = Path("runs/shapes/vocabulary.json")
    words = json.loads(path.read_text())
    others = {"turned": words[::-1], "twice": [*words, words[-1]], "less": words[:-1], "more": [*words, "a b"]}
    damages = [Damage(what, json.dumps(other).encode()) for what, other in others.items()]
    damages += [*edited(path), *damaged_text(path)]
    feed("vocabulary.json", path, damages, script, repaired=script is train)


@pytest.mark.parametrize(("name", "script"), [("best", evaluate), ("last", train)])
def test_checkpoints(feed, name, script):
    for path in sorted(Path("runs/shapes/checkpoints", name).iterdir()):
        feed("checkpoints", path, cut_and_flipped(path.read_bytes(), 5), script)


def test_weights_of_the_cnn(feed):
    path = Path("runs/shapes/cnn.h5")
    damages = [damage._replace(plausible=False) for damage in cut_and_flipped(path.read_bytes(), 3)]
    feed("CNN's weights", path, damages, inference)


def test_history(feed):
    path = Path("runs/shapes/history.csv")
    feed("history.csv", path, damaged_text(path, 10, text=True), train)


def test_results(feed):
    path = Path("results.json")
    path.write_bytes(Path("runs/shapes/captions_test.json").read_bytes())
    first, *rest = json.loads(path.read_text())
    damages = [*edited(path), *damaged_text(path, 8)]
    damages += [
        Damage(f"caption {caption[:9]!r}", json.dumps([first | {"caption": caption}, *rest]).encode(), plausible=True)
        for caption in (*WORDLESS, *ODD)
    ]
    damages.append(Damage("half a character", json.dumps([first | {"caption": "\ud800"}, *rest]).encode()))
    feed("results", path, damages, evaluate, ["--results", path, "--split", "test"])


def test_there_were_at_least_300():
    """Counts what the tests before it fed, so it comes last."""
    assert sum(COUNT.values()) >= 300, COUNT
