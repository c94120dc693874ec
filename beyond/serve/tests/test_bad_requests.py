"""Hundreds of requests that are wrong, each in its own way: each is refused in one line, and harms no other."""

import json
import random

from helpers.web import (
    FORM,
    FakeCaptioner,
    draw_png,
    form_part,
    make_form,
    parse_replies,
    post,
    raw_post,
    run_server,
    send_raw,
)

PNG = draw_png()
IMAGE_FORM = make_form(form_part("captions", b"2"), form_part("image", PNG))
LENGTHS = (len(PNG) + 1, len(PNG) - 40, 0, 10**12, "9" * 5000, "-5", "ten", "1 2", "\u00bd")
METHODS = ("get", "PATCH", "OPTIONS", "TRACE", "CONNECT", "G\x00T", "X" * 9000, "", "POST POST", "\u00e9")
VERSIONS = ("HTTP/9.9", "HTTP/0.8", "HTTP/1.x", "HTTP", "HTTP/1.1.1", "HTTP/\u00b2.0", "FTP/1.0")
PATHS = (
    "/../serve.py",
    "/..%2f..%2fetc/passwd",
    "/serve.html",
    "/web/serve.js",
    "//etc/passwd",
    "/viewer.js/",
    "/viewer.js\x00",
    "/%00",
    "/\u00ff",
    "http://localhost/",
    "*",
    "/[",
    "//[",
    "?",
    "/?" + "a" * 10_000,
    "/" + "a" * 100_000,
    "\\..\\beyond.serve",
)
HEADERS = (
    "no colon",
    ": no name",
    "X: " + "a" * 70_000,
    "\r\n".join(["X: y"] * 200),
    "\x00: \x01",
    "Host : localhost",
    "Host: localhost",
    "Content-Length: 3",
    "Transfer-Encoding: chunked",
    "Content-Encoding: br",
    "Content-Type: application/x-www-form-urlencoded",
    "Origin: null",
    "Expect: 200-ok\r\nOrigin: x",
)
CONTENT_TYPES = (
    "multipart/form-data",
    "multipart/form-data; boundary=",
    'multipart/form-data; boundary=""',
    "multipart/form-data; boundary=other",
    "multipart/form-data; boundary*0=a; boundary*x=b; boundary*=c",
    "multipart/form-data; boundary*=utf-8''%FF%00",
    "multipart/form-data; boundary*=no-such-charset'x'%FF",
    "multipart/form-data; boundary=\u00ff\u00fe",
    "multipart/form-data; boundary=" + "b" * 5000,
    "multipart/" + ";" * 3000,
)
VALUES = ("", "-1", "1.5", "1e9", "NaN", "%00", "%FF", "\u00e9", "9" * 400, "true", "[1]", "0x5", "1__0", "21")
QUERIES = ("&&", "=", "x=1", "beam_size=1&beam_size=2", "sample=2", "sample=1&beam_size=2", "top_p=0", "%", "a=1;b=2")


def bad_requests():
    """Yields the bytes of the requests."""
    good = raw_post(IMAGE_FORM, f"Content-Type: {FORM}")
    yield from (good[:end] for end in range(1, len(good) - 1, max(1, len(good) // 60)))  # cut off everywhere
    yield from (raw_post(PNG, length=length) for length in LENGTHS)
    yield from (f"{method} /caption HTTP/1.1\r\nHost: localhost\r\n\r\n".encode("latin-1") for method in METHODS)
    yield from (f"GET / {version}\r\n\r\n".encode("latin-1") for version in VERSIONS)
    for path in PATHS:
        yield f"GET {path} HTTP/1.1\r\n\r\n".encode("latin-1")
        yield f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc".encode("latin-1")
    yield from (raw_post(PNG, header) for header in HEADERS)
    yield from (raw_post(IMAGE_FORM, f"Content-Type: {content_type}") for content_type in CONTENT_TYPES)
    yield from (raw_post(PNG, query=f"?beam_size={value}") for value in VALUES)
    yield from (raw_post(PNG, query=f"?{query}") for query in QUERIES)
    yield from (b"\r\n", b"\n\n\n", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(200), b"\x00" * 100_000)
    yield from random_requests(random.Random(0))


def random_requests(chance):
    """Yields damaged forms, and noise."""
    for _ in range(30):
        body = bytearray(make_form(form_part("captions", b"2"), form_part("image", PNG[:40])))  # never an image
        for _ in range(chance.randrange(1, 9)):
            body[chance.randrange(len(body))] = chance.choice(b'\r\n\0-";:=\xff')
        yield raw_post(bytes(body), f"Content-Type: {FORM}")
        yield chance.randbytes(chance.randrange(1, 300))


def test_bad_requests_are_refused_in_one_line_and_harm_no_other(capsys):
    requests = list(bad_requests())
    assert len(requests) >= 200
    num_answers = 0
    with run_server(FakeCaptioner().service) as server:
        for number, data in enumerate(requests):
            for status, headers, content in parse_replies(send_raw(server, data)):
                assert 400 <= status < 500, (data[:200], status, content)
                assert headers["content-type"] == "application/json"
                [message] = json.loads(content).values()
                assert message and message.isprintable(), (data[:200], message)
                num_answers += 1
            if number % 20 == 0:
                assert post(server, PNG)[0] == 200, data[:200]
        assert post(server, PNG)[0] == 200
        assert server.slots._value == server.config.max_requests
    assert num_answers > 0.8 * len(requests)
    log = capsys.readouterr().err
    assert "Traceback" not in log and "failed" not in log and "ended" not in log
