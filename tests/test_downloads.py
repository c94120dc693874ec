"""Downloads against a server on this machine."""

import errno
import functools
import hashlib
import http.server
import io
import json
import shutil
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from PIL import Image

import data_utils
import downloads
from common import InputError
from downloads import download, unpack


@pytest.fixture
def server(tmp_path):
    """A folder served over HTTP: (folder, address, paths asked for)."""
    folder, asked = tmp_path / "served", []
    folder.mkdir()

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            asked.append(self.path)

    handler = functools.partial(Handler, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def jpeg(colour):
    file = io.BytesIO()
    Image.new("RGB", (20, 20), colour).save(file, "JPEG")
    return file.getvalue()


def test_download_and_skip_what_is_there(server, tmp_path):
    folder, address, asked = server
    (folder / "a.bin").write_bytes(b"12345")
    target = tmp_path / "out/a.bin"
    md5 = hashlib.md5(b"12345").hexdigest()
    for _ in range(2):
        assert download(f"{address}/a.bin", target, 5, md5).read_bytes() == b"12345"
    assert asked == ["/a.bin"], "the second time must not ask the server"


@pytest.mark.parametrize(("size", "md5"), [(6, None), (5, "0" * 32)])
def test_wrong_size_or_md5_leaves_nothing(server, tmp_path, size, md5):
    folder, address, _ = server
    (folder / "a.bin").write_bytes(b"12345")
    with pytest.raises(InputError, match=r"a\.bin.* expected|a\.bin.*\(expected"):
        download(f"{address}/a.bin", tmp_path / "out/a.bin", size, md5)
    assert list((tmp_path / "out").iterdir()) == []


def test_impossible_download_says_what_to_do(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    _, address, _ = server
    for url in (f"{address}/none.zip", "http://127.0.0.1:1/none.zip"):
        with pytest.raises(InputError) as error:
            download(url, tmp_path / "out/none.zip")
        assert url in str(error.value) and "none.zip" in str(error.value) and str(tmp_path / "out") in str(error.value)


CONTENT = bytes(range(256)) * 400  # 102,400 bytes


@pytest.fixture
def rude(monkeypatch):
    """A server that does what `rude.answers` says, one for each request; (address, answers, requests' ranges)."""
    monkeypatch.setattr(downloads, "PAUSE", 0.0)
    answers, ranges = [], []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            ranges.append(self.headers.get("Range"))
            start = int(ranges[-1][6:-1]) if ranges[-1] and answer.get("resumes", True) else 0
            code = answer.get("code", 206 if start else 200)
            self.send_response(code)
            if "to" in answer:
                self.send_header("Location", answer["to"])
            rest = CONTENT[start:] if code < 300 else b""
            if answer.get("length", True):
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: answer.get("cut")])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}/a.bin", answers, ranges
        httpd.shutdown()


MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = {"cut": 30_000}


@pytest.mark.parametrize("size", [None, len(CONTENT)])
def test_a_cut_download_goes_on_where_it_was(rude, tmp_path, size):
    url, answers, ranges = rude
    answers[:] = [CUT, CUT, {"code": 503}, {}]
    assert download(url, tmp_path / "a.bin", size, MD5).read_bytes() == CONTENT
    assert ranges == [None, "bytes=30000-", "bytes=60000-", "bytes=60000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_given_up_download_goes_on_in_the_next_run(rude, tmp_path):
    url, answers, ranges = rude
    answers[:] = [CUT, {"code": 500}]
    with pytest.raises(InputError, match=r"500 .*; 30,000 bytes are kept; run the same command again"):
        download(url, tmp_path / "a.bin", len(CONTENT), MD5)
    assert len(ranges) == downloads.TRIES
    answers[:] = [{}]
    assert download(url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT
    assert ranges[-1] == "bytes=30000-"


def test_a_server_that_cannot_resume_starts_over(rude, tmp_path):
    url, answers, _ = rude
    answers[:] = [CUT, {"resumes": False}]
    assert download(url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


def test_a_part_longer_than_the_file_starts_over(rude, tmp_path):
    url, answers, _ = rude
    answers[:] = [{"code": 416}, {}]
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert download(url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


def test_a_spoilt_part_is_seen_and_removed(rude, tmp_path):
    url, answers, _ = rude
    answers[:] = [{}]
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="expected MD5"):
        download(url, tmp_path / "a.bin", len(CONTENT), MD5)
    assert list(tmp_path.iterdir()) == []
    assert download(url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"code": 404}, "404"),
        ({"code": 302, "to": "ftp://127.0.0.1/a.bin"}, "http"),
        ({"code": 302, "to": "file:///etc/passwd"}, "http"),
        ({}, "expected at most 50,000 bytes, the server announces 102,400"),
        ({"length": False}, "expected at most 50,000 bytes, received more"),
    ],
)
def test_an_answer_that_stays_bad_is_asked_for_once(rude, tmp_path, answer, message):
    url, answers, ranges = rude
    answers[:] = [answer]
    with pytest.raises(InputError, match=message):
        download(url, tmp_path / "a.bin", limit=50_000)
    assert len(ranges) == 1 and not (tmp_path / "a.bin").exists()


def test_redirects_to_http_are_followed(rude, tmp_path):
    url, answers, _ = rude
    answers[:] = [{"code": 302, "to": "/b.bin"}, {}]
    assert download(url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("address", ["http://me:hush@127.0.0.1:1/a.jpg", "http://127.0.0.1:1/a.jpg?token=hush#hush"])
def test_no_secret_of_an_address_is_said(address, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(downloads, "PAUSE", 0)
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/a.jpg") as error:
        download(address, tmp_path / "a.jpg")
    assert "hush" not in str(error.value) + "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "/etc/passwd"])
def test_only_http(tmp_path, url):
    with pytest.raises(InputError, match="begins with http"):
        download(url, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_two_at_once_do_not_spoil_each_other(rude, tmp_path):
    url, answers, ranges = rude
    answers[:] = [CUT, {}]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: download(url, tmp_path / "a.bin", None, MD5), range(8)))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(ranges) == 2, "only one of them asks the server"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_a_full_disk_keeps_what_was_received(rude, tmp_path, monkeypatch):
    url, answers, _ = rude
    answers[:] = [CUT, {}]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads.time, "sleep", full)  # after the first piece
        with pytest.raises(OSError, match="No space left"):
            download(url, tmp_path / "a.bin", None, MD5)
    assert (tmp_path / "a.bin.part").stat().st_size == 30_000
    assert download(url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


def test_a_decompression_bomb_and_a_link_are_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jpg", bytes(10_000_000))
    with pytest.raises(InputError, match="would unpack to 10,000,000"):
        unpack(tmp_path / "bomb.zip", tmp_path / "out", (".jpg",))
    with zipfile.ZipFile(tmp_path / "link.zip", "w") as archive:
        link = zipfile.ZipInfo("a.jpg")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    with pytest.raises(InputError, match="outside"):
        unpack(tmp_path / "link.zip", tmp_path / "out", (".jpg",))
    assert not (tmp_path / "out").exists()


def test_archive_cannot_write_outside_its_folder(tmp_path):
    for name in ("../evil.jpg", "/tmp/evil_of_the_test.jpg", "a/../../evil.jpg"):
        with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
            archive.writestr(name, "x")
        with pytest.raises(InputError, match="outside"):
            unpack(tmp_path / "bad.zip", tmp_path / "out", (".jpg",))
    assert not (tmp_path / "evil.jpg").exists()


def test_damaged_archive(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="damaged"):
        unpack(tmp_path / "bad.zip", tmp_path / "out", (".jpg",))


def serve_coco(folder, address, monkeypatch, count=12):
    """A small COCO: its annotations in a zip, its pictures as single files."""
    images = [{"id": i, "file_name": f"COCO_train2014_{i:012}.jpg"} for i in range(count)]
    annotations = [
        {"image_id": i, "id": 10 * i + n, "caption": f"a dog number {n}"} for i in range(count) for n in range(5)
    ]
    with zipfile.ZipFile(folder / "annotations.zip", "w") as archive:
        archive.writestr(
            "annotations/captions_train2014.json", json.dumps({"images": images, "annotations": annotations})
        )
        archive.writestr("annotations/instances_train2014.json", "{}")
    (folder / "train2014").mkdir()
    for image in images:
        (folder / "train2014" / image["file_name"]).write_bytes(jpeg("red"))
    size = (folder / "annotations.zip").stat().st_size
    md5 = hashlib.md5((folder / "annotations.zip").read_bytes()).hexdigest()
    entry = (f"{address}/annotations.zip", size, md5)
    monkeypatch.setitem(data_utils.ARCHIVES, "annotations_trainval2014.zip", entry)
    monkeypatch.setattr(data_utils, "COCO", address)


def test_coco_subset_fetches_only_its_pictures(server, tmp_path, monkeypatch):
    folder, address, asked = server
    serve_coco(folder, address, monkeypatch)
    options = data_utils.DataOptions(data_dir=str(tmp_path / "data"), num_captions=25)
    dataset = data_utils.load_dataset(options)
    assert len(dataset.examples) == 5
    assert all((dataset.images / e.image).stat().st_size for e in dataset.examples)
    assert len(asked) == 1 + 5, "one archive and five pictures"
    assert not (tmp_path / "data/coco/annotations_trainval2014.zip").exists(), "the archive's space is freed"
    assert data_utils.load_dataset(options) == dataset
    assert len(asked) == 6, "a second run downloads nothing"


def test_what_is_downloaded_is_said_before_and_must_fit(server, tmp_path, monkeypatch, capsys):
    folder, address, asked = server
    serve_coco(folder, address, monkeypatch)
    options = data_utils.DataOptions(data_dir=str(tmp_path / "data"), num_captions=25)
    monkeypatch.setattr(data_utils, "COCO_PICTURE", 1e9)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=4.5e9))
    with pytest.raises(InputError, match=r"needs 5.0 GB in .*coco, found 4.5 GB free; use a smaller --num-captions"):
        data_utils.load_dataset(options)
    assert asked == ["/annotations.zip"]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=5.5e9))
    data_utils.load_dataset(options)
    said = capsys.readouterr().err
    assert "downloading annotations_trainval2014.zip, 1 MB, into" in said
    assert "0 of 5 pictures are in" in said and "downloading 5 one by one (about 5.0 GB)" in said


def test_coco_archive_put_there_by_hand_is_used(server, tmp_path, monkeypatch):
    folder, address, asked = server
    serve_coco(folder, address, monkeypatch)
    by_hand = tmp_path / "data/coco/annotations_trainval2014.zip"
    by_hand.parent.mkdir(parents=True)
    (folder / "annotations.zip").rename(by_hand)
    data_utils.load_dataset(data_utils.DataOptions(data_dir=str(tmp_path / "data"), num_captions=5))
    assert "/annotations.zip" not in asked
    assert by_hand.exists(), "what the user put there is the user's"


def test_whole_coco_comes_as_the_archive(server, tmp_path, monkeypatch):
    folder, address, asked = server
    serve_coco(folder, address, monkeypatch)
    with zipfile.ZipFile(folder / "train2014.zip", "w") as archive:
        for path in (folder / "train2014").iterdir():
            archive.write(path, f"train2014/{path.name}")
    monkeypatch.setitem(data_utils.ARCHIVES, "train2014.zip", (f"{address}/train2014.zip", None, None))
    monkeypatch.setattr(data_utils, "ZIP_FROM", 10)
    dataset = data_utils.load_dataset(data_utils.DataOptions(data_dir=str(tmp_path / "data"), num_captions=0))
    assert len(dataset.examples) == 12 and all((dataset.images / e.image).exists() for e in dataset.examples)
    assert asked == ["/annotations.zip", "/train2014.zip"]


def test_flickr8k(server, tmp_path, monkeypatch):
    folder, address, asked = server
    with zipfile.ZipFile(folder / "text.zip", "w") as archive:
        rows = "".join(f"{name}.jpg#{n}\ta dog\n" for name in "abc" for n in range(5)) + "d.jpg.1#0\ta ghost\n"
        archive.writestr("Flickr8k.token.txt", rows)
        for split, name in (("train", "a"), ("dev", "b"), ("test", "c")):
            archive.writestr(f"Flickr_8k.{split}Images.txt", f"{name}.jpg\n")
    with zipfile.ZipFile(folder / "images.zip", "w") as archive:
        for name in "abc":
            archive.writestr(f"Flicker8k_Dataset/{name}.jpg", jpeg("blue"))
        archive.writestr("__MACOSX/Flicker8k_Dataset/._a.jpg", "x")
    for name, file in (("Flickr8k_text.zip", "text.zip"), ("Flickr8k_Dataset.zip", "images.zip")):
        monkeypatch.setitem(data_utils.ARCHIVES, name, (f"{address}/{file}", None, None))
    options = data_utils.DataOptions("flickr8k", data_dir=str(tmp_path / "data"))
    dataset = data_utils.load_dataset(options)
    assert [(e.image, e.split) for e in dataset.examples] == [("a.jpg", "train"), ("b.jpg", "val"), ("c.jpg", "test")]
    assert all((dataset.images / e.image).exists() for e in dataset.examples)
    data_utils.load_dataset(options)
    assert sorted(asked) == ["/images.zip", "/text.zip"]
