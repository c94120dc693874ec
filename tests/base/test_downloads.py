"""Downloads against servers on this machine, and archives."""

import dataclasses
import errno
import hashlib
import http.server
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor

import pytest

from captioning.base import downloads
from captioning.base.cli import InputError
from captioning.base.downloads import Archive, download, fetch_archive, redact_url, unpack

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = {"cut": 30_000}  # an answer that ends after so many bytes


@dataclasses.dataclass
class FlakyServer:
    """A server of CONTENT; the last of `answers` is given again and again."""

    url: str = ""
    answers: list[dict] = dataclasses.field(default_factory=lambda: [{}])
    ranges: list[str | None] = dataclasses.field(default_factory=list)  # the Range header of every request


@pytest.fixture
def flaky_server(monkeypatch):
    """Keys of an answer: code, to (where it redirects), cut, and whether it `resumes` and has a `length`."""
    monkeypatch.setattr(downloads, "INITIAL_BACKOFF_S", 0.0)
    server = FlakyServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            byte_range = self.headers.get("Range")
            server.ranges.append(byte_range)
            start = int(byte_range[6:-1]) if byte_range and answer.get("resumes", True) else 0
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
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{httpd.server_port}/a.bin"
        yield server
        httpd.shutdown()


def test_download_skips_what_exists(flaky_server, tmp_path):
    path = tmp_path / "out/a.bin"
    for _ in range(2):
        assert download(flaky_server.url, path, len(CONTENT), MD5).read_bytes() == CONTENT
    assert len(flaky_server.ranges) == 1, "the second time must not ask the server"


@pytest.mark.parametrize(("num_bytes", "md5"), [(len(CONTENT) + 1, None), (len(CONTENT), "0" * 32)])
def test_download_of_wrong_length_or_md5_leaves_nothing(flaky_server, tmp_path, num_bytes, md5):
    with pytest.raises(InputError, match=r"a\.bin.* expected|a\.bin.*\(expected"):
        download(flaky_server.url, tmp_path / "out/a.bin", num_bytes, md5)
    assert list((tmp_path / "out").iterdir()) == []


def test_download_failure_names_address_and_folder(flaky_server, tmp_path):
    flaky_server.answers[:] = [{"code": 404}]
    for url in (flaky_server.url, "http://127.0.0.1:1/a.bin"):
        with pytest.raises(InputError) as error:
            download(url, tmp_path / "out/none.zip")
        assert url in str(error.value) and "none.zip" in str(error.value) and str(tmp_path / "out") in str(error.value)
        assert "run the same command again, or download" in str(error.value)


@pytest.mark.parametrize("num_bytes", [None, len(CONTENT)])
def test_download_resumes_when_cut(flaky_server, tmp_path, num_bytes):
    flaky_server.answers[:] = [CUT, CUT, {"code": 503}, {}]
    assert download(flaky_server.url, tmp_path / "a.bin", num_bytes, MD5).read_bytes() == CONTENT
    assert flaky_server.ranges == [None, "bytes=30000-", "bytes=60000-", "bytes=60000-"]
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_download_resumes_in_the_next_run(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, {"code": 500}]
    with pytest.raises(InputError, match=r"500 .*; 30,000 bytes are kept; run the same command again"):
        download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5)
    assert len(flaky_server.ranges) == downloads.MAX_RETRIES
    flaky_server.answers[:] = [{}]
    assert download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT
    assert flaky_server.ranges[-1] == "bytes=30000-"


def test_download_starts_over_if_the_server_cannot_resume(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, {"resumes": False}]
    assert download(flaky_server.url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(("num_bytes", "answers"), [(None, [{"code": 416}, {}]), (len(CONTENT), [{}])])
def test_download_starts_over_if_the_part_is_too_long(flaky_server, tmp_path, num_bytes, answers):
    flaky_server.answers[:] = answers
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert download(flaky_server.url, tmp_path / "a.bin", num_bytes, MD5).read_bytes() == CONTENT


def test_download_removes_a_damaged_part(flaky_server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(b"x" * 1000)
    with pytest.raises(InputError, match="expected MD5"):
        download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5)
    assert list(tmp_path.iterdir()) == []
    assert download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT


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
def test_download_does_not_retry_permanent_errors(flaky_server, tmp_path, answer, message):
    flaky_server.answers[:] = [answer]
    with pytest.raises(InputError, match=message):
        download(flaky_server.url, tmp_path / "a.bin", max_bytes=50_000)
    assert len(flaky_server.ranges) == 1 and not (tmp_path / "a.bin").exists()


def test_download_follows_redirects_to_http(flaky_server, tmp_path):
    flaky_server.answers[:] = [{"code": 302, "to": "/b.bin"}, {}]
    assert download(flaky_server.url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


@pytest.mark.parametrize("url", ["http://me:hush@127.0.0.1:1/a.jpg", "http://127.0.0.1:1/a.jpg?token=hush#hush"])
def test_redact_url_hides_credentials_and_query(url, tmp_path, monkeypatch, capsys):
    assert redact_url(url) == "http://127.0.0.1:1/a.jpg"
    monkeypatch.setattr(downloads, "INITIAL_BACKOFF_S", 0)
    with pytest.raises(InputError, match=r"http://127.0.0.1:1/a.jpg") as error:
        download(url, tmp_path / "a.jpg")
    assert "hush" not in str(error.value) + "".join(capsys.readouterr())


@pytest.mark.parametrize("url", ["file:///etc/passwd", "ftp://host/a", "/etc/passwd"])
def test_download_refuses_other_protocols(tmp_path, url):
    with pytest.raises(InputError, match="begins with http"):
        download(url, tmp_path / "a.bin")
    assert list(tmp_path.iterdir()) == []


def test_download_of_one_file_by_many_at_once(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, {}]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: download(flaky_server.url, tmp_path / "a.bin", None, MD5), range(8)))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert len(flaky_server.ranges) == 2, "only one of them asks the server"
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_download_keeps_what_was_received_on_a_full_disk(flaky_server, tmp_path, monkeypatch):
    flaky_server.answers[:] = [CUT, {}]

    def raise_disk_full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(downloads.time, "sleep", raise_disk_full)  # after the first piece
        with pytest.raises(OSError, match="No space left"):
            download(flaky_server.url, tmp_path / "a.bin", None, MD5)
    assert (tmp_path / "a.bin.part").stat().st_size == 30_000
    assert download(flaky_server.url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


def test_download_shows_no_progress_if_quiet(flaky_server, tmp_path, capsys):
    download(flaky_server.url, tmp_path / "a.bin")
    assert "a.bin" in capsys.readouterr().err
    download(flaky_server.url, tmp_path / "b.bin", quiet=True)
    assert capsys.readouterr().err == ""


# Archives.


def write_zip(path, members):
    """Writes an archive; members are contents by name, or by ZipInfo."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_unpack_takes_files_by_suffix_and_skips_what_exists(tmp_path):
    archive = write_zip(tmp_path / "a.zip", {"d/a.jpg": b"abc", "d/a.txt": b"no", "__MACOSX/d/._a.jpg": b"no"})
    unpack(archive, tmp_path / "out", (".jpg",))
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert files == [tmp_path / "out/d/a.jpg"]
    files[0].write_bytes(b"xyz")  # of the same length
    unpack(archive, tmp_path / "out", (".jpg",))
    assert files[0].read_bytes() == b"xyz"
    files[0].write_bytes(b"x")
    unpack(archive, tmp_path / "out", (".jpg",))
    assert files[0].read_bytes() == b"abc"


def test_unpack_refuses_decompression_bombs_and_links(tmp_path):
    bomb = write_zip(tmp_path / "bomb.zip", {"a.jpg": bytes(10_000_000)})
    with pytest.raises(InputError, match="would unpack to 10,000,000"):
        unpack(bomb, tmp_path / "out", (".jpg",))
    link = zipfile.ZipInfo("a.jpg")
    link.external_attr = 0o120777 << 16
    with pytest.raises(InputError, match="outside"):
        unpack(write_zip(tmp_path / "link.zip", {link: "/etc/passwd"}), tmp_path / "out", (".jpg",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["../evil.jpg", "/tmp/evil_of_the_test.jpg", "a/../../evil.jpg"])
def test_unpack_refuses_paths_outside_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="outside"):
        unpack(write_zip(tmp_path / "bad.zip", {name: "x"}), tmp_path / "out", (".jpg",))
    assert not (tmp_path / "evil.jpg").exists()


def test_unpack_refuses_damaged_archives(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="damaged"):
        unpack(tmp_path / "bad.zip", tmp_path / "out", (".jpg",))


def test_fetch_archive_keeps_an_archive_of_the_user(tmp_path):
    write_zip(tmp_path / "a.zip", {"a.jpg": b"abc"})
    fetch_archive(Archive("a.zip", "http://127.0.0.1:1/a.zip"), tmp_path, (".jpg",))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jpg", "a.zip"]
