"""Packing a run, and unpacking it: the same captions, and one line for whatever is no packed run."""

import functools
import hashlib
import http.server
import json
import re
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from helpers.fixtures import MANIFEST
from pack_damages import DAMAGES, edit_weights, read_members, write_members

import inference
from beyond.share import packed_run
from beyond.share.model_weights import read_checkpoint, read_weights, write_checkpoint, write_weights
from beyond.share.packed_run import open_run, without_paths
from beyond.share.run_packer import EPOCH, pack_run, run_name
from captioning.base import downloads
from captioning.base.cli import InputError
from captioning.base.files import file_sha256, read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.run_config import RunConfig
from captioning.config.settings import DataConfig, ModelConfig, TrainConfig
from captioning.runs.run_folder import best_checkpoint, read_config, write_config

MODEL = ModelConfig(vocab_size=6, embedding_dim=40, units=50)
RNG = np.random.default_rng(0)
WEIGHTS = {
    "decoder/W": RNG.normal(size=(40, 50)).astype(np.float32),
    "encoder/fc/_kernel": RNG.normal(size=(6, 40)).astype(np.float32),
}
SCORES = {"run": "/home/me/runs/small", "split": "test", "images": 4, "tokenizer": "PTB", "scores": {"BLEU-4": 12.3}}


@pytest.fixture
def cache_dir(tmp_path, monkeypatch):
    """The folder of unpacked runs."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    return tmp_path / "xdg/image-captioning"


@pytest.fixture
def trained(run, tmp_path, cache_dir):
    """A run that captions, and what it was packed into, as float32."""
    return run, pack_run(run, tmp_path / "trained.zip", "float32")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory):
    """The folder of a run whose model has two weights, with scores and a history; no test changes it."""
    run = tmp_path_factory.mktemp("runs") / "small"
    run.mkdir()
    write_json(run / "vocabulary.json", ["<pad>", "<unk>", "<start>", "<end>", "a", "dog"])
    write_json(run / "metrics_test.json", SCORES)
    (run / "history.csv").write_text("epoch,val_loss\n1,2.5\n")
    sha256 = file_sha256(run / "vocabulary.json")
    features = {**MANIFEST, "folder": "features"}
    config = RunConfig(MODEL, TrainConfig(), DataConfig(), features, (), "0123", sha256)
    write_config(run, config)
    write_checkpoint(run / "checkpoints/best", WEIGHTS)
    return run


@pytest.fixture
def copied_run(small_run, tmp_path):
    """A copy of it, to be changed."""
    return shutil.copytree(small_run, tmp_path / "runs/small")


@pytest.fixture(scope="module")
def packed_content(small_run, tmp_path_factory):
    return pack_run(small_run, tmp_path_factory.mktemp("packed") / "small.zip", "float32").read_bytes()


@pytest.fixture
def packed(packed_content, tmp_path, cache_dir):
    """The small run, packed as float32."""
    (tmp_path / "small.zip").write_bytes(packed_content)
    return tmp_path / "small.zip"


def left_behind(cache_dir):
    """Returns what is in the cache besides its lock."""
    return [path.name for path in cache_dir.glob("*") if path.name != ".lock"] if cache_dir.exists() else []


def caption_texts(run, rng_seed=0):
    """Returns captions of random features, and the probabilities of their words."""
    model, tokenizer, _ = inference.load_run(run)
    features = tf.constant(np.random.default_rng(rng_seed).uniform(size=(5, 64, 2048)), tf.float32)
    captions = inference.decode_captions(model, tokenizer, features, inference.DecodeConfig(max_words=8))
    return [caption.text for caption in captions], np.concatenate([caption.probabilities for caption in captions])


# What --run takes.


def test_open_run_leaves_folders_and_finds_the_latest(run, monkeypatch, tmp_path):
    assert open_run(run) == open_run(str(run)) == run
    assert open_run(tmp_path / "none") == tmp_path / "none", "what is wrong with a folder is said when it is read"
    monkeypatch.chdir(tmp_path)
    assert open_run("") == Path(), "not the latest: a variable of the shell may be empty"
    assert open_run(None) == run.relative_to(tmp_path)
    (tmp_path / "folder.zip").mkdir()
    assert open_run("folder.zip").name == "folder.zip"


def test_open_run_names_a_zip_that_does_not_exist(tmp_path, cache_dir):
    with pytest.raises(InputError, match=r"none\.zip: no such file; expected a run folder, or a \.zip of one"):
        open_run(tmp_path / "none.zip")
    (tmp_path / "photo.jpg").write_bytes(b"no run")
    with pytest.raises(InputError, match=r"photo\.jpg: damaged, or not a run that .*--pack"):
        open_run(tmp_path / "photo.jpg")


# Round trips.


@pytest.mark.slow
def test_packed_float32_weights_and_captions_are_the_same(trained, cache_dir, capsys):
    run, packed = trained
    unpacked = open_run(packed)
    assert unpacked == cache_dir / file_sha256(packed) / "small"
    assert f"is unpacked into {unpacked}/" in capsys.readouterr().err
    original, copy = (read_checkpoint(best_checkpoint(folder)) for folder in (run, unpacked))
    assert original.keys() == copy.keys() and len(copy) == 16
    assert all(np.array_equal(original[name], copy[name]) for name in original)
    (texts, probabilities), (expected, expected_probabilities) = caption_texts(unpacked), caption_texts(run)
    assert texts == expected
    np.testing.assert_array_equal(probabilities, expected_probabilities)


@pytest.mark.slow
def test_packed_float16_weights_are_rounded_and_half_as_large(trained, tmp_path):
    run, packed = trained
    half = pack_run(run, tmp_path / "half.zip")
    sizes = [len(read_members(path)["small/weights.npz"]) for path in (half, packed)]
    assert sizes[0] < 0.6 * sizes[1]
    unpacked = open_run(half)
    original, copy = (read_checkpoint(best_checkpoint(folder)) for folder in (run, unpacked))
    for name, array in original.items():
        np.testing.assert_array_equal(copy[name], array.astype(np.float16).astype(np.float32))
    np.testing.assert_allclose(caption_texts(unpacked)[1], caption_texts(run)[1], atol=2e-3)


def test_pack_run_gives_the_same_bytes_also_when_it_was_unpacked(small_run, packed, tmp_path):
    again = pack_run(small_run, tmp_path / "again.zip", "float32")
    assert again.read_bytes() == packed.read_bytes()
    with zipfile.ZipFile(packed) as archive:
        assert {(m.date_time, m.create_system, m.compress_type) for m in archive.infolist()} == {(EPOCH, 3, 0)}
    unpacked = open_run(packed)
    assert sorted(path.name for path in unpacked.iterdir()) == [
        *("MODEL_CARD.md", "checkpoints", "config.json", "history.csv", "metrics_test.json", "vocabulary.json")
    ]
    of_unpacked = pack_run(unpacked, tmp_path / "third.zip", "float32")
    assert of_unpacked.read_bytes() == packed.read_bytes()


def test_pack_run_tells_nothing_of_the_machine(copied_run, tmp_path, cache_dir):
    config = read_json(copied_run / "config.json")
    config["data"] |= {
        "annotations": "/home/me/secret/captions.csv",
        "images": "C:\\Users\\me\\photos",
        "data_dir": "x",
    }
    config["features"]["folder"] = "/home/me/features"
    write_json(copied_run / "config.json", config)
    write_json(copied_run / "metrics_val_beam5.json", SCORES)
    members = read_members(pack_run(copied_run, tmp_path / "small.zip"))
    for name, content in members.items():
        assert not re.search(b"/home|Users|secret|" + str(tmp_path).encode(), content), name
    packed_config = json.loads(members["small/config.json"])
    assert packed_config["data"]["annotations"] == "captions.csv" and packed_config["data"]["images"] == "photos"
    assert packed_config["data"]["data_dir"] is None and packed_config["features"]["folder"] == "features"
    assert json.loads(members["small/metrics_val_beam5.json"])["run"] == "small"
    assert read_config(open_run(tmp_path / "small.zip")).data.annotations.endswith("small/captions.csv")


@pytest.mark.parametrize("path", ["", ".", "..", "a/..", "/"])
def test_without_paths_leaves_a_name(path):
    values = without_paths({"data": {"annotations": path}, "features": {"folder": path, "weights": "imagenet"}})
    assert values["data"]["annotations"] == values["features"]["folder"] == "data"
    assert values["features"]["weights"] == "imagenet" and without_paths(values) == values


def test_pack_run_has_the_weights_of_another_cnn(copied_run, tmp_path, cache_dir):
    (copied_run / "cnn.weights.h5").write_bytes(b"stands for weights")
    config = read_json(copied_run / "config.json")
    config["features"] |= {"weights": "/mnt/mine.weights.h5", "sha256": file_sha256(copied_run / "cnn.weights.h5")}
    write_json(copied_run / "config.json", config)
    unpacked = open_run(pack_run(copied_run, tmp_path / "small.zip"))
    assert (unpacked / "cnn.weights.h5").read_bytes() == b"stands for weights"
    (copied_run / "cnn.weights.h5").write_bytes(b"others")
    with pytest.raises(InputError, match="not the weights of the CNN that computed the features"):
        pack_run(copied_run, tmp_path / "other.zip")
    (copied_run / "cnn.weights.h5").unlink()
    with pytest.raises(InputError, match=r"the weights of its CNN, .* are missing"):
        pack_run(copied_run, tmp_path / "other.zip")
    assert not (tmp_path / "other.zip").exists()


def test_pack_run_refuses_what_does_not_belong_together(copied_run, tmp_path, cache_dir):
    (copied_run / "metrics_val.json").write_text("{}")
    with pytest.raises(InputError, match=r"metrics_val\.json: expected the scores that evaluate\.py writes"):
        pack_run(copied_run, tmp_path / "small.zip")
    (copied_run / "metrics_val.json").unlink()
    (copied_run / "metrics_we ird.json").write_text(json.dumps(SCORES))  # a name that is not evaluate.py's is left out
    assert "small/metrics_we ird.json" not in read_members(pack_run(copied_run, tmp_path / "small.zip"))
    (copied_run / "vocabulary.json").write_text("[]")
    with pytest.raises(InputError, match=r"vocabulary\.json: not the vocabulary these weights were trained with"):
        pack_run(copied_run, tmp_path / "small.zip")


@pytest.mark.parametrize(
    ("value", "dtype", "message"),
    [
        (1e6, "float16", r"a weight of 1e\+06 is too large for float16"),
        (np.nan, "float32", "decoder/W: expected finite"),
    ],
)
def test_pack_run_refuses_weights_that_cannot_be_stored(copied_run, tmp_path, value, dtype, message):
    shutil.rmtree(copied_run / "checkpoints")
    write_checkpoint(copied_run / "checkpoints/best", {"decoder/W": np.full((4, 5), value, np.float32)})
    with pytest.raises(InputError, match=message):
        pack_run(copied_run, tmp_path / "bad.zip", dtype)
    assert not (tmp_path / "bad.zip").exists()


@pytest.mark.parametrize(
    ("name", "expected"),
    [("my run (2)", "my_run_2_"), ("猫", "猫"), (".hidden", "hidden"), ("---", "run"), ("a" * 99, "a" * 80)],
)
def test_run_name_is_one_of_a_file(tmp_path, name, expected):
    assert run_name(tmp_path / name) == expected


# The cache.


def test_unpack_run_is_done_once(packed, cache_dir, capsys):
    first = open_run(packed)
    (first / "captions_test.json").write_text("made later")
    capsys.readouterr()
    copy = packed.with_name("renamed.zip")
    shutil.copy(packed, copy)
    assert open_run(copy) == first and (first / "captions_test.json").exists()
    assert capsys.readouterr().err == ""


def test_unpack_run_cleans_up_after_a_kill(packed, cache_dir):
    digest = file_sha256(packed)
    for leftover in (f"{digest}.part/small/checkpoints", f"{digest}/small"):  # the second: a user deleted files
        (cache_dir / leftover).mkdir(parents=True)
        (cache_dir / leftover / "half").touch()
    unpacked = open_run(packed)
    assert not (unpacked / "half").exists() and left_behind(cache_dir) == [digest]
    assert best_checkpoint(unpacked)


def test_unpack_run_by_many_at_once(packed, cache_dir):
    with ThreadPoolExecutor(6) as pool:
        folders = set(pool.map(lambda _: open_run(packed), range(6)))
    assert len(folders) == 1 and len(left_behind(cache_dir)) == 1


def test_unpack_run_takes_a_temporary_folder_if_the_cache_cannot_be_written(packed, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    registered = []
    monkeypatch.setattr(packed_run.atexit, "register", lambda *args, **kwargs: registered.append((args, kwargs)))
    unpacked = open_run(packed)
    assert best_checkpoint(unpacked)
    assert "packed runs cannot be kept" in capsys.readouterr().err
    (remove, folder), options = registered[0]
    assert folder in unpacked.parents
    remove(folder, **options)
    assert not unpacked.exists()


def test_unpack_run_on_a_full_disk_is_an_oserror(packed, cache_dir, monkeypatch):
    monkeypatch.setattr(packed_run.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))
    with pytest.raises(OSError, match="No space left"):
        open_run(packed)
    assert left_behind(cache_dir) == []


# Damages.


@pytest.mark.parametrize("name", DAMAGES)
def test_unpack_run_refuses_a_changed_pack(packed, cache_dir, name):
    damage, message = DAMAGES[name]
    write_members(packed, damage(read_members(packed)))
    with pytest.raises(InputError, match=message) as error:
        open_run(packed)
    assert len(str(error.value).splitlines()) == 1 and str(error.value).startswith(f"{packed}: damaged, or not a run")
    assert str(cache_dir) not in str(error.value), "nobody knows that folder"
    assert left_behind(cache_dir) == [] and not (packed.parent / "evil.json").exists()


def test_unpack_run_refuses_damaged_bytes(packed, cache_dir):
    content, rng = packed.read_bytes(), np.random.default_rng(0)
    damaged = [b"", b"PK", b"PK\x05\x06" + bytes(18), bytes(1000), content[:-500], content[1000:], content[:5000]]
    for position in rng.integers(0, len(content) - 3000, 30).tolist():  # in the files, which have a CRC
        damaged.append(content[:position] + bytes([content[position] ^ 16]) + content[position + 1 :])
    num_refused = 0
    for damage in damaged:
        packed.write_bytes(damage)
        try:
            shutil.rmtree(open_run(packed).parent)  # such as a bit of a name that nobody reads
        except InputError as error:
            num_refused += 1
            assert len(str(error).splitlines()) == 1
        assert left_behind(cache_dir) == []
    assert num_refused >= len(damaged) - 1


def test_unpack_run_refuses_bombs(packed, cache_dir, monkeypatch):
    members = read_members(packed)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in {**members, "small/history.csv": bytes(40_000_000)}.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="bytes that would unpack to 4"):
        open_run(packed)
    monkeypatch.setattr(packed_run, "MAX_COMPRESSION_RATIO", 10**6)
    monkeypatch.setattr(packed_run, "MAX_BYTES", dict.fromkeys(packed_run.MAX_BYTES, 10_000_000))
    with pytest.raises(InputError, match="40,000,000 bytes, expected at most 10,000,000"):
        open_run(packed)
    write_members(packed, {**members, **{f"small/metrics_{i}.json": "{}" for i in range(1000)}})
    with pytest.raises(InputError, match="expected at most 1,000 files"):
        open_run(packed)
    assert left_behind(cache_dir) == []


def test_unpack_run_refuses_files_twice(packed, cache_dir):
    with pytest.warns(UserWarning, match="Duplicate name"), zipfile.ZipFile(packed, "a") as archive:
        archive.writestr("small/config.json", "{}")
    with pytest.raises(InputError, match="expected a folder with"):
        open_run(packed)


def test_unpack_run_refuses_other_compression(packed, cache_dir):
    members = read_members(packed)
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_LZMA) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    with pytest.raises(InputError, match="expected no compression or deflate"):
        open_run(packed)


def test_unpack_run_refuses_encrypted_files(packed, cache_dir):
    content = packed.read_bytes()
    for start, length in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):  # the flags of every file
        parts = content.split(start)
        content = start.join([parts[0], *(part[: length - 4] + b"\x01" + part[length - 3 :] for part in parts[1:])])
    packed.write_bytes(content)
    with pytest.raises(InputError, match="encrypted"):
        open_run(packed)


def test_unpack_run_takes_a_pack_whose_author_filled_in_the_card(packed, cache_dir):
    members = read_members(packed)
    members["small/MODEL_CARD.md"] += b"Licence: CC0\n"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:  # as `zip -r` writes it
        archive.writestr("small/", b"")
        for name, content in members.items():
            archive.writestr(name, content)
    unpacked = open_run(packed)
    assert (unpacked / "MODEL_CARD.md").read_text().endswith("Licence: CC0\n")
    assert best_checkpoint(unpacked)


def test_load_run_refuses_weights_of_other_shapes(trained, cache_dir):
    _, packed = trained

    def transpose(weights):
        return {name: np.ascontiguousarray(array.T) for name, array in weights.items()}

    write_members(packed, edit_weights(transpose)(read_members(packed)))
    with pytest.raises(InputError, match=r"damaged, or not the weights of this config\.json") as error:
        inference.load_run(open_run(packed))
    assert len(str(error.value).splitlines()) == 1


# Weights.


def test_read_weights_returns_what_write_weights_wrote(tmp_path):
    weights = {"a/b": np.arange(6, dtype=np.float32).reshape(2, 3), "a/c": np.float32(2.5).reshape(())}
    for dtype in ("float16", "float32"):
        with open(tmp_path / "w.npz", "wb") as file:
            write_weights(file, weights, dtype)
        read = read_weights(tmp_path / "w.npz")
        assert read.keys() == weights.keys() and all(array.dtype == np.float32 for array in read.values())
        assert all(np.array_equal(read[name], weights[name]) for name in weights)
        assert {array.dtype.name for array in np.load(tmp_path / "w.npz").values()} == {dtype}


# Addresses.


@pytest.fixture
def server(packed, monkeypatch):
    """Serves the pack at 127.0.0.1; `answers` cut it or replace it, the last one for good."""
    monkeypatch.setattr(downloads, "INITIAL_BACKOFF_S", 0.0)
    content = packed.read_bytes()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            httpd.requests.append((self.path, self.headers.get("Range")))
            cut, body = httpd.answers.pop(0) if len(httpd.answers) > 1 else httpd.answers[0]
            start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body) - start))
            self.end_headers()
            self.wfile.write(body[start:cut])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        httpd.requests, httpd.answers, httpd.content = [], [(None, content)], content
        httpd.url = f"http://127.0.0.1:{httpd.server_port}/models/small.zip?key=hush"
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        yield httpd
        httpd.shutdown()


def test_open_run_downloads_once_and_resumes(server, packed, cache_dir, capsys):
    server.answers[:] = [(5_000, server.content), (9_000, server.content), (None, server.content)]
    unpacked = open_run(server.url)
    assert unpacked == open_run(packed) and [part for _, part in server.requests] == [
        None,
        "bytes=5000-",
        "bytes=9000-",
    ]
    assert "copy" not in capsys.readouterr().err
    assert open_run(server.url) == unpacked and len(server.requests) == 3
    printed = capsys.readouterr().err
    assert "/models/small.zip: its copy in" in printed and "hush" not in printed
    open_run(server.url.replace("small.zip?key=hush", "a%20b ü.zip"))
    assert server.requests[3:] == [("/models/a%20b%20%C3%BC.zip", None)], "another address"


def test_open_run_checks_the_sha256_of_an_address(server, cache_dir):
    digest = hashlib.sha256(server.content).hexdigest()
    with pytest.raises(InputError, match=f"expected a file whose SHA-256 is {'0' * 64}, found {digest}"):
        open_run(f"{server.url}#sha256={'0' * 64}")
    assert left_behind(cache_dir / "downloads") == []
    unpacked = open_run(f"{server.url}#sha256={digest.upper()}")
    assert unpacked.parent.name == digest
    with pytest.raises(InputError, match="expected #sha256= and 64 hexadecimal digits"):
        open_run(f"{server.url}#md5=00")
    # The address has another file now: the old copy does not count.
    server.answers[:] = [(None, b"another file")]
    with pytest.raises(InputError, match="damaged, or not a run"):
        open_run(f"{server.url}#sha256={hashlib.sha256(b'another file').hexdigest()}")
    assert {path for path, _ in server.requests} == {"/models/small.zip?key=hush"}, "without what follows #"


def test_open_run_forgets_what_is_no_packed_run(server, cache_dir):
    server.answers[:] = [(None, b"<html>not found</html>")]
    with pytest.raises(InputError, match=r"http://127\.0\.0\.1:\d+/models/small\.zip: damaged, or not a run"):
        open_run(server.url)
    assert left_behind(cache_dir / "downloads") == []
    server.answers[:] = [(None, server.content)]
    assert open_run(server.url).name == "small"


def test_open_run_limits_downloads(server, cache_dir, monkeypatch):
    monkeypatch.setattr(packed_run, "MAX_ZIP_BYTES", 1000)
    with pytest.raises(InputError, match="expected at most 1,000 bytes") as error:
        open_run(server.url)
    assert "hush" not in str(error.value)


@pytest.mark.parametrize(
    "address",
    [
        *(
            "http://example.com/a.zip",
            "ftp://example.com/a.zip",
            "file:///etc/passwd",
            "https://",
            "://",
            "https://[::1",
        ),
        *("https://host:port/a.zip", "http://127.0.0.1.example.com/a.zip", "http://10.0.0.1/a.zip", "https://ü.de/a"),
    ],
)
def test_open_run_refuses_other_addresses(address, cache_dir, monkeypatch):
    monkeypatch.setattr(packed_run, "download", functools.partial(pytest.fail, "it was asked"))
    with pytest.raises(InputError, match=r"--run .*: expected a folder, a \.zip or an address that begins with https"):
        open_run(address)
    assert left_behind(cache_dir) == []


def test_open_run_hides_passwords_of_addresses(cache_dir):
    with pytest.raises(InputError, match="without a name and a password") as error:
        open_run("https://me:hush@127.0.0.1:1/a.zip?hush")
    assert "hush" not in str(error.value)
