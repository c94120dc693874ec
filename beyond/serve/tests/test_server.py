"""The application, with a captioner that needs no model and without sockets; and a few tests through real ones."""

import contextlib
import io
import json
import socket
import threading
import time
import types
import urllib.request

import pytest
from helpers.web import FakeCaptioner, caption_pixels, draw_png, load_image, make_client, post, run_server, wait_until

from beyond.serve.server import FILES, listen
from beyond.serve.settings import ServerConfig
from captioning.base.cli import InputError, Verbosity
from captioning.config.settings import DecodeConfig

PNG = draw_png()


@pytest.fixture
def captioner():
    return FakeCaptioner()


@pytest.fixture
def client(captioner):
    return make_client(captioner)


def image_file(content=PNG, name="a.png"):
    return io.BytesIO(content), name


# The page.


@pytest.mark.parametrize("path", FILES)
def test_files_of_the_page(client, path):
    file, content_type = FILES[path]
    reply = client.get(path)
    assert (reply.status_code, reply.mimetype, reply.data) == (200, content_type, file.read_bytes())
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")


def test_health_says_what_the_page_needs(captioner):
    reply = make_client(captioner, max_mb=3).get("/health")
    assert (reply.status_code, reply.headers["Cache-Control"]) == (200, "no-store")
    facts = {"status": "ok", "run": "small", "max_bytes": 3_000_000, "defaults": DecodeConfig().to_json()}
    assert reply.json == facts


# Captions.


@pytest.mark.parametrize("content_type", ["image/png", "application/x-www-form-urlencoded", ""])
def test_caption_of_raw_bytes_of_any_type(client, content_type):
    status, value = post(client, PNG, content_type=content_type)
    assert status == 200
    assert 0 <= value.pop("seconds") < 20
    assert value == caption_pixels(load_image(PNG), DecodeConfig()).to_json(with_attention=True)
    assert value["caption"] == "a red image" and len(value["words"][0]["attention"]) == 64


def test_caption_of_a_form_with_parameters(client, captioner):
    large = draw_png(size=(700, 700)) + bytes(1_000_000)  # larger than what Werkzeug keeps in memory
    status, value = post(client, {"captions": "2", "image": image_file(large)}, "?beam_size=3")
    assert (status, len(value["alternatives"])) == (200, 1)
    assert captioner.batches == [(1, DecodeConfig(beam_size=3, captions=2))]


def test_caption_begins_with_the_defaults_of_the_server():
    captioner = FakeCaptioner(DecodeConfig(beam_size=5, no_repeat=True))
    client = make_client(captioner)
    post(client, PNG)
    post(client, PNG, "?no_repeat=false")
    configs = [config for _, config in captioner.batches]
    assert configs == [DecodeConfig(beam_size=5, no_repeat=True), DecodeConfig(beam_size=5)]


# Refusals.


@pytest.mark.parametrize(
    ("body", "query", "message"),
    [
        (b"", "", "expected an image, found an empty one"),
        (b"some text", "", "not an image that can be read"),
        (PNG, "?beam_size=0", "beam_size: expected a whole number of at least 1, found '0'"),
        (PNG, "?beam_size=%00%FF%0A", "beam_size: expected a whole number of at least 1, found "),
        ({"photo": image_file()}, "", "expected one file with the name image in the form, found 0"),
        ({"image": [image_file(), image_file()]}, "", "expected one file with the name image in the form, found 2"),
        ({"image": image_file(), "size": "1"}, "", "'size' is no parameter"),
        ({"image": image_file(), "captions": "2"}, "?captions=2", "captions: expected one value, found two"),
    ],
)
def test_caption_refuses_in_one_line(captioner, body, query, message):
    client = make_client(captioner, max_requests=1)
    status, value = post(client, body, query)
    assert (status, list(value)) == (400, ["error"])
    assert message in value["error"] and value["error"].isprintable()
    assert not captioner.batches
    assert post(client, PNG)[0] == 200  # the place is free again


@pytest.mark.parametrize("body", [b"", b"--b\r\n\r\nx\r\n--b--", b"--b\r\nContent-Disposition: x\r\n\r\n"])
def test_caption_refuses_damaged_forms(client, body):
    status, value = post(client, body, content_type="multipart/form-data; boundary=b")
    assert (status, value) == (400, {"error": "expected one file with the name image in the form, found 0"})


def test_caption_refuses_large_bodies(captioner):
    client = make_client(captioner, max_mb=1)
    assert post(client, bytes(1_000_000))[1]["error"].startswith("the image: not an image")
    message = {"error": "expected at most 1 MB; a form holds one image and short values"}
    assert post(client, bytes(1_000_001)) == (413, message)
    assert post(client, {"image": image_file(bytes(1_000_000))}) == (413, message)
    assert post(client, {"image": image_file(), "captions": "2" * 600_000}) == (413, message)


def test_other_paths_and_methods_are_refused(client):
    for path in ("/model.py", "/serve.html", "/../serve.py", "/%2e%2e/etc/passwd", "/viewer.js/"):
        reply = client.get(path)
        assert reply.status_code == 404 and "not found" in reply.json["error"]
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    for method, path, allowed in [
        ("GET", "/caption", {"POST"}),
        ("POST", "/", {"GET", "HEAD"}),
        ("NONSENSE", "/viewer.js", {"GET", "HEAD"}),
    ]:
        reply = client.open(path, method=method)
        assert (reply.status_code, set(reply.headers["Allow"].split(", "))) == (405, allowed), (method, path)
        assert reply.json == {"error": "The method is not allowed for the requested URL."}


# Who may ask.


def status_for(client, host, origin=None):
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    return client.get("/health", headers=headers).status_code


def test_only_loopback_names_are_answered(client):
    for host in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]", "[::1]:8000"):
        assert status_for(client, host) == 200, host
    for host in ("example.com", "localhost.example.com", "192.168.0.1:8000", "", "localhost, a.com"):
        assert status_for(client, host) == 403, host
    error = client.get("/health", headers={"Host": "example.com:8000"}).json["error"]
    assert error == (
        "expected a request to localhost or 127.0.0.1, found one to 'example.com:8000'; if a proxy shows this page "
        "there, start the server with --trusted-hosts and that name"
    )


def test_posts_of_other_pages_are_refused(client):
    assert status_for(client, "localhost:8000", "http://localhost:8000") == 200
    for origin in ("http://example.com", "null", "http://localhost:1", ""):
        status, value = post(client, PNG, Host="localhost:8000", Origin=origin)
        assert (status, value["error"][:45]) == (403, "expected a request of this server's page, fou"), origin


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_names_of_a_proxy_are_trusted_where_the_user_says_so(captioner, host):
    client = make_client(captioner, host=host, trusted_hosts="hub.example.com,.b.org")
    assert status_for(client, "hub.example.com", "https://hub.example.com") == 200
    assert status_for(client, "a.b.org:443", "https://a.b.org") == 200  # the proxy added the port
    assert status_for(client, "localhost:8000", "https://hub.example.com") == 200  # it changed the name
    assert status_for(client, "x.hub.example.com") == 403
    assert status_for(client, "hub.example.com", "https://example.com") == 403


def test_server_of_other_machines_answers_any_name(captioner):
    client = make_client(captioner, host="0.0.0.0")
    assert status_for(client, "my-machine.local:8000", "http://my-machine.local:8000") == 200
    assert status_for(client, "my-machine", "http://example.com") == 403


# Many clients.


def start_post(client, replies, image=PNG):
    """Posts an image in a thread, which appends the answer to a list."""
    thread = threading.Thread(target=lambda: replies.append(client.post("/caption", data=image)), daemon=True)
    thread.start()
    return thread


def assert_busy(reply, message):
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json == {"error": f"{message}; try again in a moment"}


def test_more_images_than_the_server_takes_are_told_to_come_again(captioner):
    client, replies = make_client(captioner, max_requests=2), []
    captioner.may_end.clear()
    threads = [start_post(client, replies) for _ in range(2)]
    wait_until(lambda: not client.application._places._value)
    assert_busy(client.post("/caption", data=PNG), "too many images at the same time")
    assert client.get("/").status_code == 200
    captioner.may_end.set()
    for thread in threads:
        thread.join(20)
    assert [reply.status_code for reply in replies] == [200, 200]
    assert post(client, PNG)[0] == 200


@pytest.fixture
def reading(captioner, monkeypatch):
    """The sizes of the images that are being read, which ends when `may_end` is set."""
    sizes, may_end = [], threading.Event()

    def read(content):
        sizes.append(len(content))
        assert may_end.wait(20)
        sizes.remove(len(content))
        return load_image(content)

    monkeypatch.setattr(captioner, "load_image", read)
    yield types.SimpleNamespace(sizes=sizes, may_end=may_end)
    may_end.set()


def test_images_that_are_read_at_the_same_time_have_a_limit_together(captioner, reading):
    client, replies = make_client(captioner, max_megapixels=1), []
    large, small = draw_png(size=(600, 1000)), draw_png(size=(390, 1000))
    threads = [start_post(client, replies, image) for image in (large, large, small)]
    wait_until(lambda: sorted(reading.sizes) == sorted(map(len, (large, small))))
    threads[1].join(0.05)
    assert len(reading.sizes) == 2, "the other large one waits"
    reading.may_end.set()
    for thread in threads:
        thread.join(20)
    assert [reply.status_code for reply in replies] == [200] * 3


@pytest.mark.slow
def test_image_that_takes_too_long_is_given_up_but_keeps_its_room_until_it_is_read(captioner, reading):
    client = make_client(captioner, timeout=1, max_requests=2, max_megapixels=1)
    image = draw_png(size=(600, 1000))
    for count in (1, 2):
        assert_busy(client.post("/caption", data=image), "the image has no caption after 1 s")
        assert len(reading.sizes) == 1, count
    reading.may_end.set()
    wait_until(lambda: client.application._places._value == 2)
    assert post(client, image)[0] == 200


@pytest.mark.slow
def test_image_that_waits_too_long_for_others_is_told_to_come_again(captioner):
    client = make_client(captioner, timeout=1)
    captioner.may_end.clear()
    for _ in range(2):  # the one in work, and one that waits for it
        assert_busy(client.post("/caption", data=PNG), "the image has no caption after 1 s")
    captioner.may_end.set()
    assert post(client, PNG)[0] == 200
    assert len(captioner.batches) == 2, "what has been given up is not captioned"


# The log.


def test_log_has_a_line_for_each_request(client, capsys, monkeypatch):
    post(client, PNG, "?beam_size=2")
    client.get("/health")
    client.get("/%0aa")
    lines = capsys.readouterr().err.splitlines()
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["POST /caption 200", "GET /health 200", r"GET /\na 404"]
    assert all(0 <= float(line.split()[-2]) < 20 and line.endswith(" s") for line in lines)
    monkeypatch.setattr(Verbosity, "quiet", True)
    post(client, PNG)
    assert capsys.readouterr().err == ""


def test_fault_of_the_program_is_logged_and_not_told(client, captioner, capsys):
    captioner.error = RuntimeError("secret\nTraceback")
    assert post(client, PNG) == (500, {"error": "captioning failed; the server's log says why"})
    first, second = capsys.readouterr().err.splitlines()
    assert first == r"captioning failed: RuntimeError('secret\nTraceback')"
    assert second.startswith("POST /caption 500 ")
    captioner.error = None
    assert post(client, PNG)[0] == 200


# Real connections.


def ask(server, path="health", body=None):
    """Asks a real server; returns the JSON."""
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", body), timeout=20) as reply:
        return json.load(reply)


def raw_head(length):
    return f"POST /caption HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n".encode()


def send_raw(server, data):
    """Sends bytes as they are; returns what comes back until the server closes the connection."""
    with socket.create_connection(server.address, 20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.mark.slow
def test_clients_that_send_slowly_keep_no_others_waiting(captioner):
    with run_server(captioner, max_requests=1, timeout=1) as server, contextlib.ExitStack() as stack:
        connections = []
        for _ in range(20):  # more than there are threads
            connections.append(stack.enter_context(socket.create_connection(server.address, 20)))
            connections[-1].sendall(raw_head(len(PNG)) + PNG[:-1])
        assert ask(server, "caption", PNG)["caption"] == "a red image"
        connections[0].sendall(PNG[-1:])
        assert connections[0].recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
        assert connections[1].recv(1) == b"", "a silent connection is closed after the time"


@pytest.mark.slow
def test_body_that_drips_is_cut_off_and_one_that_has_sent_enough_is_not(captioner, monkeypatch):
    monkeypatch.setattr("beyond.serve.server.MIN_RATE", 100)
    body = PNG + bytes(1500)
    with run_server(captioner, timeout=1) as server, contextlib.ExitStack() as stack:
        drip, slow = (stack.enter_context(socket.create_connection(server.address, 20)) for _ in range(2))
        drip.sendall(raw_head(len(body)))
        slow.sendall(raw_head(len(body)) + body[:-200])
        with pytest.raises(ConnectionError):
            for position in range(-200, -1):
                time.sleep(0.1)
                slow.sendall(body[position : position + 1])
                drip.sendall(b"x")
        slow.sendall(body[position + 1 :])
        assert slow.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_large_body_is_refused_in_json_and_a_huge_one_at_once(captioner):
    with run_server(captioner, max_mb=1) as server:
        reply = send_raw(server, raw_head(1_500_000) + bytes(1_500_000))
        assert reply.startswith(b"HTTP/1.1 413 ") and reply.endswith(
            b'{"error": "expected at most 1 MB; a form holds one image and short values"}'
        )
        assert send_raw(server, raw_head(10**12)).startswith(b"HTTP/1.1 413 ")
        assert send_raw(server, raw_head("ten")).startswith(b"HTTP/1.1 400 ")
        assert ask(server)["status"] == "ok"


def test_listen_refuses_an_address_that_it_cannot_have():
    with listen(ServerConfig(port=0)) as listener:
        for host, port in (listener.getsockname(), ("no.such.host.invalid", 0), ("192.0.2.1", 0)):
            expected = f"cannot listen at {host}, port {port} .*; choose another --host or --port; --port 0 takes one"
            with pytest.raises(InputError, match=expected):
                listen(ServerConfig(host=host, port=port))


def test_server_listens_at_ipv6(captioner):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with run_server(captioner, host="::1") as server:
        assert server.url == f"http://[::1]:{server.address[1]}/"
        assert ask(server, "caption", PNG)["caption"] == "a red image"
