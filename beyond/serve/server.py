"""A small web server that captions images: a page for people, and POST /caption for programs.

    app = CaptionApp(Service("coco", DecodeConfig(), load_image, caption_batch), config)
    run(app, make_server(app, listen(config)))

Werkzeug parses the requests. waitress runs the application: it gives a request one of its threads only once the whole
body has arrived, so that slow clients keep no others waiting.

The server listens on the loopback interface unless told otherwise, and then answers only requests that were sent to a
loopback name, so that a page of the internet whose name was made to lead here (DNS rebinding) cannot use it; nor may
other pages post images.
"""

import contextlib
import errno
import io
import json
import logging
import math
import re
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import waitress
import waitress.wasyncore
from PIL import Image
from waitress.server import BaseWSGIServer
from werkzeug.exceptions import (
    BadRequest,
    Forbidden,
    HTTPException,
    InternalServerError,
    MethodNotAllowed,
    NotFound,
    RequestEntityTooLarge,
    ServiceUnavailable,
)
from werkzeug.sansio.utils import host_is_trusted
from werkzeug.wrappers import Request, Response

from beyond.report.report import WEB as VIEWER_DIR
from beyond.serve.caption_batcher import Batcher, Service
from beyond.serve.settings import ServerConfig, is_loopback, parse_decoding
from captioning.base.cli import InputError, advise, log

WEB_DIR = Path(__file__).parent / "web"
FILES = {  # what is served, and nothing else: the file and the type of each path
    "/": (WEB_DIR / "serve.html", "text/html; charset=utf-8"),
    "/serve.css": (WEB_DIR / "serve.css", "text/css; charset=utf-8"),
    "/serve.js": (WEB_DIR / "serve.js", "text/javascript; charset=utf-8"),
    "/viewer.css": (VIEWER_DIR / "viewer.css", "text/css; charset=utf-8"),
    "/viewer.js": (VIEWER_DIR / "viewer.js", "text/javascript; charset=utf-8"),
}
SAFE_HEADERS = {  # of every answer: a page that loads only what this server has, and is shown in no other page
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
    "media-src blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
}
HOST = re.compile(r"(?P<name>[a-z0-9.-]+|\[[0-9a-f:.]+\])(:\d+)?")  # of the header, in lower case
IMAGE_PART = "image"  # the part of a form that holds the image
RETRY_SECONDS = 1  # after which a client that came too early is asked to come again
SPARE_THREADS = 4  # for the page, and to refuse requests while all images that may be in work are
SPARE_CONNECTIONS = 64  # of browsers, which keep theirs open, and of clients that send slowly


class ImageRequest(Request):
    """A request that may hold an image, alone or as a file in a form."""

    max_form_parts = 20
    max_form_memory_size = 200_000  # of the values in a form; Werkzeug reads blocks of 64 KB, which count, too

    def read(self) -> tuple[bytes, list[tuple[str, str]]]:
        """Returns the file of the image, and the parameters of the address and of a form.

        Raises:
            InputError: there is no image, or more than one.
            RequestEntityTooLarge: the body is larger than `max_content_length`, or a form holds too much beside it.
        """
        pairs = list(self.args.items(multi=True))
        try:
            if self.mimetype != "multipart/form-data":
                content = self.get_data()
            else:
                files = self.files.getlist(IMAGE_PART)
                if len(files) != 1:
                    raise InputError(f"expected one file with the name {IMAGE_PART} in the form, found {len(files)}")
                content = files[0].read()
                pairs += self.form.items(multi=True)
        except RequestEntityTooLarge:
            limit = (self.max_content_length or 0) // 1_000_000
            raise RequestEntityTooLarge(
                f"expected at most {limit} MB; a form holds one image and short values"
            ) from None
        if not content:
            raise InputError("expected an image, found an empty one")
        return content, pairs


def declared_pixels(content: bytes) -> float:
    """Returns the number of pixels that the header of an image declares, infinity if it cannot be read.

    Pixels of 16 bits and more count twice: they take as much memory as two.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:  # reads the header only
            return image.width * image.height * (2 if image.mode.startswith(("I", "F")) else 1)
    except Exception:  # Pillow raises many types for damaged files
        return math.inf


def json_response(value: Mapping[str, Any], status: int = 200) -> Response:
    """Makes an answer of JSON, which no cache keeps."""
    return Response(json.dumps(value), status, {"Cache-Control": "no-store"}, content_type="application/json")


class CaptionApp:
    """The WSGI application.

    Attributes:
        service: what captions.
        config: what a client may ask.
        batcher: captions together what waits together.
    """

    def __init__(self, service: Service, config: ServerConfig):
        self.service, self.config = service, config
        self.batcher = Batcher(service)
        self._files = {path: (file.read_bytes(), content_type) for path, (file, content_type) in FILES.items()}
        self._lock = threading.Lock()  # of the two below
        self._num_images, self._num_pixels = 0, 0.0  # in work

    def __call__(self, environ: Any, start_response: Any) -> Iterable[bytes]:
        """Answers a request, and logs a line about it."""
        start = time.perf_counter()
        request = ImageRequest(environ)
        request.max_content_length = self.config.max_bytes
        with request:  # which closes the files of a form
            response = self._answer(request)
        response.headers.update(SAFE_HEADERS)
        path = request.path[:80].encode("unicode_escape").decode()  # no line ends in the log
        log(f"{request.method[:20]} {path} {response.status_code} {time.perf_counter() - start:.2f} s")
        return response(environ, start_response)

    def _answer(self, request: ImageRequest) -> Response:
        """Makes the answer to a request; a failure is answered by `{"error": "one line"}`."""
        try:
            self._check_source(request)
            return self._route(request)
        except InputError as error:
            refusal: HTTPException = BadRequest(str(error))
        except HTTPException as error:
            refusal = error
        except Exception as error:  # a fault of this program, which is not the client's business
            log(f"{request.method} failed: {' '.join(repr(error).split())[:300]}", error=True)
            refusal = InternalServerError("captioning failed; the server's log says why")
        response = json_response({"error": " ".join(str(refusal.description).split())}, refusal.code or 500)
        response.headers.update({k: v for k, v in refusal.get_headers() if k in ("Allow", "Retry-After")})
        return response

    def _check_source(self, request: Request) -> None:
        """Raises Forbidden if a request names another server, or comes from a page that is not this server's."""
        hint = "; if a proxy shows this page there, start the server with --trusted-hosts and that name"
        trusted = self.config.trusted_names
        host = request.headers.get("Host", "").lower()
        match = HOST.fullmatch(host)
        is_known = match and (is_loopback(match["name"]) or (trusted and host_is_trusted(host, trusted)))
        takes_any = match and not trusted and not is_loopback(self.config.host)
        if not (is_known or takes_any):
            raise Forbidden(f"expected a request to localhost or 127.0.0.1, found one to {host[:60]!r}{hint}")
        if (origin := request.headers.get("Origin")) is not None:
            source = origin.lower().partition("://")[2]
            if source != host and not (trusted and host_is_trusted(source, trusted)):
                raise Forbidden(f"expected a request of this server's page, found one of {origin[:60]!r}{hint}")

    def _route(self, request: ImageRequest) -> Response:
        """Answers a request whose source is right."""
        is_page = request.path in FILES or request.path == "/health"
        if not is_page and request.path != "/caption":
            raise NotFound("no such page; expected /, /health or /caption")
        allowed = ["GET", "HEAD"] if is_page else ["POST"]
        if request.method not in allowed:
            raise MethodNotAllowed(allowed, f"expected {' or '.join(allowed)}, found {request.method[:20]!r}")
        if request.path == "/caption":
            return self._caption(request)
        if request.path == "/health":
            defaults = self.service.defaults.to_json()
            facts = {"status": "ok", "run": self.service.run, "max_bytes": self.config.max_bytes, "defaults": defaults}
            return json_response(facts)
        content, content_type = self._files[request.path]
        return Response(content, content_type=content_type, headers={"Cache-Control": "no-cache"})

    def _caption(self, request: ImageRequest) -> Response:
        """Captions the image of a request."""
        start = time.perf_counter()
        content, pairs = request.read()
        config = parse_decoding(pairs, self.service.defaults)
        with self._admit(content):
            pixels = self.service.load_image(content)
            try:
                caption = self.batcher.caption(pixels, config, self.config.timeout)
            except TimeoutError:
                text = f"the image has waited {self.config.timeout} s for others; try again in a moment"
                raise ServiceUnavailable(text, retry_after=RETRY_SECONDS) from None
        seconds = round(time.perf_counter() - start, 3)
        return json_response(caption.to_json(with_attention=True) | {"seconds": seconds})

    @contextlib.contextmanager
    def _admit(self, content: bytes) -> Iterator[None]:
        """Counts an image as in work during the block; raises ServiceUnavailable if others leave it no room."""
        limit = self.config.max_pixels
        num_pixels = min(declared_pixels(content), limit)  # what has no size is most likely refused by `load_image`
        with self._lock:
            if self._num_images >= self.config.max_requests or self._num_pixels + num_pixels > limit:
                text = "too many or too large images at the same time; try again in a moment"
                raise ServiceUnavailable(text, retry_after=RETRY_SECONDS)
            self._num_images += 1
            self._num_pixels += num_pixels
        try:
            yield
        finally:
            with self._lock:
                self._num_images -= 1
                self._num_pixels -= num_pixels


# Running it.


def listen(config: ServerConfig) -> socket.socket:
    """Listens at an address; raises InputError if that cannot be done."""
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    try:
        return socket.create_server((config.host, config.port), family=family)
    except OSError as error:
        hint = ""
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            hint = advise("; choose another --port, or --port 0 for one that is free")
        reason = str(error.strerror).partition(" (while")[0]  # what create_server adds
        raise InputError(f"cannot listen at {config.host}, port {config.port} ({reason}){hint}") from None


def page_url(listener: socket.socket) -> str:
    """Returns the address of the page."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def make_server(app: CaptionApp, listener: socket.socket) -> BaseWSGIServer:
    """Makes the server that answers what comes to `listener`, once its `run` is called."""
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # that a request waits for a thread is no news
    config = app.config
    return waitress.create_server(
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
    server.trigger.pull_trigger(lambda: waitress.wasyncore.close_all(connections))
