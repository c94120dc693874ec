"""The application, with a captioner that needs no model and without sockets; and a few tests through real ones."""

import io
import json
import math
import socket
import threading
import urllib.request

import pytest
from helpers.web import FakeCaptioner, caption_pixels, draw_png, load_image, make_client, post, run_server, wait_until
from PIL import Image

from beyond.serve.server import FILES, declared_pixels, listen
from beyond.serve.settings import ServerConfig
from captioning.base.cli import InputError, Verbosity
from captioning.config.settings import DecodeConfig

PNG = draw_png()
FORM = "multipart/form-data; boundary=b"


@pytest.fixture
def captioner():
    return FakeCaptioner()


@pytest.fixture
def client(captioner):
    return make_client(captioner.service)


def image_file(content=PNG, name="a.png"):
    return io.BytesIO(content), name


# The page.


@pytest.mark.parametrize("path", FILES)
def test_files_of_the_page(client, path):
    file, content_type = FILES[path]
    reply = client.get(path)
    assert (reply.status_code, reply.content_type, reply.data) == (200, content_type, file.read_bytes())
    assert reply.headers["Cache-Control"] == "no-cache"
    assert reply.headers["X-Content-Type-Options"] == "nosniff"
    assert reply.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'self'; ")
    head = client.head(path)
    assert (head.status_code, head.data, head.content_length) == (200, b"", len(reply.data))


def test_page_needs_nothing_but_files_beside_it():
    page = FILES["/"][0].read_text(encoding="utf-8")
    links = [part.split('"')[0] for part in page.split('src="')[1:] + page.split('href="')[1:]]
    assert {f"/{link}" for link in links} == FILES.keys() - {"/"} | {"/data:,"}


def test_health_says_what_the_page_needs(captioner):
    reply = make_client(captioner.service, max_mb=3).get("/health")
    assert (reply.status_code, reply.headers["Cache-Control"]) == (200, "no-store")
    facts = {"status": "ok", "run": "small", "max_bytes": 3_000_000, "defaults": DecodeConfig().to_json()}
    assert reply.json == facts


# Captions.


@pytest.mark.parametrize(
    "content_type", ["image/png", "text/plain", "application/x-www-form-urlencoded", "nonsense", ""]
)
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
    client = make_client(captioner.service)
    post(client, PNG)
    post(client, PNG, "?no_repeat=false")
    configs = [config for _, config in captioner.batches]
    assert configs == [DecodeConfig(beam_size=5, no_repeat=True), DecodeConfig(beam_size=5)]


# Refusals.


def image_of(mode, size):
    file = io.BytesIO()
    Image.new(mode, size).save(file, "TIFF")
    return file.getvalue()


@pytest.mark.parametrize(
    ("body", "query", "message"),
    [
        (b"", "", "expected an image, found an empty one"),
        (b"some text", "", "not an image that can be read"),
        (PNG[:30], "", "not an image that can be read"),
        (PNG, "?beam_size=0", "beam_size: expected a whole number of at least 1, found '0'"),
        (PNG, "?beam_size=21", "beam_size: expected at most 20 of this server, found 21"),
        (PNG, "?beam_size", "beam_size: expected a whole number of at least 1, found ''"),
        (PNG, "?size=1", "'size' is no parameter; expected beam_size, "),
        (PNG, "?beam_size=%00%FF%0A", "beam_size: expected a whole number of at least 1, found "),
        ({"photo": image_file()}, "", "expected one file with the name image in the form, found 0"),
        ({"image": "no file"}, "", "expected one file with the name image in the form, found 0"),
        ({"image": [image_file(), image_file()]}, "", "expected one file with the name image in the form, found 2"),
        ({"image": image_file(b"")}, "", "expected an image, found an empty one"),
        ({"image": image_file(), "size": "1"}, "", "'size' is no parameter"),
        ({"image": image_file(), "captions": "2"}, "?captions=2", "captions: expected one value, found two"),
    ],
)
def test_caption_refuses_in_one_line(captioner, body, query, message):
    client = make_client(captioner.service, max_requests=1)
    status, value = post(client, body, query)
    assert (status, list(value)) == (400, ["error"])
    assert message in value["error"] and value["error"].isprintable()
    assert not captioner.batches
    assert post(client, PNG)[0] == 200  # the place is free again


@pytest.mark.parametrize("content_type", ["multipart/form-data", FORM, "multipart/form-data; boundary=\u00ff"])
@pytest.mark.parametrize("body", [b"", b"--b", b"--b\r\n\r\nx\r\n--b--", b"--b\r\nContent-Disposition: x\r\n\r\n"])
def test_caption_refuses_damaged_forms(client, content_type, body):
    status, value = post(client, body, content_type=content_type)
    assert (status, value) == (400, {"error": "expected one file with the name image in the form, found 0"})


def test_caption_refuses_large_bodies(captioner):
    client = make_client(captioner.service, max_mb=1)
    assert post(client, bytes(1_000_000))[1]["error"].startswith("the image: not an image")
    message = {"error": "expected at most 1 MB; a form holds one image and short values"}
    assert post(client, bytes(1_000_001)) == (413, message)
    assert post(client, {"image": image_file(bytes(1_000_000))}) == (413, message)
    assert post(client, {"image": image_file(), "captions": "2" * 300_000}) == (413, message)
    assert post(client, {"image": image_file()} | {f"field{i}": "1" for i in range(20)}) == (413, message)


def test_other_paths_and_methods_are_refused(client):
    for path in ("/model.py", "/serve.html", "/../serve.py", "/%2e%2e/etc/passwd", "/viewer.js/"):
        reply = client.get(path)
        assert (reply.status_code, reply.json) == (404, {"error": "no such page; expected /, /health or /caption"})
        assert reply.headers["X-Content-Type-Options"] == "nosniff"
    for method, path, allowed in [
        ("GET", "/caption", "POST"),
        ("PUT", "/caption", "POST"),
        ("POST", "/", "GET, HEAD"),
        ("NONSENSE", "/viewer.js", "GET, HEAD"),
    ]:
        reply = client.open(path, method=method)
        assert (reply.status_code, reply.headers["Allow"]) == (405, allowed), (method, path)
        assert reply.json["error"] == f"expected {allowed.replace(', ', ' or ')}, found {method!r}"


# Who may ask.


def status_for(client, host, origin=None):
    headers = {"Host": host} | ({} if origin is None else {"Origin": origin})
    return client.get("/health", headers=headers).status_code


def test_only_loopback_names_are_answered(client):
    for host in ("localhost", "localhost:8000", "LOCALHOST", "127.0.0.1", "127.1.2.3:80", "[::1]", "[::1]:8000"):
        assert status_for(client, host) == 200, host
    for host in ("example.com", "localhost.example.com", "192.168.0.1:8000", "", "localhost:x", "localhost, a.com"):
        assert status_for(client, host) == 403, host
    error = client.get("/health", headers={"Host": "example.com:8000"}).json["error"]
    assert error == (
        "expected a request to localhost or 127.0.0.1, found one to 'example.com:8000'; if a proxy shows this page "
        "there, start the server with --trusted-hosts and that name"
    )


def test_posts_of_other_pages_are_refused(client):
    assert status_for(client, "localhost:8000", "http://localhost:8000") == 200
    for origin in ("http://example.com", "null", "http://localhost:1", "http://localhost:8000.example.com", ""):
        status, value = post(client, PNG, Host="localhost:8000", Origin=origin)
        assert (status, value["error"][:45]) == (403, "expected a request of this server's page, fou"), origin


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_names_of_a_proxy_are_trusted_where_the_user_says_so(captioner, host):
    client = make_client(captioner.service, host=host, trusted_hosts="hub.example.com,.b.org")
    assert status_for(client, "hub.example.com", "https://hub.example.com") == 200
    assert status_for(client, "a.b.org:443", "https://a.b.org") == 200  # the proxy added the port
    assert status_for(client, "localhost:8000", "https://hub.example.com") == 200  # it changed the name
    assert status_for(client, "localhost:8000") == 200
    for host, origin in [
        ("example.com", None),
        ("x.hub.example.com", None),
        ("hub.example.com", "https://example.com"),
        ("hub.example.com", "null"),
        ("localhost:8000", "http://localhost:1"),
    ]:
        assert status_for(client, host, origin) == 403, (host, origin)


def test_server_of_other_machines_answers_any_name(captioner):
    client = make_client(captioner.service, host="0.0.0.0")
    assert status_for(client, "my-machine.local:8000", "http://my-machine.local:8000") == 200
    assert status_for(client, "my-machine", "http://example.com") == 403


# Many clients.


@pytest.fixture
def start_posts():
    """Gives a function that posts images in threads and returns the list that their answers come into."""
    threads = []

    def start(client, bodies, query=""):
        replies = []
        for body in bodies:
            target = lambda body=body: replies.append(client.post(f"/caption{query}", data=body))  # noqa: E731
            threads.append(threading.Thread(target=target, daemon=True))
            threads[-1].start()
        return replies

    start.join = lambda: [thread.join(20) for thread in threads]
    return start


def assert_busy(reply, message):
    assert (reply.status_code, reply.headers["Retry-After"]) == (503, "1")
    assert reply.json == {"error": f"{message}; try again in a moment"}


def test_more_images_than_the_server_takes_are_told_to_come_again(captioner, start_posts):
    client = make_client(captioner.service, max_requests=2)
    captioner.may_end.clear()
    replies = start_posts(client, [PNG, PNG])
    wait_until(lambda: client.application._num_images == 2)
    assert_busy(client.post("/caption", data=PNG), "too many or too large images at the same time")
    assert client.get("/").status_code == 200
    captioner.may_end.set()
    start_posts.join()
    assert [reply.status_code for reply in replies] == [200, 200]
    assert post(client, PNG)[0] == 200


def test_images_in_work_have_a_limited_number_of_pixels(captioner, start_posts):
    client = make_client(captioner.service, max_megapixels=1)
    captioner.may_end.clear()
    replies = start_posts(client, [draw_png(size=(1000, 999))])
    assert captioner.begun.wait(20)
    busy = "too many or too large images at the same time"
    assert_busy(client.post("/caption", data=draw_png(size=(1001, 1001))), busy)  # refused before it is decoded
    assert_busy(client.post("/caption", data=b"of unknown size"), busy)
    more_replies = start_posts(client, [PNG])
    captioner.may_end.set()
    start_posts.join()
    assert [reply.status_code for reply in replies + more_replies] == [200, 200]
    assert post(client, draw_png(size=(1001, 1001)))[0] == 200
    assert post(client, draw_png(size=(1500, 1500)))[0] == 200  # alone, load_image decides
    assert client.application._num_pixels == 0


def test_declared_pixels():
    assert declared_pixels(draw_png(size=(20, 10))) == 200
    assert declared_pixels(image_of("I;16", (20, 10))) == declared_pixels(image_of("F", (20, 10))) == 400
    assert declared_pixels(b"text") == math.inf


def test_image_that_waits_too_long_is_told_to_come_again(captioner, start_posts):
    client = make_client(captioner.service, timeout=1)
    captioner.may_end.clear()
    replies = start_posts(client, [PNG])
    assert captioner.begun.wait(20)
    assert_busy(client.post("/caption", data=PNG), "the image has waited 1 s for others")
    captioner.may_end.set()
    start_posts.join()
    assert replies[0].status_code == 200, "an image in work is not given up"


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
    assert first == r"POST failed: RuntimeError('secret\nTraceback')"
    assert second.startswith("POST /caption 500 ")
    captioner.error = None
    assert post(client, PNG)[0] == 200


# Real connections.


def ask(server, path="health", body=None):
    """Asks a real server; returns the JSON."""
    with urllib.request.urlopen(urllib.request.Request(f"{server.url}{path}", body), timeout=20) as reply:
        return json.load(reply)


def raw_head(length, *headers):
    lines = ["POST /caption HTTP/1.1", "Host: localhost", f"Content-Length: {length}", *headers, "", ""]
    return "\r\n".join(lines).encode()


def send_raw(server, data):
    """Sends bytes as they are; returns what comes back until the server closes the connection."""
    with socket.create_connection(server.address, 20) as connection:
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(1 << 16), b""))


@pytest.fixture
def connections():
    """A list of connections, which are closed after the test."""
    connections = []
    yield connections
    for connection in connections:
        connection.close()


def test_clients_that_send_slowly_keep_no_others_waiting(captioner, connections):
    with run_server(captioner.service, max_requests=1, timeout=1) as server:
        for _ in range(20):  # more than there are threads
            connections.append(socket.create_connection(server.address, 20))
            connections[-1].sendall(raw_head(len(PNG)) + PNG[:-1])
        assert ask(server, "caption", PNG)["caption"] == "a red image"
        connections[0].sendall(PNG[-1:])
        assert connections[0].recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
        assert connections[1].recv(1) == b"", "a silent connection is closed after the time"


def test_requests_that_wait_are_captioned_together(captioner):
    with run_server(captioner.service) as server:
        captioner.may_end.clear()
        threads = [threading.Thread(target=ask, args=[server, "caption", PNG], daemon=True) for _ in range(4)]
        threads[0].start()
        assert captioner.begun.wait(20)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: len(server.app.batcher._waiting) == 3)
        captioner.may_end.set()
        for thread in threads:
            thread.join(20)
    assert [count for count, _ in captioner.batches] == [1, 3]


def test_large_body_is_refused_in_json_and_a_huge_one_at_once(captioner):
    with run_server(captioner.service, max_mb=1) as server:
        reply = send_raw(server, raw_head(1_500_000) + bytes(1_500_000))
        assert reply.startswith(b"HTTP/1.1 413 ") and reply.endswith(
            b'{"error": "expected at most 1 MB; a form holds one image and short values"}'
        )
        assert send_raw(server, raw_head(10**12)).startswith(b"HTTP/1.1 413 ")
        assert send_raw(server, raw_head("ten")).startswith(b"HTTP/1.1 400 ")
        assert ask(server)["status"] == "ok"


def test_client_that_is_gone_is_no_news(captioner, caplog):
    with run_server(captioner.service) as server:
        captioner.may_end.clear()
        with socket.create_connection(server.address, 20) as connection:
            connection.sendall(raw_head(len(PNG)) + PNG)
            assert captioner.begun.wait(20)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
        captioner.may_end.set()
        wait_until(lambda: not server.server.active_channels)
        assert ask(server, "caption", PNG)["caption"] == "a red image"
    assert not caplog.records


def test_more_connections_than_the_server_takes_wait(captioner, connections):
    with run_server(captioner.service, max_requests=1, timeout=1) as server:
        for _ in range(80):
            connections.append(socket.create_connection(server.address, 20))
        assert ask(server)["status"] == "ok"  # once the silent ones are closed


def test_port_in_use_is_refused(all_options):
    with listen(ServerConfig(port=0)) as listener, pytest.raises(InputError) as error:
        port = listener.getsockname()[1]
        listen(ServerConfig(port=port))
    assert str(error.value) == (
        f"cannot listen at 127.0.0.1, port {port} (Address already in use); choose another --port, or --port 0 for one "
        "that is free"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "1:2"])
def test_address_that_is_not_of_this_machine_is_refused(host):
    with pytest.raises(InputError, match=f"^cannot listen at {host}, port 0 "):
        listen(ServerConfig(host=host, port=0))


def test_server_listens_at_ipv6(captioner):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with run_server(captioner.service, host="::1") as server:
        assert server.url == f"http://[::1]:{server.address[1]}/"
        assert ask(server, "caption", PNG)["caption"] == "a red image"
