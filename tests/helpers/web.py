"""A captioner that needs no model, and the server of it: as a client without sockets, or in a thread at a real port."""

import contextlib
import copy
import io
import threading
import time
import types
from pathlib import Path

import numpy as np
from PIL import Image
from werkzeug.test import Client

from beyond.serve.server import CaptionApp, listen, make_server, page_url, run, stop
from beyond.serve.settings import ServerConfig
from captioning.config.settings import DecodeConfig
from captioning.images.reading import read_image
from captioning.output.captions import Caption


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

    def __init__(self, decode_config=None, run="small"):
        self.run = Path(run)
        self.decode_config = decode_config or DecodeConfig()
        self.batches = []  # the number of images and the settings of each
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.may_end.set()
        self.error = None

    def load_image(self, content):
        return load_image(content)

    def with_decoding(self, config):
        other = copy.copy(self)
        other.decode_config = config
        return other

    def caption_pixels(self, pixels):
        self.batches.append((len(pixels), self.decode_config))
        self.begun.set()
        assert self.may_end.wait(20)
        if self.error:
            raise self.error
        return [caption_pixels(image, self.decode_config) for image in pixels]


def make_client(captioner, **settings):
    """Makes a client whose requests go to the application directly."""
    return Client(CaptionApp(captioner, ServerConfig(**settings)))


def post(client, body, query="", content_type="image/png", **headers):
    """Posts an image, or the dict of a form; returns the status and the JSON."""
    content_type = "multipart/form-data" if isinstance(body, dict) else content_type
    reply = client.post(f"/caption{query}", data=body, content_type=content_type, headers=headers)
    return reply.status_code, reply.json


def wait_until(condition):
    """Waits until a function returns true; fails after 20 s."""
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


@contextlib.contextmanager
def run_server(captioner, **settings):
    """Runs a server in a thread, at a free port of 127.0.0.1 unless the settings say another address."""
    config = ServerConfig(**({"port": 0} | settings))
    with listen(config) as listener:
        app = CaptionApp(captioner, config)
        server = make_server(app, listener)
        thread = threading.Thread(target=run, args=[app, server], daemon=True)
        thread.start()
        try:
            address = listener.getsockname()[:2]
            yield types.SimpleNamespace(app=app, server=server, url=page_url(listener), address=address)
        finally:
            stop(server)
            thread.join(20)
            assert not thread.is_alive()
