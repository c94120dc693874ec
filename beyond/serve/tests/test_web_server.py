"""The web server, with a captioner that needs no model, through real connections."""

import http.client
import json
import time

import pytest
from helpers.web import (
    FORM,
    FakeCaptioner,
    caption_pixels,
    draw_png,
    form_part,
    load_image,
    make_form,
    parse_replies,
    post,
    raw_post,
    request,
    run_server,
    send_raw,
)

from beyond.serve.web_server import FILES, WEB_DIRS, is_loopback
from captioning.config.settings import DecodeConfig

PNG = draw_png()
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def captioner():
    return FakeCaptioner()


@pytest.fixture
def server(captioner):
    with run_server(captioner.service) as server:
        yield server


# The page.


@pytest.mark.parametrize("path", FILES)
def test_server_gives_the_files_of_the_page(server, path):
    status, headers, content = request(server, "GET", path)
    name, content_type = FILES[path]
    assert (status, headers["Content-Type"]) == (200, content_type)
    assert content == (WEB_DIRS[name.split(".")[0]] / name).read_bytes()
    assert headers["Cache-Control"] == "no-cache"
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")


def test_page_needs_nothing_but_files_of_the_server():
    page = (WEB_DIRS["serve"] / "serve.html").read_text(encoding="utf-8")
    links = [part.split('"')[0] for part in page.split('src="')[1:] + page.split('href="')[1:]]
    assert set(links) == FILES.keys() - {"/"} | {"data:,"}


def test_head_gives_the_headers_only(server):
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    for path in ("/", "/health"):
        for method in ("GET", "HEAD"):  # on one connection: content after HEAD would spoil the next answer
            connection.request(method, path)
            response = connection.getresponse()
            length = int(response.headers["Content-Length"])
            assert (response.status, len(response.read())) == (200, length if method == "GET" else 0)
            assert length > 0
    connection.close()


def test_health_says_what_the_page_needs(captioner):
    with run_server(captioner.service, max_mb=3) as server:
        status, headers, value = request(server, "GET", "/health")
    assert (status, headers["Cache-Control"]) == (200, "no-store")
    assert value == {"status": "ok", "run": "small", "max_bytes": 3_000_000, "defaults": DecodeConfig().to_json()}


# Captions.


def expected_json(content, config=None):
    """Returns what a caption of an image is in JSON, without the time."""
    return caption_pixels(load_image(content), config or DecodeConfig()).to_json(with_attention=True)


def test_caption_of_raw_bytes(server):
    status, value = post(server, PNG)
    assert status == 200
    assert 0 <= value.pop("seconds") < 20
    assert value == expected_json(PNG)
    assert value["caption"] == "a red image" and len(value["words"][0]["attention"]) == 64


@pytest.mark.parametrize("content_type", ["image/jpeg", "text/plain", "application/octet-stream", "", "nonsense"])
def test_caption_takes_raw_bytes_of_any_type(server, content_type):
    assert post(server, PNG, content_type=content_type)[0] == 200


def test_caption_without_a_type(server):
    assert parse_replies(send_raw(server, raw_post(PNG)))[0][0] == 200


def test_caption_of_a_form_with_parameters(server, captioner):
    body = make_form(form_part("captions", b"2"), form_part("image", PNG, '; filename="a.png"'))
    status, value = post(server, body, "?beam_size=3", FORM)
    del value["seconds"]
    config = DecodeConfig(beam_size=3, captions=2)
    assert (status, value) == (200, expected_json(PNG, config))
    assert len(value["alternatives"]) == 1
    assert captioner.batches == [(1, config)]


def test_caption_begins_with_the_defaults_of_the_server():
    captioner = FakeCaptioner(DecodeConfig(beam_size=5, no_repeat=True))
    with run_server(captioner.service) as server:
        post(server, PNG)
        post(server, PNG, "?no_repeat=false")
    assert [config for _, config in captioner.batches] == [
        DecodeConfig(beam_size=5, no_repeat=True),
        DecodeConfig(beam_size=5),
    ]


# Refusals.


@pytest.mark.parametrize(
    ("body", "query", "status", "message"),
    [
        (b"", "", 400, "expected an image, found an empty one"),
        (b"some text", "", 400, "not an image that can be read"),
        (PNG[:30], "", 400, "not an image that can be read"),
        (PNG, "?beam_size=0", 400, "beam_size: expected a whole number of at least 1, found '0'"),
        (PNG, "?beam_size=21", 400, "beam_size: expected at most 20 of this server, found 21"),
        (PNG, "?size=1", 400, "'size' is no parameter; expected beam_size, "),
        (PNG, "?beam_size", 400, "expected parameters such as beam_size=5&captions=3"),
    ],
)
def test_caption_refuses_in_one_line(server, body, query, status, message, capsys):
    for _ in range(2):
        found, value = post(server, body, query)
        assert found == status
        assert list(value) == ["error"] and message in value["error"] and "\n" not in value["error"]
    assert post(server, PNG)[0] == 200


def test_caption_refuses_a_form_without_an_image(server):
    status, value = post(server, make_form(form_part("photo", PNG)), content_type=FORM)
    assert (status, value) == (400, {"error": "expected one part with the name image in the form, found 0"})
    status, value = post(server, make_form(form_part("image", b"")), content_type=FORM)
    assert (status, value) == (400, {"error": "expected an image, found an empty one"})
    assert post(server, PNG, content_type="multipart/form-data")[0] == 400


@pytest.mark.parametrize(
    "headers",
    [
        {"content_type": "application/x-www-form-urlencoded"},
        {"content_type": "multipart/mixed; boundary=b"},
        {"Content-Encoding": "gzip"},
    ],
)
def test_caption_refuses_other_types(server, headers):
    status, value = post(server, PNG, **headers)
    assert status == 415
    assert "-F image=@photo.jpg" in value["error"]


@pytest.mark.parametrize("headers", [[], ["Transfer-Encoding: chunked"], ["Content-Length: 3", "Transfer-Encoding: x"]])
def test_caption_refuses_a_body_without_length(server, headers):
    data = (
        "\r\n".join(["POST /caption HTTP/1.1", "Host: localhost", *headers, "", ""]).encode() + b"3\r\nabc\r\n0\r\n\r\n"
    )
    [(status, headers, content)] = parse_replies(send_raw(server, data))
    assert (status, headers["connection"]) == (411, "close")
    assert "Content-Length" in json.loads(content)["error"]


@pytest.mark.parametrize("length", ["-1", "1.5", "1e3", "", "0x10", "1, 1", "+5", "\u00b2"])
def test_caption_refuses_other_lengths(server, length):
    [(status, _, content)] = parse_replies(send_raw(server, raw_post(PNG, length=length)))
    assert (status, "whole number" in json.loads(content)["error"]) == (400, True)


def test_caption_refuses_two_lengths(server):
    [(status, _, _)] = parse_replies(send_raw(server, raw_post(PNG, "Content-Length: 3")))
    assert status == 400


def test_caption_refuses_a_large_body_before_it_is_read(captioner):
    with run_server(captioner.service, max_mb=1) as server:
        status, value = post(server, bytes(30_000_000))  # a client that sees the answer only once it has sent all
        assert (status, value) == (413, {"error": "expected at most 1 MB, found 30000000 bytes"})
        start = time.perf_counter()
        [(status, _, _)] = parse_replies(send_raw(server, raw_post(PNG, length="9" * 30)))
        assert status == 413 and time.perf_counter() - start < 2
        assert post(server, bytes(1_000_000))[1]["error"].startswith("the image: not an image")
        assert post(server, bytes(1_000_001))[0] == 413
        assert post(server, PNG)[0] == 200


def test_server_refuses_other_paths_and_methods(server):
    status, headers, value = request(server, "GET", "/model.py")
    assert (status, value) == (404, {"error": "no such page; expected /, /health or /caption"})
    assert headers["X-Content-Type-Options"] == "nosniff"
    for method, path, allowed in [
        ("GET", "/caption", "POST"),
        ("PUT", "/caption", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("DELETE", "/health", "GET, HEAD"),
        ("NONSENSE", "/viewer.js", "GET, HEAD"),
    ]:
        status, headers, value = request(server, method, path)
        assert (status, headers["Allow"]) == (405, allowed), (method, path)
        assert value["error"].startswith(f"expected {allowed.replace(', ', ' or ')}, found {method!r}")


def test_server_answers_only_loopback_names(server):
    port = server.server_address[1]
    for host in ("localhost", f"localhost:{port}", "LOCALHOST", "127.0.0.1", "127.1.2.3:80", "[::1]", f"[::1]:{port}"):
        assert request(server, "GET", "/health", headers={"Host": host})[0] == 200, host
    for host in (
        "example.com",
        f"example.com:{port}",
        "localhost.example.com",
        "192.168.0.1",
        "",
        "localhost:x",
    ):
        status, _, value = request(server, "GET", "/health", headers={"Host": host})
        assert status == 403, host
        assert value["error"].startswith("expected a request to localhost or 127.0.0.1, found one to ")


@pytest.mark.parametrize(
    "headers", ["", "Host: localhost\r\nHost: example.com\r\n", "Host: localhost\r\nno header\r\n"]
)
def test_server_refuses_headers_that_are_none(server, headers):
    [(status, _, content)] = parse_replies(send_raw(server, f"GET / HTTP/1.1\r\n{headers}\r\n".encode()))
    assert status == 400
    assert json.loads(content)["error"].startswith("expected headers of the form")


def test_server_refuses_what_other_pages_post(server):
    host = f"localhost:{server.server_address[1]}"
    assert post(server, PNG, Host=host, Origin=f"http://{host}")[0] == 200
    for origin in ("http://example.com", "null", "http://localhost:1", f"http://{host}.example.com", ""):
        status, value = post(server, PNG, Host=host, Origin=origin)
        assert (status, value["error"][:45]) == (403, "expected a request of this server's page, fou"), origin


def test_server_of_other_machines_answers_any_name(captioner):
    with run_server(captioner.service, host="0.0.0.0") as server:
        assert request(server, "GET", "/health", headers={"Host": "my-machine.local"})[0] == 200
        assert post(server, PNG, Host="my-machine", Origin="http://example.com")[0] == 403


@pytest.mark.parametrize(
    ("host", "expected"),
    [
        ("localhost", True),
        ("127.0.0.1", True),
        ("::1", True),
        ("[::1]", True),
        ("0.0.0.0", False),
        ("example.com", False),
    ],
)
def test_is_loopback(host, expected):
    assert is_loopback(host) is expected
