"""A small web server that captions images: a page for people, and POST /caption for programs.

    with CaptionServer(ServerConfig(port=0)) as server:
        server.run(Service("coco", DecodeConfig(), load_image, caption_batch))

It is meant for one machine: Python's http.server with a thread for each connection. It listens on the loopback
interface unless told otherwise, and then answers only requests that were sent to a loopback name, so that a page of
the internet whose name was made to lead here (DNS rebinding) cannot use it; nor may other pages post images.
"""

import contextlib
import dataclasses
import email.errors
import errno
import http.server
import io
import ipaddress
import json
import os
import re
import socket
import socketserver
import sys
import threading
import time
from collections.abc import Mapping
from http import HTTPStatus
from pathlib import Path
from typing import Any, NamedTuple

from beyond.report.report import WEB as VIEWER_DIR
from beyond.serve.caption_batcher import Batcher, Service
from beyond.serve.web_forms import header_parameter, parse_decoding, parse_form, parse_query
from captioning.base.cli import InputError, advise, log
from captioning.config.options import Settings, option
from captioning.images.reading import count_cores

WEB_DIRS = {"serve": Path(__file__).parent / "web", "viewer": VIEWER_DIR}  # by the first word of a file's name
FILES = {  # what is served, and nothing else: the file and the type of each path
    "/": ("serve.html", "text/html; charset=utf-8"),
    "/serve.css": ("serve.css", "text/css; charset=utf-8"),
    "/serve.js": ("serve.js", "text/javascript; charset=utf-8"),
    "/viewer.css": ("viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": ("viewer.js", "text/javascript; charset=utf-8"),
}
SAFE_HEADERS = {  # of every answer: a page that loads only what this server has, and is shown in no other page
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
# What the parser of headers passes over; of forms it also finds that their bodies are missing, which come later.
HEADER_DEFECTS = (
    email.errors.FirstHeaderLineIsContinuationDefect,
    email.errors.InvalidHeaderDefect,
    email.errors.MisplacedEnvelopeHeaderDefect,
    email.errors.MissingHeaderBodySeparatorDefect,
)
MAX_LINE_BYTES = 8192  # of a request's first line
MAX_CONNECTIONS = 64  # each has a thread
DRAIN_SECONDS = 5  # in which a client that is refused can finish sending, before the connection is cut
RETRY_SECONDS = 1  # after which a client that came too early is asked to come again


@dataclasses.dataclass(frozen=True)
class ServerConfig(Settings):
    """Where the server listens, and what a client may ask of it."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; any other than the default lets other machines in, such as 0.0.0.0",
        metavar="ADDRESS",
    )
    port: int = option(8000, "port to listen on; 0: one that is free", minimum=0, maximum=65535)
    max_mb: int = option(20, "largest request, in millions of bytes", minimum=1, maximum=1000)
    max_requests: int = option(
        8, "images in work at the same time; who sends another is asked to try again", minimum=1, maximum=1000
    )
    timeout: float = option(30.0, "seconds in which a request must have arrived", above=0, maximum=3600)

    @property
    def max_bytes(self) -> int:
        """The largest body of a request, in bytes."""
        return self.max_mb * 1_000_000


class Reply(NamedTuple):
    """An answer."""

    status: int
    content: bytes
    content_type: str = "application/json"
    headers: Mapping[str, str] = {}


def json_reply(
    value: Mapping[str, Any], status: int = HTTPStatus.OK, headers: Mapping[str, str] | None = None
) -> Reply:
    """Makes an answer of JSON, which nobody keeps."""
    return Reply(status, json.dumps(value).encode(), headers={"Cache-Control": "no-store", **(headers or {})})


class Refusal(Exception):
    """A request that is not answered as it wishes: the status, and one line that says what was expected."""

    def __init__(self, status: int, message: str, headers: Mapping[str, str] | None = None):
        super().__init__(message)
        self.reply = json_reply({"error": " ".join(message.split())}, status, headers)


def is_loopback(host: str) -> bool:
    """Tells whether a name or address means this machine only: localhost, 127.0.0.1, ::1 or [::1]."""
    try:
        return host.lower() == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


# HTTP.


class _DeadlineReader(io.RawIOBase):
    """Reads from a connection until a deadline, however slowly the bytes drip in; then raises TimeoutError."""

    def __init__(self, connection: socket.socket):
        self._connection = connection
        self._deadline = 0.0

    def set_deadline(self, seconds: float) -> None:
        """Sets the time from now on in which bytes are read."""
        self._deadline = time.monotonic() + seconds

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if (remaining := self._deadline - time.monotonic()) <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers the requests of one connection."""

    server: "CaptionServer"
    rfile: io.BufferedReader
    protocol_version = "HTTP/1.1"  # a connection may have several requests
    default_request_version = "HTTP/1.0"  # so that what is no request is answered with a status line, too
    disable_nagle_algorithm = True  # the head and the content of an answer are written one after the other

    def setup(self) -> None:
        super().setup()
        self.reader = _DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self.reader)

    def handle_one_request(self) -> None:
        """Reads and answers a request; what fails has its answer, too, and a line in the log."""
        self.command, self.path, self.request_version = "", "", self.default_request_version
        self.close_connection = self.is_unread = True
        config = self.server.config
        try:
            self.reader.set_deadline(config.timeout)
            if not self.rfile.peek(1):  # the client has closed the connection
                return
        except (ConnectionError, TimeoutError):  # or has nothing more to ask
            return
        start = time.perf_counter()
        self.reader.set_deadline(config.timeout)
        reply = self._make_reply()
        self._send(reply)
        path = self.path.partition("?")[0][:80].encode("unicode_escape").decode()  # no line ends in the log
        log(f"{self.command or '(no request)'} {path} {reply.status} {time.perf_counter() - start:.2f} s")

    def _make_reply(self) -> Reply:
        """Reads a request and makes its answer; raises ConnectionError if the client is gone."""
        try:
            self._read_head()
            self._check_source()
            return self._route()
        except Refusal as refusal:
            return refusal.reply
        except InputError as error:
            return Refusal(HTTPStatus.BAD_REQUEST, str(error)).reply
        except TimeoutError:
            text = f"the request did not arrive within {self.server.config.timeout:g} s"
            return Refusal(HTTPStatus.REQUEST_TIMEOUT, text).reply
        except ConnectionError:
            raise
        except Exception as error:  # a fault of this program, which is not the client's business
            log(f"{self.command} failed: {' '.join(repr(error).split())[:300]}", error=True)
            return Refusal(HTTPStatus.INTERNAL_SERVER_ERROR, "captioning failed; the server's log says why").reply

    def _read_head(self) -> None:
        """Reads the first line of a request and its headers; raises Refusal if they are none."""
        self.raw_requestline = self.rfile.readline(MAX_LINE_BYTES + 1)
        if len(self.raw_requestline) > MAX_LINE_BYTES:
            raise Refusal(HTTPStatus.REQUEST_URI_TOO_LONG, f"expected an address of at most {MAX_LINE_BYTES} bytes")
        try:
            if not self.parse_request():
                raise Refusal(HTTPStatus.BAD_REQUEST, "expected an HTTP request, found an empty line")
        except (LookupError, TypeError, ValueError):  # of the parser of headers, in damaged ones
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected headers of the form `Name: value`") from None
        has_body = "Content-Length" in self.headers or "Transfer-Encoding" in self.headers
        self.is_unread = has_body or self.command not in ("GET", "HEAD")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Refuses what http.server finds wrong with a request, such as a version of HTTP that it does not know."""
        status = code if code < HTTPStatus.INTERNAL_SERVER_ERROR else HTTPStatus.BAD_REQUEST
        raise Refusal(status, f"not an HTTP request: {message or HTTPStatus(code).phrase}"[:200])

    def handle_expect_100(self) -> bool:
        """Leaves `100 Continue` to `_read_body`, after all checks."""
        return True

    def log_message(self, *_: Any) -> None:
        """Logs nothing: `handle_one_request` does."""

    def _check_source(self) -> None:
        """Raises Refusal if a request is not well formed, or comes from a page that is not this server's."""
        hosts = self.headers.get_all("Host", [])
        is_damaged = any(isinstance(defect, HEADER_DEFECTS) for defect in self.headers.defects)
        if is_damaged or len(hosts) != 1:
            raise Refusal(HTTPStatus.BAD_REQUEST, "expected headers of the form `Name: value`, one of them Host")
        host = hosts[0].strip().lower()
        if is_loopback(self.server.config.host) and not is_loopback(re.sub(r":\d*$", "", host)):
            raise Refusal(
                HTTPStatus.FORBIDDEN, f"expected a request to localhost or 127.0.0.1, found one to {host[:60]!r}"
            )
        origin = self.headers.get("Origin")
        if origin is not None and origin.lower().partition("://")[2] != host:
            raise Refusal(
                HTTPStatus.FORBIDDEN, f"expected a request of this server's page, found one of {origin[:60]!r}"
            )

    def _route(self) -> Reply:
        """Answers a request whose headers are right."""
        path, _, query = self.path.partition("?")
        is_page = path in FILES or path == "/health"
        if not is_page and path != "/caption":
            raise Refusal(HTTPStatus.NOT_FOUND, "no such page; expected /, /health or /caption")
        allowed = ("GET", "HEAD") if is_page else ("POST",)
        if self.command not in allowed:
            text = f"expected {' or '.join(allowed)}, found {self.command[:20]!r}"
            raise Refusal(HTTPStatus.METHOD_NOT_ALLOWED, text, {"Allow": ", ".join(allowed)})
        if path == "/caption":
            return self._caption(query)
        return self.server.files[path] if path in FILES else self.server.health()

    def _caption(self, query: str) -> Reply:
        """Captions the image of a request."""
        server = self.server
        content_type, num_bytes = self._check_body()
        if not server.slots.acquire(blocking=False):
            text = "too many requests at the same time; try again in a moment"
            raise Refusal(HTTPStatus.SERVICE_UNAVAILABLE, text, {"Retry-After": str(RETRY_SECONDS)})
        try:
            body = self._read_body(num_bytes)
            start = time.perf_counter()
            pairs = parse_query(query)
            if content_type == "multipart/form-data":
                body, further_pairs = parse_form(header_parameter(self.headers["Content-Type"], "boundary"), body)
                pairs += further_pairs
            config = parse_decoding(pairs, server.service.defaults)
            if not body:
                raise InputError("expected an image, found an empty one")
            with server.decoders:
                pixels = server.service.load_image(body)
            caption = server.batcher.caption(pixels, config)
            seconds = round(time.perf_counter() - start, 3)
            return json_reply(caption.to_json(with_attention=True) | {"seconds": seconds})
        finally:
            server.slots.release()

    def _check_body(self) -> tuple[str, int]:
        """Returns the type and the length of the body that a request announces; raises Refusal if it is not taken."""
        lengths = set(self.headers.get_all("Content-Length", []))
        if not lengths or "Transfer-Encoding" in self.headers:
            raise Refusal(HTTPStatus.LENGTH_REQUIRED, "expected an image, and its length in the header Content-Length")
        text = lengths.pop().strip()
        if lengths or not re.fullmatch("[0-9]+", text):
            raise Refusal(HTTPStatus.BAD_REQUEST, f"Content-Length: expected one whole number, found {text[:60]!r}")
        if len(text) > 18 or int(text) > self.server.config.max_bytes:
            limit = self.server.config.max_mb
            raise Refusal(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"expected at most {limit} MB, found {text[:20]} bytes")
        kind = self.headers.get_content_type()
        is_form = kind.startswith("multipart/") or kind == "application/x-www-form-urlencoded"
        if (is_form and kind != "multipart/form-data") or "Content-Encoding" in self.headers:
            raise Refusal(
                HTTPStatus.UNSUPPORTED_MEDIA_TYPE,
                "expected the bytes of an image with a Content-Type such as image/jpeg, or multipart/form-data; with "
                "curl: -H 'Content-Type: image/jpeg' --data-binary @photo.jpg, or -F image=@photo.jpg",
            )
        return kind, int(text)

    def _read_body(self, num_bytes: int) -> bytes:
        """Reads the body of a request; raises Refusal if it is cut off."""
        if self.headers.get("Expect", "").lower() == "100-continue":
            self.send_response_only(HTTPStatus.CONTINUE)
            self.end_headers()
        body = self.rfile.read(num_bytes)
        if len(body) < num_bytes:
            raise Refusal(HTTPStatus.BAD_REQUEST, f"expected {num_bytes:,} bytes, received {len(body):,}")
        self.is_unread = False
        return body

    def _send(self, reply: Reply) -> None:
        """Writes an answer; raises ConnectionError or TimeoutError if the client does not take it."""
        self.close_connection |= self.is_unread  # what was not read would be taken for the next request
        self.connection.settimeout(self.server.config.timeout)
        self.send_response_only(reply.status)
        headers = {"Content-Type": reply.content_type, "Content-Length": str(len(reply.content))}
        connection = {"Connection": "close"} if self.close_connection else {}
        for name, value in (headers | SAFE_HEADERS | connection | dict(reply.headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(reply.content)
        if self.is_unread:
            self._drain()

    def _drain(self) -> None:
        """Reads what the client still sends: a connection that is cut before takes the answer with it."""
        self.reader.set_deadline(min(DRAIN_SECONDS, self.server.config.timeout))
        with contextlib.suppress(OSError):  # the client may be gone
            self.connection.shutdown(socket.SHUT_WR)
            while self.rfile.read1(1 << 16):
                pass


class CaptionServer(http.server.ThreadingHTTPServer):
    """The server; it listens once it is made, and answers while `run` runs."""

    request_queue_size = 64  # connections that wait for a thread
    allow_reuse_address = os.name != "nt"  # which means something else on Windows

    def __init__(self, config: ServerConfig):
        """Listens at an address; raises InputError if that cannot be done."""
        self.config = config
        self.address_family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
        self.slots = threading.BoundedSemaphore(config.max_requests)
        self.connections = threading.BoundedSemaphore(MAX_CONNECTIONS + config.max_requests)
        self.decoders = threading.Semaphore(count_cores())  # an image in work can take hundreds of MB
        self.files = {
            path: Reply(
                HTTPStatus.OK,
                (WEB_DIRS[name.split(".")[0]] / name).read_bytes(),
                content_type,
                {"Cache-Control": "no-cache"},
            )
            for path, (name, content_type) in FILES.items()
        }
        try:
            super().__init__((config.host, config.port), _Handler)
        except OSError as error:
            hint = ""
            if error.errno in (errno.EADDRINUSE, errno.EACCES):
                hint = advise("; choose another --port, or --port 0 for one that is free")
            raise InputError(f"cannot listen at {config.host}, port {config.port} ({error.strerror}){hint}") from None

    def server_bind(self) -> None:
        """Binds the address, without http.server's look-up of its name, which can take seconds."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        """The address of the page."""
        host = f"[{self.config.host}]" if ":" in self.config.host else self.config.host
        return f"http://{host}:{self.server_address[1]}/"

    def run(self, service: Service) -> None:
        """Answers requests until `shutdown` is called, or an exception such as KeyboardInterrupt is raised."""
        self.service = service
        self.batcher = Batcher(service)
        try:
            self.serve_forever()
        finally:
            self.batcher.finish()  # the process must not end while TensorFlow computes

    def health(self) -> Reply:
        """Says that the server works, and what the page needs to know."""
        defaults = self.service.defaults.to_json()
        return json_reply(
            {"status": "ok", "run": self.service.run, "max_bytes": self.config.max_bytes, "defaults": defaults}
        )

    def process_request(self, request: Any, client_address: Any) -> None:
        """Starts a thread for a connection, unless there are too many."""
        if self.connections.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Answers the requests of a connection."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.connections.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Says in one line why a connection has ended, which is mostly the client's doing."""
        error = sys.exception()
        is_error = not isinstance(error, ConnectionError | TimeoutError)
        log(f"a connection has ended: {' '.join(repr(error).split())[:300]}", error=is_error)
