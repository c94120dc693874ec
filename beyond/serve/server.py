"""A small web server that captions images: a page for people, and POST /caption for programs.

    app = CaptionApp(captioner, config)
    run(app, make_server(app, listen(config)))

Werkzeug parses the requests. waitress runs the application: it gives a request one of its threads only once the whole
body has arrived, so that slow clients keep no others waiting.
"""

import contextlib
import json
import logging
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import waitress
import waitress.wasyncore
from waitress.channel import HTTPChannel
from waitress.parser import HTTPRequestParser
from waitress.server import BaseWSGIServer
from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    InternalServerError,
    RequestEntityTooLarge,
    ServiceUnavailable,
)
from werkzeug.routing import Map, Rule
from werkzeug.sansio.utils import host_is_trusted
from werkzeug.utils import send_file
from werkzeug.wrappers import Request, Response

from beyond.report.report import WEB as VIEWER_DIR
from beyond.serve.caption_batcher import Batcher
from beyond.serve.settings import ServerConfig, parse_decoding
from captioning.base.cli import InputError, log
from captioning.config.settings import DecodeConfig
from captioning.images.reading import count_pixels
from captioning.output.captions import Caption
from inference import Captioner

WEB_DIR = Path(__file__).parent / "web"
FILES = {  # the file and the type of each path; no others are served
    "/": (WEB_DIR / "serve.html", "text/html"),
    "/serve.css": (WEB_DIR / "serve.css", "text/css"),
    "/serve.js": (WEB_DIR / "serve.js", "text/javascript"),
    "/viewer.css": (VIEWER_DIR / "viewer.css", "text/css"),
    "/viewer.js": (VIEWER_DIR / "viewer.js", "text/javascript"),
}
URLS = Map(
    [Rule("/caption", methods=["POST"]), *(Rule(path, methods=["GET"]) for path in ("/health", *FILES))],
    merge_slashes=False,
)
SAFE_HEADERS = {  # of every answer: a page that loads only what this server has, and is shown in no other page
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
IMAGE_PART = "image"  # the part of a form that holds the image
RETRY_SECONDS = 1  # after which a client that came too early is asked to come again
SPARE_THREADS = 4  # for the page, and to refuse requests while all images that may be in work are
SPARE_CONNECTIONS = 128  # of browsers, which keep theirs open, and of clients that send slowly
MIN_RATE = 10_000  # bytes/s, after the timeout, with which a request has to arrive; a phone sends ten times as many


def read_request(request: Request) -> tuple[bytes, list[tuple[str, str]]]:
    """Returns the content of the image, which is the body or a file in a form, and the parameters beside it.

    Raises:
        InputError: there is no image, or more than one.
        RequestEntityTooLarge: the body is larger than `max_content_length`, or a form holds too much beside the image.
    """
    pairs = list(request.args.items(multi=True))
    if request.mimetype != "multipart/form-data":
        content = request.get_data()
    else:
        files = request.files.getlist(IMAGE_PART)
        if len(files) != 1:
            raise InputError(f"expected one file with the name {IMAGE_PART} in the form, found {len(files)}")
        content = files[0].read()
        pairs += request.form.items(multi=True)
    if not content:
        raise InputError("expected an image, found an empty one")
    return content, pairs


def json_response(value: Mapping[str, Any]) -> Response:
    """Makes an answer of JSON, which no cache keeps."""
    return Response(json.dumps(value), headers={"Cache-Control": "no-store"}, content_type="application/json")


def busy(reason: str) -> ServiceUnavailable:
    """Makes the refusal of a request that may succeed a little later."""
    return ServiceUnavailable(f"{reason}; try again in a moment", retry_after=RETRY_SECONDS)


class PixelBudget:
    """The number of pixels that are read at the same time, by any threads: memory goes with it."""

    def __init__(self, num_pixels: int):
        self._free = num_pixels
        self._changed = threading.Condition()

    @contextlib.contextmanager
    def take(self, num_pixels: int, timeout: float) -> Iterator[None]:
        """Waits until there is room for an image, and keeps it; raises TimeoutError if there is none in time."""
        with self._changed:
            if not self._changed.wait_for(lambda: num_pixels <= self._free, timeout):
                raise TimeoutError
            self._free -= num_pixels
        try:
            yield
        finally:
            with self._changed:
                self._free += num_pixels
                self._changed.notify_all()


class CaptionApp:
    """The WSGI application; `captioner` has the search of requests that do not name one."""

    def __init__(self, captioner: Captioner, config: ServerConfig):
        self.captioner = captioner
        self.config = config
        self.batcher = Batcher(captioner)
        self._places = threading.BoundedSemaphore(config.max_requests)
        self._budget = PixelBudget(1_000_000 * config.max_megapixels)  # which no image exceeds: others are refused

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answers a request, and logs a line about it."""
        start = time.perf_counter()
        request = Request(environ)
        request.max_content_length = self.config.max_bytes
        with request:  # which closes the files of a form
            try:
                response = self._answer(request)
            except Exception as error:
                refusal = self._as_http_error(error)
                response = refusal.get_response()  # with headers such as Allow and Retry-After
                response.set_data(json.dumps({"error": " ".join(str(refusal.description).split())}))
                response.content_type = "application/json"
        response.headers.update(SAFE_HEADERS)
        path = request.path[:80].encode("unicode_escape").decode()  # no line ends in the log
        log(f"{request.method[:20]} {path} {response.status_code} {time.perf_counter() - start:.2f} s")
        return response(environ, start_response)

    def _as_http_error(self, error: Exception) -> HTTPException:
        """Turns whatever went wrong into the refusal that the client gets."""
        if isinstance(error, RequestEntityTooLarge):
            limit = f"expected at most {self.config.max_mb} MB; a form holds one image and short values"
            return RequestEntityTooLarge(limit)
        if isinstance(error, HTTPException):
            return error
        if isinstance(error, InputError):
            return BadRequest(str(error))
        if isinstance(error, TimeoutError):
            return busy(f"the image has no caption after {self.config.timeout} s")
        log(f"captioning failed: {' '.join(repr(error).split())[:300]}", error=True)
        return InternalServerError("captioning failed; the server's log says why")

    def _answer(self, request: Request) -> Response:
        """Makes the answer to a request."""
        self._check_source(request)
        URLS.bind("").match(request.path, request.method)
        if request.path == "/caption":
            return self._caption(request)
        if request.path == "/health":
            facts = {"status": "ok", "run": self.captioner.run.resolve().name, "max_bytes": self.config.max_bytes}
            config = self.captioner.decode_config
            return json_response(facts | {"defaults": config.to_json() | {"beam_size": config.num_beams}})
        file, content_type = FILES[request.path]
        return send_file(file, request.environ, content_type)

    def _check_source(self, request: Request) -> None:
        """Raises Forbidden if a request names another server, or comes from a page that is not this server's.

        A page of the internet whose name was made to lead to this machine (DNS rebinding) could use it otherwise.
        """
        hint = "; if a proxy shows this page there, start the server with --trusted-hosts and that name"
        trusted = self.config.trusted_names
        host = request.headers.get("Host", "").lower()
        is_known = host_is_trusted(host, ["localhost", "127.0.0.1", *trusted]) or re.fullmatch(r"\[::1\](:\d+)?", host)
        if not is_known and (self.config.is_local or trusted):
            raise Forbidden(f"expected a request to localhost or 127.0.0.1, found one to {host[:60]!r}{hint}")
        origin = request.headers.get("Origin", f"http://{host}").lower()
        source = origin.partition("://")[2]
        if source != host and not (trusted and host_is_trusted(source, trusted)):
            raise Forbidden(f"expected a request of this server's page, found one of {origin[:60]!r}{hint}")

    def _caption(self, request: Request) -> Response:
        """Captions the image of a request."""
        start = time.perf_counter()
        content, pairs = read_request(request)
        config = parse_decoding(pairs, self.captioner.decode_config)
        if not self._places.acquire(blocking=False):
            raise busy("too many images at the same time")
        result: Future[Caption] = Future()
        # In a thread of its own, since nothing can stop Pillow in an image that takes too long.
        threading.Thread(target=self._work, args=[content, config, result], daemon=True).start()
        caption = result.result(self.config.timeout)
        seconds = round(time.perf_counter() - start, 3)
        return json_response(caption.to_json(with_attention=True) | {"seconds": seconds})

    def _work(self, content: bytes, config: DecodeConfig, result: Future[Caption]) -> None:
        """Reads and captions an image; the request may have been given up when it ends, and its place is free then."""
        deadline = time.perf_counter() + self.config.timeout
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._places.release)  # before the answer: the client's next image finds it free
                with self._budget.take(count_pixels(content), self.config.timeout):
                    pixels = self.captioner.load_image(content)
                caption = self.batcher.caption(pixels, config, deadline - time.perf_counter())
            result.set_result(caption)
        except Exception as error:
            result.set_exception(error)


# Running it.


def listen(config: ServerConfig) -> socket.socket:
    """Listens at an address; raises InputError if that cannot be done."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        reason = str(error.strerror).partition(" (while")[0]  # what create_server adds
        raise InputError(
            f"cannot listen at {config.host}, port {config.port} ({reason}); choose another --host or --port; "
            "--port 0 takes one that is free"
        ) from None


def page_url(listener: socket.socket) -> str:
    """Returns the address of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


class TimedParser(HTTPRequestParser):
    """A request that arrives, and since when."""

    def __init__(self, adj: Any):
        super().__init__(adj)
        self.start = time.monotonic()


class Channel(HTTPChannel):
    """A connection, which is closed when a request arrives too slowly; waitress closes those that are silent."""

    parser_class = TimedParser

    def readable(self) -> bool:
        """Tells whether more is expected; waitress asks every second at least."""
        request = self.request
        if request is not None:
            expected = MIN_RATE * (time.monotonic() - request.start - self.adj.channel_timeout)
            self.will_close |= request.body_bytes_received < expected
        return super().readable()


def make_server(app: CaptionApp, listener: socket.socket) -> BaseWSGIServer:
    """Makes the server that answers what comes to `listener`, once its `run` is called."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that a request waits for a thread is no news
    config = app.config
    server = waitress.create_server(
        app,
        sockets=[listener],
        threads=config.max_requests + SPARE_THREADS,
        connection_limit=config.max_requests + SPARE_CONNECTIONS,
        # Twice what is allowed: waitress refuses a larger body by closing the connection, which a client that is still
        # sending sees instead of the answer.
        max_request_body_size=2 * config.max_bytes,
        channel_timeout=config.timeout,
        cleanup_interval=1,  # s between looks for connections that have been silent for so long
        asyncore_use_poll=True,  # select takes no more than 1024 connections
        log_socket_errors=False,  # of clients that are gone
    )
    server.channel_class = Channel
    return server


def run(app: CaptionApp, server: BaseWSGIServer) -> None:
    """Answers requests until Ctrl-C, or until `stop` is called."""
    try:
        server.run()  # which returns at Ctrl-C
    finally:
        server.task_dispatcher.shutdown()
        app.batcher.finish()  # the process must not end while TensorFlow computes


def stop(server: BaseWSGIServer) -> None:
    """Ends `run` from another thread."""
    connections = server._map
    with contextlib.suppress(OSError):  # it may have ended before it is woken
        server.trigger.pull_trigger(lambda: waitress.wasyncore.close_all(connections))
