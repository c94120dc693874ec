"""Downloads against servers on this machine, and archives."""

import dataclasses
import hashlib
import http.server
import threading
import zipfile

import pytest

from captioning.base import downloads
from captioning.base.cli import InputError
from captioning.base.downloads import Archive, download, fetch_archive, redact_url, unpack
from captioning.base.files import try_lock

CONTENT = bytes(range(256)) * 400  # 102,400 bytes
MD5 = hashlib.md5(CONTENT).hexdigest()
CUT = {"cut": 2 * downloads.RECEIVED_BYTES}  # an answer that ends after so many bytes


@dataclasses.dataclass
class FlakyServer:
    """A server of `content`; the last of `answers` is given again and again."""

    url: str = ""
    content: bytes = CONTENT
    answers: list[dict] = dataclasses.field(default_factory=lambda: [{}])
    ranges: list[str | None] = dataclasses.field(default_factory=list)  # the Range header of every request


@pytest.fixture
def flaky_server(monkeypatch):
    """Keys of an answer: code, to (where it redirects), type, cut, and whether it `resumes` and has a `length`."""
    monkeypatch.setattr(downloads, "INITIAL_BACKOFF_S", 0.0)
    downloads._session.cache_clear()
    server = FlakyServer()

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            etag, byte_range = f'"{hash(server.content)}"', self.headers.get("Range")
            server.ranges.append(byte_range)
            is_same = self.headers.get("If-Range", etag) == etag
            start = int(byte_range[6:-1]) if byte_range and is_same and answer.get("resumes", True) else 0
            default = 200 if not start else 206 if start < len(server.content) else 416
            code = answer.get("code", default)
            rest = server.content[start:] if code < 300 else b""
            self.send_response(code)
            self.send_header("ETag", etag)
            if "to" in answer:
                self.send_header("Location", answer["to"])
            if "type" in answer:
                self.send_header("Content-Type", answer["type"])
            if answer.get("length", True):
                self.send_header("Content-Length", str(len(rest)))
            self.end_headers()
            self.wfile.write(rest[: answer.get("cut")])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True).start()
        server.url = f"http://127.0.0.1:{httpd.server_port}/a.bin"
        yield server
        httpd.shutdown()
    downloads._session.cache_clear()


def names_in(folder):
    return [path.name for path in folder.iterdir()]


def raise_interrupt(*_):
    raise KeyboardInterrupt


def test_download_skips_what_exists(flaky_server, tmp_path, capsys):
    path = tmp_path / "out/a.bin"
    for _ in range(2):
        assert download(flaky_server.url, path, len(CONTENT), MD5).read_bytes() == CONTENT
    assert len(flaky_server.ranges) == 1, "the second time must not ask the server"
    assert "a.bin" in capsys.readouterr().err
    download(flaky_server.url, tmp_path / "b.bin", quiet=True)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("num_bytes", "md5", "message"),
    [
        (len(CONTENT) + 1, None, "expected 102,401 bytes, received 102,400"),
        (len(CONTENT) - 1, None, "expected at most 102,399 bytes, received more"),
        (len(CONTENT), "0" * 32, f"expected MD5 {'0' * 32}, found {MD5}"),
    ],
)
def test_download_of_wrong_length_or_md5_leaves_nothing(flaky_server, tmp_path, num_bytes, md5, message):
    with pytest.raises(InputError, match=message):
        download(flaky_server.url, tmp_path / "out/a.bin", num_bytes, md5)
    assert names_in(tmp_path / "out") == []


def test_download_refuses_a_web_page_in_place_of_a_file(flaky_server, tmp_path):
    flaky_server.content = b"\n<!doctype HTML><title>Log in"
    with pytest.raises(InputError, match=r"a\.zip cannot be downloaded .*received a web page"):
        download(flaky_server.url, tmp_path / "a.zip")
    assert names_in(tmp_path) == []


def test_download_keeps_what_it_has_where_a_web_page_is_sent_for_the_rest(flaky_server, tmp_path):
    """As by the login of a wireless network."""
    flaky_server.answers[:] = [CUT, {"type": "text/html; charset=utf-8", "resumes": False}]
    with pytest.raises(InputError, match=r"received a web page, of a login perhaps\); 32,768 bytes are kept"):
        download(flaky_server.url, tmp_path / "a.zip", len(CONTENT), MD5)
    assert (tmp_path / "a.zip.part").read_bytes() == CONTENT[:32768]


def test_download_failure_names_address_and_folder(flaky_server, tmp_path):
    flaky_server.answers[:] = [{"code": 404}]
    for url, reason in ((flaky_server.url, "answered 404 Not Found"), ("http://127.0.0.1:1/a.bin", "refused")):
        with pytest.raises(InputError, match=reason) as error:
            download(url, tmp_path / "out/none.zip")
        advice = f"download {url} yourself and put it into {tmp_path / 'out'}/ as none.zip"
        assert str(error.value).endswith(f"; run the same command again, or {advice}")


def test_download_resumes_when_cut(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, CUT, {"code": 503}, {}]
    assert download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT
    assert flaky_server.ranges == [None, "bytes=32768-", "bytes=65536-", "bytes=65536-"]
    assert names_in(tmp_path) == ["a.bin"]


def test_download_resumes_in_the_next_run(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, {"code": 500}]
    with pytest.raises(InputError, match=r"500 .*; 32,768 bytes are kept; run the same command again"):
        download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5)
    assert len(flaky_server.ranges) == 1 + downloads.MAX_RETRIES
    flaky_server.answers[:] = [{}]
    assert download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT
    assert flaky_server.ranges[-1] == "bytes=32768-" and names_in(tmp_path) == ["a.bin"]


def test_download_starts_over_if_the_file_of_the_server_has_changed(flaky_server, tmp_path):
    flaky_server.answers[:] = [CUT, {"code": 500}]
    with pytest.raises(InputError):
        download(flaky_server.url, tmp_path / "a.bin")
    flaky_server.answers[:], flaky_server.content = [{}], CONTENT[::-1]
    assert download(flaky_server.url, tmp_path / "a.bin").read_bytes() == CONTENT[::-1]


def test_download_ends_if_requests_bring_nothing_more(flaky_server, tmp_path):
    flaky_server.answers[:] = [{"cut": 10, "resumes": False}]
    with pytest.raises(InputError, match="the connection was lost"):
        download(flaky_server.url, tmp_path / "a.bin")


@pytest.mark.parametrize("answers", [[CUT, {"resumes": False}], [{"code": 302, "to": "/b.bin"}, {}]])
def test_download_starts_over_if_the_server_cannot_resume_and_follows_redirects(flaky_server, tmp_path, answers):
    flaky_server.answers[:] = answers
    assert download(flaky_server.url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


def test_download_starts_over_if_the_part_is_too_long(flaky_server, tmp_path):
    (tmp_path / "a.bin.part").write_bytes(CONTENT + b"more")
    assert download(flaky_server.url, tmp_path / "a.bin", len(CONTENT), MD5).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"code": 302, "to": "file:///etc/passwd"}, "No connection adapters"),
        ({"length": False}, "expected at most 50,000 bytes, received more"),
    ],
)
def test_download_does_not_retry_permanent_errors(flaky_server, tmp_path, answer, message):
    flaky_server.answers[:] = [answer]
    with pytest.raises(InputError, match=message):
        download(flaky_server.url, tmp_path / "a.bin", max_bytes=50_000)
    assert len(flaky_server.ranges) == 1 and names_in(tmp_path) == []


@pytest.mark.usefixtures("flaky_server")
@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://me:hush@127.0.0.1:1/a.jpg", "expected an address that begins with http"),
        ("http://127.0.0.1:1/a.jpg?token=hush#hush", "Connection refused"),
        ("file:///etc/passwd", "expected an address that begins with http"),
    ],
)
def test_download_refuses_other_addresses_and_hides_secrets(url, reason, tmp_path, capsys):
    with pytest.raises(InputError, match=reason) as error:
        download(url, tmp_path / "a.jpg")
    assert f"from {redact_url(url)} (" in str(error.value)
    assert "hush" not in str(error.value) + "".join(capsys.readouterr()) and names_in(tmp_path) == []


def test_download_refuses_what_another_process_downloads(flaky_server, tmp_path):
    with open(tmp_path / "a.bin.part", "ab") as file:
        assert try_lock(file)
        with pytest.raises(InputError, match=r"a\.bin is being downloaded by another process; wait"):
            download(flaky_server.url, tmp_path / "a.bin")
    assert download(flaky_server.url, tmp_path / "a.bin", None, MD5).read_bytes() == CONTENT


# Archives.


def write_zip(path, members):
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


def test_unpack_refuses_decompression_bombs(tmp_path):
    bomb = write_zip(tmp_path / "bomb.zip", {"a.jpg": bytes(10_000_000)})
    with pytest.raises(InputError, match="would unpack to 10,000,000"):
        unpack(bomb, tmp_path / "out", (".jpg",))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["/tmp/evil_of_the_test.jpg", "a/../../evil.jpg"])
def test_unpack_refuses_paths_outside_the_folder(tmp_path, name):
    with pytest.raises(InputError, match="outside"):
        unpack(write_zip(tmp_path / "bad.zip", {name: "x"}), tmp_path / "out", (".jpg",))
    assert not (tmp_path / "evil.jpg").exists()


def test_unpack_refuses_damaged_archives(tmp_path):
    (tmp_path / "bad.zip").write_bytes(b"PK nonsense")
    with pytest.raises(InputError, match="damaged"):
        unpack(tmp_path / "bad.zip", tmp_path / "out", (".jpg",))
    (tmp_path / "bad.zip").write_bytes(b" <HTML lang=en><p>Log in")
    with pytest.raises(InputError, match=r"bad\.zip: a web page, expected an archive; delete it"):
        unpack(tmp_path / "bad.zip", tmp_path / "out", (".jpg",))


def test_fetch_archive_keeps_an_archive_of_the_user(tmp_path):
    write_zip(tmp_path / "a.zip", {"a.jpg": b"abc"})
    fetch_archive(Archive("a.zip", "http://127.0.0.1:1/a.zip"), tmp_path, (".jpg",))
    assert sorted(names_in(tmp_path)) == ["a.jpg", "a.zip"]


def test_fetch_archive_deletes_what_it_downloaded_when_unpacking_was_stopped(flaky_server, tmp_path, monkeypatch):
    flaky_server.content = write_zip(tmp_path / "served.zip", {"a.jpg": b"abc"}).read_bytes()
    archive = Archive("a.zip", flaky_server.url)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads, "unpack", raise_interrupt)
        fetch_archive(archive, tmp_path / "out", (".jpg",))
    fetch_archive(archive, tmp_path / "out", (".jpg",))
    assert names_in(tmp_path / "out") == ["a.jpg"] and len(flaky_server.ranges) == 1
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(downloads, "unpack", raise_interrupt)
        fetch_archive(archive, tmp_path / "out", (".jpg",))
    write_zip(tmp_path / "out/a.zip", {"a.jpg": b"abc", "b.jpg": b"the user's"})
    fetch_archive(archive, tmp_path / "out", (".jpg",))
    assert sorted(names_in(tmp_path / "out")) == ["a.jpg", "a.zip", "b.jpg"], "another file in its place is kept"
