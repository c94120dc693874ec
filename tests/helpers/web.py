"""A captioner that needs no model, a server of it in a thread, and a client that sends bytes as they are."""

import contextlib
import functools
import http.client
import io
import json
import socket
import threading

import numpy as np
from PIL import Image

from beyond.serve.caption_batcher import Service
from beyond.serve.web_server import CaptionServer, ServerConfig
from captioning.config.settings import DecodeConfig
from captioning.images.reading import read_image
from captioning.output.captions import Caption

BOUNDARY = "----a boundary"
FORM = f'multipart/form-data; boundary="{BOUNDARY}"'


def draw_png(colour="red", size=(20, 10)):
    """Returns the bytes of a PNG of one colour."""
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "PNG")
    return file.getvalue()


def load_image(content):
    """Stands for features.load_image: the pixels (8, 8, 3)."""
    return np.asarray(read_image(content).resize((8, 8)))


def caption_pixels(pixels, config):
    """Captions an image by its colour, once for each caption that is asked for."""
    words = ("a", max(zip(pixels[0, 0].tolist(), ("red", "green", "blue"), strict=True))[1], "image")
    attention = np.eye(64, dtype=np.float32)[[0, 36, 63]]  # from the upper left to the lower right
    caption = Caption(" ".join(words), words, (0.5, 0.25, 0.75), attention, 0.5)
    others = (caption,) * (config.captions - 1)
    return Caption(caption.text, words, caption.probabilities, attention, 0.5, others)


class FakeCaptioner:
    """Stands for a captioner; notes the batches that it captions."""

    def __init__(self, defaults=None):
        self.batches = []  # the number of images and the settings of each
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.error = None
        self.service = Service("small", defaults or DecodeConfig(), load_image, self.caption_batch)

    def caption_batch(self, images, config):
        self.batches.append((len(images), config))
        self.begun.set()
        assert self.may_end.wait(20)
        if self.error:
            raise self.error
        return [caption_pixels(pixels, config) for pixels in images]


@contextlib.contextmanager
def run_server(service, **settings):
    """Runs a server in a thread, at a free port of 127.0.0.1 if nothing else is said."""
    with CaptionServer(ServerConfig(**({"port": 0} | settings))) as server:
        server.serve_forever = functools.partial(server.serve_forever, 0.01)  # it sees sooner that it shall end
        thread = threading.Thread(target=server.run, args=[service], daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join(20)
            assert not thread.is_alive()


def request(server, method, path, body=None, headers=None):
    """Sends a request as programs do; returns the status, the headers, and the content, of JSON its value."""
    connection = http.client.HTTPConnection(*server.server_address[:2], timeout=20)
    with contextlib.closing(connection):
        connection.request(method, path, body, headers or {})
        response = connection.getresponse()
        content = response.read()
    is_json = response.headers["Content-Type"] == "application/json" and content
    return response.status, response.headers, json.loads(content) if is_json else content


def post(server, body, query="", content_type="image/png", **headers):
    """Posts an image; returns the status and the JSON."""
    status, _, value = request(server, "POST", f"/caption{query}", body, {"Content-Type": content_type, **headers})
    return status, value


def make_form(*parts, boundary=BOUNDARY):
    """Makes a multipart/form-data body of (headers, content) of each part."""
    lines = [f"--{boundary}\r\n{headers}\r\n\r\n".encode() + content + b"\r\n" for headers, content in parts]
    return b"".join(lines) + f"--{boundary}--\r\n".encode()


def form_part(name, content, extra=""):
    """Makes the headers and the content of a part of a form."""
    return f'Content-Disposition: form-data; name="{name}"{extra}', content


def raw_post(body, *headers, query="", length=None):
    """Makes the bytes of a request."""
    lines = [f"POST /caption{query} HTTP/1.1", "Host: localhost", *headers]
    lines.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def send_raw(server, data, shut=True, timeout=20):
    """Sends bytes as they are; returns all that comes back until the server closes the connection."""
    with socket.create_connection(server.server_address[:2], timeout) as connection:
        with contextlib.suppress(OSError):  # the server may have closed it already
            connection.sendall(data)
            if shut:
                connection.shutdown(socket.SHUT_WR)
        return receive_all(connection)


def receive_all(connection):
    """Returns what a connection gives until it is closed."""
    blocks = []
    with contextlib.suppress(ConnectionError):
        while block := connection.recv(1 << 16):
            blocks.append(block)
    return b"".join(blocks)


def parse_replies(data):
    """Parses the answers of a connection: the status, the headers in lower case, and the content of each."""
    replies = []
    while data:
        head, _, data = data.partition(b"\r\n\r\n")
        status, *lines = head.decode("ascii").split("\r\n")
        headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
        assert status.startswith("HTTP/1.1 ")
        length = int(headers.get("content-length", 0))
        replies.append((int(status.split()[1]), headers, data[:length]))
        assert len(data) >= length
        data = data[length:]
    return replies
