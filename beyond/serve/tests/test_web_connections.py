"""The connections of the web server, with a captioner that needs no model: their times, their number, their log."""

import contextlib
import dataclasses
import json
import socket
import threading
import time

import pytest
from helpers.web import (
    FakeCaptioner,
    draw_png,
    load_image,
    parse_replies,
    post,
    raw_post,
    receive_all,
    request,
    run_server,
    send_raw,
)

from beyond.serve import web_server
from beyond.serve.web_server import CaptionServer, ServerConfig
from captioning.base.cli import InputError, Verbosity

pytestmark = pytest.mark.slow

PNG = draw_png()
GET = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"


@pytest.fixture
def captioner():
    return FakeCaptioner()


@pytest.fixture
def server(captioner):
    with run_server(captioner.service) as server:
        yield server


# Connections.


def test_connection_takes_several_requests(server):
    replies = parse_replies(send_raw(server, raw_post(PNG) + GET + b"\r\n" + raw_post(b"text") + raw_post(PNG)))
    assert [status for status, _, _ in replies] == [200, 200, 400, 200]
    assert all("connection" not in headers for _, headers, _ in replies)


def test_connection_ends_where_a_body_was_not_read(server):
    hidden = GET + b"\r\n"  # would be taken for a request
    for data in (
        GET + f"Content-Length: {len(hidden)}\r\n\r\n".encode() + hidden,
        raw_post(hidden, "Origin: http://example.com"),
        raw_post(hidden, "Content-Encoding: gzip"),
        raw_post(hidden).replace(b"/caption", b"/other"),
    ):
        [(_, headers, _)] = parse_replies(send_raw(server, data))
        assert headers["connection"] == "close"


def test_connection_ends_if_the_client_wants_it(server):
    [(status, headers, _)] = parse_replies(send_raw(server, GET + b"Connection: close\r\n\r\n", shut=False))
    assert (status, headers["connection"]) == (200, "close")
    [(status, _, _)] = parse_replies(send_raw(server, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", shut=False))
    assert status == 200


def test_client_that_asks_first_is_told_to_continue(server):
    for body, query, first in ((PNG, "", 100), (b"x" * 30_000_000, "", 413), (PNG, "/other", 404)):
        head = raw_post(body, "Expect: 100-continue", query=query)[: -len(body)]
        with socket.create_connection(server.server_address[:2], 20) as connection:
            connection.sendall(head)
            status = int(connection.recv(1 << 16).split()[1])
            assert status == first
            if status == 100:
                connection.sendall(body)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_body_that_drips_in_is_refused_after_the_time(captioner):
    with run_server(captioner.service, timeout=0.4) as server:
        start = time.perf_counter()
        with socket.create_connection(server.server_address[:2], 20) as connection:
            connection.sendall(raw_post(PNG, length=100_000))
            connection.settimeout(0.1)
            with contextlib.suppress(OSError):
                while time.perf_counter() - start < 5:  # each byte comes in time, the whole does not
                    connection.sendall(b"x")
                    with contextlib.suppress(TimeoutError):
                        data = connection.recv(1 << 16)
                        break
            connection.settimeout(20)
            data += receive_all(connection)
        [(status, headers, content)] = parse_replies(data)
        assert (status, headers["connection"]) == (408, "close")
        assert json.loads(content) == {"error": "the request did not arrive within 0.4 s"}
        assert 0.3 < time.perf_counter() - start < 2
        assert post(server, PNG)[0] == 200


def test_headers_that_do_not_end_are_refused_after_the_time(captioner):
    with run_server(captioner.service, timeout=0.2) as server:
        [(status, _, _)] = parse_replies(send_raw(server, GET, shut=False))
        assert status == 408


def test_connection_without_a_request_is_closed_after_the_time(captioner, capsys):
    with run_server(captioner.service, timeout=0.2) as server:
        assert send_raw(server, b"", shut=False) == b""
        [(status, _, _)] = parse_replies(send_raw(server, GET + b"\r\n", shut=False))
        assert status == 200
        lines = read_log(capsys, 1)
    assert [line.rsplit(" ", 2)[0] for line in lines] == ["GET /health 200"]


def test_time_of_a_request_begins_with_its_first_byte(captioner):
    with (
        run_server(captioner.service, timeout=0.6) as server,
        socket.create_connection(server.server_address[:2], 20) as connection,
    ):
        time.sleep(0.4)
        connection.sendall(GET[:5])
        time.sleep(0.4)
        connection.sendall(GET[5:] + b"\r\n")
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")


def test_truncated_body_is_refused(server):
    [(status, _, content)] = parse_replies(send_raw(server, raw_post(PNG, length=len(PNG) + 5)))
    assert status == 400
    assert json.loads(content)["error"] == f"expected {len(PNG) + 5} bytes, received {len(PNG)}"


def test_client_that_is_gone_leaves_one_line(server, captioner, capsys):
    captioner.may_end.clear()
    connection = socket.create_connection(server.server_address[:2], 20)
    connection.sendall(raw_post(PNG))
    assert captioner.begun.wait(20)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # closes with a reset
    connection.close()
    time.sleep(0.05)
    captioner.may_end.set()
    (line,) = read_log(capsys, 1)
    assert line.startswith("a connection has ended: ")
    assert post(server, PNG)[0] == 200
    (line,) = read_log(capsys, 1)
    assert line.startswith("POST /caption 200 ")


# Many clients.


def post_in_threads(server, count, query=""):
    """Starts so many threads that post an image; returns them, and the list that their statuses come into."""
    statuses = []
    threads = [
        threading.Thread(target=lambda: statuses.append(post(server, PNG, query)[0]), daemon=True) for _ in range(count)
    ]
    for thread in threads:
        thread.start()
    return threads, statuses


def test_too_many_requests_are_told_to_come_again(captioner):
    with run_server(captioner.service, max_requests=2) as server:
        captioner.may_end.clear()
        threads, statuses = post_in_threads(server, 2)
        assert captioner.begun.wait(20)
        while server.slots._value:
            time.sleep(0.001)
        status, headers, value = request(server, "POST", "/caption", PNG)
        assert (status, headers["Retry-After"]) == (503, "1")
        assert value == {"error": "too many requests at the same time; try again in a moment"}
        assert request(server, "GET", "/")[0] == 200
        captioner.may_end.set()
        for thread in threads:
            thread.join(20)
        assert statuses == [200, 200]
        for body in (PNG, b"text", b"", bytes(20_000_001)) * 2:  # a request that is refused leaves its place
            post(server, body)
        assert post(server, PNG)[0] == 200


def test_too_many_connections_are_closed(captioner, monkeypatch):
    monkeypatch.setattr(web_server, "MAX_CONNECTIONS", 1)
    with run_server(captioner.service, max_requests=1) as server:
        with contextlib.ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(socket.create_connection(server.server_address[:2], 20))
            assert send_raw(server, GET + b"\r\n") == b""
        deadline = time.monotonic() + 20
        while not send_raw(server, GET + b"\r\n") and time.monotonic() < deadline:
            time.sleep(0.01)  # until the server has seen that the others are closed
        assert time.monotonic() < deadline


def test_requests_that_wait_are_captioned_together(server, captioner):
    captioner.may_end.clear()
    threads, statuses = post_in_threads(server, 1)
    assert captioner.begun.wait(20)
    others, other_statuses = post_in_threads(server, 3)
    while len(server.batcher._waiting) < 3:
        time.sleep(0.001)
    captioner.may_end.set()
    for thread in threads + others:
        thread.join(20)
    assert statuses + other_statuses == [200] * 4
    assert [count for count, _ in captioner.batches] == [1, 3]


def test_no_more_images_are_decoded_at_the_same_time_than_there_are_cores(captioner, monkeypatch):
    monkeypatch.setattr(web_server, "count_cores", lambda: 2)
    active, most = [], []

    def load_slowly(content):
        active.append(1)
        most.append(len(active))
        time.sleep(0.02)
        active.pop()
        return load_image(content)

    service = dataclasses.replace(captioner.service, load_image=load_slowly)
    with run_server(service) as server:
        threads, statuses = post_in_threads(server, 6)
        for thread in threads:
            thread.join(20)
    assert statuses == [200] * 6
    assert max(most) == 2


# The log.


def read_log(capsys, num_lines):
    """Returns the lines of the log, once it has so many: a request has its line after its answer."""
    text, deadline = "", time.monotonic() + 20
    while len(text.splitlines()) < num_lines and time.monotonic() < deadline:
        text += capsys.readouterr().err
        time.sleep(0.001)
    return text.splitlines()


def test_log_has_a_line_for_each_request(server, capsys, monkeypatch):
    lines = []  # each is awaited before the next request, since it follows its answer and connections have own threads
    post(server, PNG, "?beam_size=2")
    lines += read_log(capsys, 1)
    request(server, "GET", "/health")
    lines += read_log(capsys, 1)
    send_raw(server, b"GET /%0aa\x7fb HTTP/1.1\r\nHost: localhost\r\n\r\n")
    lines += read_log(capsys, 1)
    send_raw(server, b"\x00\x01\r\n\r\n")
    lines += read_log(capsys, 1)
    assert [line.rsplit(" ", 2)[0] for line in lines] == [
        "POST /caption 200",
        "GET /health 200",
        "GET /%0aa\\x7fb 404",
        "(no request)  400",
    ]
    assert all(0 <= float(line.split()[-2]) < 20 and line.endswith(" s") for line in lines)
    monkeypatch.setattr(Verbosity, "quiet", True)
    post(server, PNG)
    assert capsys.readouterr().err == ""


def test_fault_of_the_program_is_logged_and_not_told(server, captioner, capsys):
    captioner.error = RuntimeError("secret\nTraceback")
    status, value = post(server, PNG)
    assert (status, value) == (500, {"error": "captioning failed; the server's log says why"})
    first, second = read_log(capsys, 2)
    assert first == r"POST failed: RuntimeError('secret\nTraceback')"
    assert second.startswith("POST /caption 500 ")
    captioner.error = None
    assert post(server, PNG)[0] == 200


# The address.


def test_server_refuses_a_port_in_use(server, all_options):
    port = server.server_address[1]
    with pytest.raises(InputError) as error:
        CaptionServer(ServerConfig(port=port))
    assert str(error.value) == (
        f"cannot listen at 127.0.0.1, port {port} (Address already in use); choose another --port, or --port 0 for one "
        "that is free"
    )


@pytest.mark.parametrize("host", ["no.such.host.invalid", "192.0.2.1", "1:2"])
def test_server_refuses_an_address_that_is_not_of_this_machine(host):
    with pytest.raises(InputError, match=f"^cannot listen at {host}, port 0 "):
        CaptionServer(ServerConfig(host=host, port=0))


def test_server_listens_at_ipv6(captioner):
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    with run_server(captioner.service, host="::1") as server:
        assert server.url == f"http://[::1]:{server.server_address[1]}/"
        assert post(server, PNG)[0] == 200


def test_url_is_that_of_the_page(server):
    assert server.url == f"http://127.0.0.1:{server.server_address[1]}/"
