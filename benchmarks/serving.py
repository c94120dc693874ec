"""Measures how many images beyond.serve captions in a second, and how long a client waits for its caption.

    python -m benchmarks.serving
    python -m benchmarks.serving --run runs/coco --beam-size 5

Clients, each with a connection of its own, send one image after the other to a server in the same process: 1, 4 and 16
clients at the same time, and 16 clients whose images are captioned one at a time instead of in batches. The CNN alone
is measured alternately with them, for single images and for batches of 8, on pixels that are in memory: the server
cannot be faster. Times are from the first byte of a request to the last of its answer. The last line is JSON.

Without --run a small one is trained first on drawn shapes. Its CNN has random weights, which does not change the speed.
The images are noise as large as photographs: JPEGs of 500x375 pixels.
"""

import argparse
import contextlib
import functools
import http.client
import json
import statistics
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from benchmarks.captioning import train_small_run
from benchmarks.features import draw_photos
from benchmarks.timing import interleaved_median_rates, items_per_second
from beyond.serve import server
from beyond.serve.caption_batcher import MAX_BATCH
from beyond.serve.settings import ServerConfig
from captioning.base.cli import int_at_least, make_parser, run_main
from captioning.config.settings import DecodeConfig
from inference import Captioner, add_model_options

NUM_PHOTOS = 32


@contextlib.contextmanager
def run_server(captioner: Captioner, max_requests: int) -> Iterator[tuple[server.CaptionApp, tuple[str, int]]]:
    """Runs a server in a thread, without a line in the log for each request; gives its application and address."""
    config = ServerConfig(port=0, max_requests=max_requests)
    with server.listen(config) as listener, unittest.mock.patch("beyond.serve.server.log"):
        app = server.CaptionApp(captioner, config)
        wsgi_server = server.make_server(app, listener)
        thread = threading.Thread(target=server.run, args=[app, wsgi_server])
        thread.start()
        try:
            yield app, listener.getsockname()
        finally:
            server.stop(wsgi_server)
            thread.join()


def send_images(address: tuple[str, int], images: list[bytes], num_clients: int, num_requests: int) -> list[float]:
    """Sends images from several clients in turn, and returns the seconds of each request."""

    def send_share(client: int) -> list[float]:
        seconds = []
        with contextlib.closing(http.client.HTTPConnection(*address)) as connection:
            for number in range(client, num_requests, num_clients):
                start = time.perf_counter()
                connection.request("POST", "/caption", images[number % len(images)], {"Content-Type": "image/jpeg"})
                response = connection.getresponse()
                answer = response.read()
                seconds.append(time.perf_counter() - start)
                if response.status != 200:
                    raise RuntimeError(f"the server answered {response.status} {answer.decode()}")
        return seconds

    with ThreadPoolExecutor(num_clients) as pool:
        shares = list(pool.map(send_share, range(num_clients)))
    return [seconds for share in shares for seconds in share]


def run_cnn(captioner: Captioner, pixels: np.ndarray, batch_size: int) -> None:
    """Runs the CNN on all pixels (images, 299, 299, 3)."""
    for start in range(0, len(pixels), batch_size):
        captioner.extract_features(pixels[start : start + batch_size]).numpy()


def measure(captioner: Captioner, images: list[bytes], args: argparse.Namespace) -> dict[str, object]:
    """Measures the CNN and the server alternately; returns what the benchmark prints."""
    loads = {f"{count} clients": (count, MAX_BATCH) for count in args.clients}
    loads[f"{max(args.clients)} clients, one at a time"] = (max(args.clients), 1)
    seconds: dict[str, list[float]] = {name: [] for name in loads}
    pixels = np.stack([captioner.load_image(content) for content in images])
    with run_server(captioner, max_requests=max(args.clients)) as (app, address):

        def run_load(name: str) -> None:
            num_clients, app.batcher.max_batch = loads[name]
            seconds[name] += send_images(address, images, num_clients, args.requests)

        variants = {}
        for size in (1, MAX_BATCH):
            run = functools.partial(run_cnn, captioner, pixels, size)
            variants[f"cnn, batch of {size}"] = functools.partial(items_per_second, run, len(pixels))
        for name in loads:
            run = functools.partial(run_load, name)
            variants[name] = functools.partial(items_per_second, run, args.requests)
        for variant in variants.values():
            variant()  # compiles
        for times in seconds.values():
            times.clear()
        rates = interleaved_median_rates(variants, args.rounds, "images")
    return {
        "images": len(images),
        "requests": args.requests * args.rounds,
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "seconds": {name: percentiles(times) for name, times in seconds.items()},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns the median of times and the time that 1 % of them exceed."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    count = int_at_least(1)
    text = "clients at the same time (default: 1 4 16)"
    parser.add_argument("--clients", type=count, nargs="+", metavar="N", default=[1, 4, 16], help=text)
    text = "requests in a measurement (default: %(default)s)"
    parser.add_argument("--requests", type=int_at_least(2), metavar="N", default=100, help=text)
    text = "measurements of each (default: %(default)s)"
    parser.add_argument("--rounds", type=count, metavar="N", default=3, help=text)
    add_model_options(parser)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Measures everything alternately, and prints the rates and the times."""
    args = parse(argv)
    with tempfile.TemporaryDirectory() as name:
        folder, run = Path(name), args.run
        photos = draw_photos(folder, NUM_PHOTOS)
        if not run:
            train_small_run(folder / "training")
            run = folder / "training/run"
        captioner = Captioner.load(run, DecodeConfig.from_args(args))
        images = [(folder / photo).read_bytes() for photo in photos]
        print(json.dumps(measure(captioner, images, args)))


if __name__ == "__main__":
    run_main(main)
