"""Packing a run, and unpacking it: the same captions, and one line for whatever is no packed run."""

import functools
import http.server
import json
import re
import shutil
import stat
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from helpers.fixtures import MANIFEST

import beyond.share.__main__ as share
import inference
import model
from beyond.consensus.index import Index, describe_source
from beyond.share import packed_run
from beyond.share.packed_run import open_run, without_paths
from beyond.share.run_packer import pack_run, run_name
from captioning.base import downloads
from captioning.base.cli import InputError
from captioning.base.files import file_sha256, read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.run_config import RunConfig
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig
from captioning.data.annotations import Example
from captioning.runs.run_folder import best_checkpoint, read_config, write_config
from tokenizer import Tokenizer

WORDS = ["<pad>", "<unk>", "<start>", "<end>", "a", "dog"]
SCORES = {
    "run": "/home/me/runs/small",
    "split": "test",
    "images": 1000,
    "beam_size": 5,
    "max_words": 50,
    "tokenizer": "PTB",
    "scores": {"BLEU-4": 12.34, "CIDEr": 45.61},
}


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """The folder of unpacked runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg/image-captioning"


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run with scores, a history and more than is packed; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "small"
    write_json(run / "vocabulary.json", WORDS)
    write_json(run / "metrics_test_beam5.json", SCORES)
    for name in ("history.csv", "loss.png", "captions_test.json", "checkpoints/last/ckpt-9.index"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("content")
    config = RunConfig(
        model=ModelConfig(vocab_size=6, embedding_dim=4, units=8),
        train=TrainConfig(epochs=7),
        data=DataConfig(annotations="/home/me/secret/captions.csv", images="C:\\Users\\me\\photos", data_dir="/mnt/x"),
        objective={},
        features={**MANIFEST, "folder": "/home/me/features"},
        unreadable_images=("bad.jpg",),
        data_fingerprint="0123abcd",
        vocabulary_sha256=file_sha256(run / "vocabulary.json"),
    )
    write_config(run, config)
    checkpoint = tf.train.Checkpoint(model=model.build(config.model))
    manager = tf.train.CheckpointManager(checkpoint, str(run / "checkpoints/best"), max_to_keep=1)
    manager.save(checkpoint_number=3)
    return run


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(small_run, tmp_path / "copies/small")


@pytest.fixture
def packed(small_run, tmp_path, cache_dir):
    """The small run as a .zip."""
    pack_run(small_run, tmp_path / "small.zip")
    return tmp_path / "small.zip"


def read_zip(path):
    """Returns the content of every file of a .zip by its name."""
    with zipfile.ZipFile(path) as archive:
        return {member.filename: archive.read(member) for member in archive.infolist()}


def write_zip(path, members, compression=zipfile.ZIP_STORED):
    """Writes a .zip of contents by name, or by ZipInfo."""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)


def names_in(folder):
    return [path.name for path in folder.iterdir()]


# Packing.


def test_pack_run_holds_what_captioning_needs_and_tells_nothing_of_the_machine(small_run, packed, tmp_path):
    members = read_zip(packed)
    assert sorted(name.removeprefix("small/") for name in members) == [
        *("MODEL_CARD.md", "checkpoints/best/checkpoint", "checkpoints/best/ckpt-1.data-00000-of-00001"),
        *("checkpoints/best/ckpt-1.index", "config.json", "history.csv", "loss.png", "metrics_test_beam5.json"),
        "vocabulary.json",
    ]
    for name, content in members.items():
        assert not re.search(b"/home|Users|secret|/mnt|" + str(small_run.parent).encode(), content), name
    config = json.loads(members["small/config.json"])
    assert (config["data"]["annotations"], config["data"]["images"]) == ("captions.csv", "photos")
    assert config["data"]["data_dir"] is None and config["features"]["folder"] == "features"
    assert json.loads(members["small/metrics_test_beam5.json"]) == {**SCORES, "run": "small"}
    weights = (small_run / "checkpoints/best/ckpt-3.data-00000-of-00001").read_bytes()
    assert members["small/checkpoints/best/ckpt-1.data-00000-of-00001"] == weights


def test_pack_run_gives_the_same_bytes_also_of_the_unpacked_run(small_run, packed, tmp_path):
    for run in (small_run, open_run(packed)):
        pack_run(run, tmp_path / "again.zip")
        assert (tmp_path / "again.zip").read_bytes() == packed.read_bytes()


def test_pack_run_fills_the_model_card_in(packed, copied_run, tmp_path):
    text = read_zip(packed)["small/MODEL_CARD.md"].decode()
    head, text = text.removeprefix("---\n").split("---\n\n")  # YAML, whose values may be JSON
    values = dict(line.split(": ", 1) for line in head.splitlines())
    assert values["pipeline_tag"] == "image-to-text" and values["license"].startswith("other  # TO FILL IN")
    results = json.loads(values["model-index"])[0]["results"]
    assert results[0]["dataset"] == {"type": "captions.csv", "name": "captions.csv", "split": "test"}
    assert results[0]["metrics"][0] == {"type": "bleu", "name": "BLEU-4, metrics_test_beam5.json", "value": 12.34}
    assert text.startswith("# small\n") and "a GRU with soft attention" in text
    for part in (
        "annotations `captions.csv`. Settings that are not the defaults: annotations captions.csv, images photos.",
        "cannot be read: 1.",
        "`0123abcd`",
        "weights: ImageNet's; images of 299x299",
        "the defaults: epochs 7.",
        "| test | 1,000 | beam search, 5 wide (beam_size 5, max_words 50) | PTB | BLEU-4 12.3, CIDEr 45.6 |",
    ):
        assert part in text
    (copied_run / "metrics_test_beam5.json").unlink()
    pack_run(copied_run, tmp_path / "other.zip")
    assert "TO FILL IN: none were measured" in read_zip(tmp_path / "other.zip")["small/MODEL_CARD.md"].decode()


def test_pack_run_has_the_weights_of_another_cnn(copied_run, tmp_path, cache_dir):
    (copied_run / "cnn.weights.h5").write_bytes(b"stands for weights")
    config = read_json(copied_run / "config.json")
    config["features"] |= {"weights": "/mnt/mine.weights.h5", "sha256": file_sha256(copied_run / "cnn.weights.h5")}
    write_json(copied_run / "config.json", config)
    pack_run(copied_run, tmp_path / "small.zip")
    assert (open_run(tmp_path / "small.zip") / "cnn.weights.h5").read_bytes() == b"stands for weights"
    assert b"the author's, SHA-256 `" in read_zip(tmp_path / "small.zip")["small/MODEL_CARD.md"]


def test_pack_run_has_the_captions_of_the_training_only_if_asked(copied_run, tmp_path, cache_dir):
    with pytest.raises(InputError, match=r"consensus\.npz: no such file; make it with `python -m beyond\.consensus"):
        pack_run(copied_run, tmp_path / "small.zip", with_consensus=True)
    (copied_run / "consensus.npz").write_text("index")
    with pytest.raises(InputError, match="damaged, or not an index"):
        pack_run(copied_run, tmp_path / "with.zip", with_consensus=True)
    config, tokenizer = read_config(copied_run), Tokenizer(WORDS)
    examples, means = [Example("a.jpg", ("a dog",), 1, "train")], np.ones((1, 4), np.float32)
    Index.build(examples, means, tokenizer, {"data": "other"}).save(copied_run / "consensus.npz")
    with pytest.raises(InputError, match="made from other images or captions"):
        pack_run(copied_run, tmp_path / "with.zip", with_consensus=True)
    source = describe_source(config) | {"images": None}
    Index.build(examples, means, tokenizer, source).save(copied_run / "consensus.npz")
    metrics = read_json(copied_run / "metrics_test_beam5.json")
    metrics["baselines"] = {"constant": "a private caption", "constant_cider": 9.8}
    write_json(copied_run / "metrics_test_beam5.json", metrics)
    pack_run(copied_run, tmp_path / "with.zip", with_consensus=True)
    pack_run(copied_run, tmp_path / "without.zip")
    files, others = read_zip(tmp_path / "with.zip"), read_zip(tmp_path / "without.zip")
    assert files.keys() - others == {"small/consensus.npz"}
    assert b"`consensus.npz` holds the names" in files["small/MODEL_CARD.md"]
    assert b"their captions are not in the file" in others["small/MODEL_CARD.md"]
    packed = [zipped["small/metrics_test_beam5.json"] for zipped in (files, others)]
    assert [b"a private caption" in content for content in packed] == [True, False] and b"9.8" in packed[1]
    assert Index.load(open_run(tmp_path / "with.zip") / "consensus.npz").names == ["a.jpg"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "[]", "config.json"),
        ("cnn.h5", "", "weights of the CNN: config.json expects none, found"),
        ("metrics_val.json", '{"split": "val"}', "metrics_val.json: expected the scores that evaluate.py writes"),
    ],
)
def test_pack_run_refuses_a_broken_run(copied_run, tmp_path, file, content, message):
    (copied_run / file).write_text(content)
    with pytest.raises(InputError, match=message):
        pack_run(copied_run, tmp_path / "bad.zip")
    assert not (tmp_path / "bad.zip").exists()


def test_names_of_runs_and_paths(tmp_path):
    for name, expected in (("my run (2)", "my_run_2_"), ("猫", "猫"), (".hidden", "hidden"), ("---", "run")):
        assert run_name(tmp_path / name) == expected
    for path in ("", "..", "a/..", "/"):
        values = without_paths({"data": {"annotations": path}, "features": {"weights": "imagenet"}})
        assert values["data"]["annotations"] == "data" and values["features"]["weights"] == "imagenet"


# The command.


@pytest.mark.slow
def test_share_packs_and_unpacks(small_run, packed, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for arguments in ([str(small_run)], ["--run", str(small_run)]):
        share.main([*arguments, "--output", "out/again.zip"])
        assert capsys.readouterr().out == "out/again.zip\n"
    for _ in range(2):  # the second time it is there
        share.main(["out/again.zip"])
        assert capsys.readouterr().out == "runs/small\n"
    assert (tmp_path / "out/again.zip").read_bytes() == packed.read_bytes()
    assert read_config(tmp_path / "runs/small").data.annotations == "runs/small/captions.csv"
    share.main([])  # the latest run
    assert (tmp_path / "small.zip").read_bytes() == packed.read_bytes() and names_in(tmp_path / "runs") == ["small"]
    share.main(["small.zip", "--output", "elsewhere/run"])
    assert best_checkpoint(tmp_path / "elsewhere/run")


def test_share_refuses_in_one_line(small_run, packed, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    share.main(["small.zip"])
    (tmp_path / "runs/small/history.csv").write_text("of another training")
    (tmp_path / "page.zip").write_text("\n<!DOCTYPE html><p>log in")
    for arguments, message in (
        (["small.zip"], r"runs/small: expected a new folder, .*history\.csv differs"),
        (["small.zip", "--output", "small.zip"], "small.zip: expected a new folder"),
        ([str(small_run), "--output", "runs"], "--output runs: expected a file, found a folder"),
        ([str(small_run), "--output", "runs/small/history.csv"], "an earlier one of its kind, found something else"),
        (["page.zip"], r"page\.zip: a web page, expected a packed run"),
        (["none.zip"], r"none\.zip: no such file; expected a run folder, or a \.zip of one"),
        (["none"], "none: no such file; expected a run folder"),
    ):
        with pytest.raises(InputError, match=message):
            share.main(arguments)
    assert names_in(tmp_path / "runs") == ["small"]


# What --run takes.


@pytest.mark.slow
def test_open_run_restores_the_same_weights(small_run, packed, cache_dir):
    unpacked = open_run(packed)
    assert unpacked == cache_dir / file_sha256(packed) / "small"
    features = tf.constant(np.random.default_rng(0).uniform(size=(5, 64, 2048)), tf.float32)
    captions = []
    for run in (small_run, unpacked):
        restored, tokenizer, _ = inference.load_run(run)
        captions.append(inference.decode_captions(restored, tokenizer, features, inference.DecodeConfig(max_words=8)))
    for caption, expected in zip(*captions, strict=True):
        assert caption.text == expected.text and caption.probabilities == expected.probabilities


@pytest.mark.slow
def test_open_run_unpacks_once(packed, cache_dir, capsys):
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: open_run(packed), range(6)))
    folder = folders.pop()
    assert not folders and names_in(cache_dir / file_sha256(packed)) == ["small"]
    (folder / "captions_test.json").write_text("made later")
    capsys.readouterr()
    shutil.copy(packed, packed.with_name("renamed.zip"))
    assert open_run(packed.with_name("renamed.zip")) == folder and (folder / "captions_test.json").exists()
    assert capsys.readouterr().err == ""


def test_open_run_refuses_a_cache_that_cannot_be_written(packed, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(InputError, match="file/image-captioning: cannot be written; set XDG_CACHE_HOME to another"):
        open_run(packed)


def test_open_run_takes_a_pack_whose_author_filled_in_the_card(packed, cache_dir):
    members = read_zip(packed)
    members["small/MODEL_CARD.md"] += b"Licence: CC0\n"
    folders = {"small/": b"", "small/checkpoints/": b"", "small/checkpoints/best/": b""}  # as `zip -r` writes them
    write_zip(packed, {**folders, **members}, zipfile.ZIP_DEFLATED)
    assert (open_run(packed) / "MODEL_CARD.md").read_text().endswith("Licence: CC0\n")


# Damages. Each changes the files of a .zip, which are contents by name.


def add(name, content=b"x", mode=0):
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    return lambda members: {**members, info: content}


def drop(name):
    return lambda members: {key: content for key, content in members.items() if key != f"small/{name}"}


def put(name, content):
    return lambda members: {**members, f"small/{name}": content}


def set_field(section, name, value):
    def damage(members):
        config = json.loads(members["small/config.json"])
        return put("config.json", json.dumps({**config, section: {**config[section], name: value}}).encode())(members)

    return damage


DAMAGES = {
    "path out of the folder": (add("small/../evil.json"), "no file of a packed run"),
    "path of Windows": (add("small\\evil.json"), "no file of a packed run"),
    "no settings": (drop("config.json"), "expected one folder with"),
    "file twice": (add("small/config.json"), "expected one folder with"),
    "link": (add("small/cnn.h5", b"/etc/passwd", stat.S_IFLNK | 0o777), "expected a plain file, found a link"),
    "bomb": (put("history.csv", bytes(40_000_000)), "it would unpack to 4"),
    "settings are no JSON": (put("config.json", b"\xff\xfe"), "small/config.json: expected JSON"),
    "settings with a path": (set_field("data", "annotations", "/etc/passwd"), "found paths"),
    "settings with a huge size": (set_field("model", "embedding_dim", 10**12), "no weights of size 1000000000000"),
    "CNN that is not in the settings": (add("small/cnn.h5"), "expects none, found small/cnn.h5"),
    "weights of another CNN": (
        lambda m: set_field("features", "sha256", "00")(add("small/cnn.h5")(m)),
        "not the weights of the CNN that computed the features",
    ),
    "another vocabulary": (put("vocabulary.json", json.dumps([*WORDS[:5], "cat"]).encode()), "not the vocabulary"),
    "another checkpoint is named": (
        put("checkpoints/best/checkpoint", b'model_checkpoint_path: "/home/me/ckpt-1"'),
        "expected the name ckpt-1",
    ),
    "weights are cut": (put("checkpoints/best/ckpt-1.data-00000-of-00001", b"cut"), "best.ckpt-1 is damaged"),
}


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("name", DAMAGES)
def test_open_run_refuses_a_changed_pack(packed, cache_dir, name):
    damage, message = DAMAGES[name]
    write_zip(packed, damage(read_zip(packed)), zipfile.ZIP_DEFLATED)
    with pytest.raises(InputError, match=message) as error:
        open_run(packed)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith(f"{packed}: damaged, or not a run")
    assert str(cache_dir) not in str(error.value), "nobody knows that folder"
    assert not list(cache_dir.glob("*/*")) and not list(packed.parent.glob("**/evil*"))


def test_open_run_refuses_damaged_bytes(packed, cache_dir):
    content = packed.read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :]
    write_zip(packed, read_zip(packed), zipfile.ZIP_LZMA)
    damaged = [b"", b"PK", content[:-500], content[1000:], content[:5000], flipped, packed.read_bytes()]
    for damage in damaged:
        packed.write_bytes(damage)
        with pytest.raises(InputError, match=r"small\.zip: damaged") as error:
            open_run(packed)
        assert len(str(error.value).splitlines()) == 1 and not list(cache_dir.glob("*/*"))


# Addresses.


@pytest.fixture
def server(packed, monkeypatch):
    """Serves the folder of the pack at 127.0.0.1, and notes the paths that it is asked for."""
    monkeypatch.setattr(downloads, "INITIAL_BACKOFF_S", 0.0)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            httpd.paths.append(self.path)

    handler = functools.partial(Handler, directory=packed.parent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        httpd.paths, httpd.url = [], f"http://127.0.0.1:{httpd.server_port}/small.zip?key=hush"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_open_run_downloads_once(server, packed, cache_dir, capsys):
    unpacked = open_run(server.url)
    assert unpacked == open_run(packed) and "copy" not in capsys.readouterr().err
    assert open_run(server.url) == unpacked and server.paths == ["/small.zip?key=hush"]
    printed = capsys.readouterr().err
    assert "/small.zip: its copy in" in printed and "hush" not in printed


def test_open_run_checks_the_sha256_of_an_address(server, packed, cache_dir):
    digest = file_sha256(packed)
    with pytest.raises(InputError, match=rf"small\.zip: expected .* SHA-256 is {'0' * 64}, found {digest}") as error:
        open_run(f"{server.url}#sha256={'0' * 64}")
    assert "hush" not in str(error.value)
    assert open_run(f"{server.url}#sha256={digest.upper()}") == open_run(packed)
    assert set(server.paths) == {"/small.zip?key=hush"}, "without what follows #"


def test_open_run_forgets_what_is_no_packed_run(server, packed, cache_dir):
    content = packed.read_bytes()
    packed.write_bytes(b"not found")
    with pytest.raises(InputError, match=r"^http://127\.0\.0\.1:\d+/small\.zip: damaged, or not a run"):
        open_run(server.url)
    packed.write_bytes(content)
    assert open_run(server.url) == open_run(packed)


@pytest.mark.parametrize(
    "address",
    [
        *("http://example.com/a.zip?hush", "ftp://example.com/a.zip", "file:///etc/passwd", "https://", "://"),
        *("http://127.0.0.1.example.com/a.zip", "http://10.0.0.1/a.zip", "http://localhost:80@example.com/a.zip"),
        *("https://[::1", "https://me:hush@host/a.zip", "https://host/a.zip#hush", "https://host/a#sha256=12"),
    ],
)
def test_open_run_refuses_other_addresses(address, cache_dir, monkeypatch):
    monkeypatch.setattr(packed_run, "download", functools.partial(pytest.fail, "it was asked"))
    with pytest.raises(InputError, match=r"--run: expected a folder, a \.zip, or an address that .* https") as error:
        open_run(address)
    assert "hush" not in str(error.value)
