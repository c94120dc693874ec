"""Measures how many images beyond.serve captions in a second, and how long a client waits for its caption.

    python -m benchmarks.serving
    python -m benchmarks.serving --run runs/coco --images photos/ --beam-size 5

Clients, each with a connection of its own, send one image after the other to a server in the same process: 1, 4 and 16
clients at the same time, and 16 clients whose images are captioned one at a time instead of in batches. The CNN alone
is measured alternately with them, for single images and for batches of 8, on pixels that are in memory: the server
cannot be faster. Times are from the first byte of a request to the last of its answer. The last line is JSON.

Without --run a small one is trained first on drawn shapes. Its CNN has random weights, which does not change the speed.
Without --images the images are noise as large as photographs: JPEGs of 500x375 pixels.
"""

import argparse
import contextlib
import functools
import http.client
import itertools
import json
import statistics
import tempfile
import threading
import time
import unittest.mock
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

import beyond.serve.__main__ as serve
import features
from benchmarks.captioning import train_small_run
from benchmarks.features import draw_photos
from benchmarks.timing import interleaved_median_rates, items_per_second
from beyond.serve import server
from beyond.serve.caption_batcher import MAX_BATCH
from beyond.serve.settings import ServerConfig
from captioning.base.cli import int_at_least, make_parser, run_main
from captioning.config.settings import DecodeConfig
from captioning.images.reading import is_image_file
from inference import Captioner, add_model_options

NUM_PHOTOS = 32
CNN_BATCH_SIZES = (1, MAX_BATCH)


class Load(NamedTuple):
    """So many clients at the same time, and the largest batch that the server makes of their images."""

    clients: int
    max_batch: int

    @property
    def name(self) -> str:
        """What the results call it."""
        return f"{self.clients} clients" + ", one at a time" * (self.max_batch == 1)


@contextlib.contextmanager
def run_server(captioner: Captioner, max_requests: int) -> Iterator[tuple[server.CaptionApp, tuple[str, int]]]:
    """Runs a server in a thread, without a line in the log for each request; gives its application and address."""
    config = ServerConfig(port=0, max_requests=max_requests)
    with server.listen(config) as listener, unittest.mock.patch("beyond.serve.server.log"):
        app = server.CaptionApp(serve.make_service(captioner), config)
        wsgi_server = server.make_server(app, listener)
        thread = threading.Thread(target=server.run, args=[app, wsgi_server])
        thread.start()
        try:
            yield app, listener.getsockname()
        finally:
            server.stop(wsgi_server)
            thread.join()


def send_images(address: tuple[str, int], images: list[bytes], num_clients: int, num_requests: int) -> list[float]:
    """Sends images from several clients, and returns the seconds of each request; raises RuntimeError if one fails."""
    numbers = itertools.count()
    seconds: list[float] = []
    failures: list[str] = []

    def work() -> None:
        with contextlib.closing(http.client.HTTPConnection(*address)) as connection:
            while (number := next(numbers)) < num_requests:
                start = time.perf_counter()
                headers = {"Content-Type": "image/jpeg"}
                connection.request("POST", "/caption", images[number % len(images)], headers)
                response = connection.getresponse()
                answer = response.read()
                seconds.append(time.perf_counter() - start)
                if response.status != 200:
                    failures.append(f"{response.status} {answer.decode()}")

    threads = [threading.Thread(target=work) for _ in range(num_clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures or len(seconds) != num_requests:
        raise RuntimeError(f"{len(failures)} of {num_requests} requests failed: {failures[:1]}")
    return seconds


def cnn_run(captioner: Captioner, pixels: np.ndarray, batch_size: int) -> Callable[[], None]:
    """Makes a function that runs the CNN on all pixels (images, 299, 299, 3)."""

    def run() -> None:
        for start in range(0, len(pixels), batch_size):
            captioner.extract_features(pixels[start : start + batch_size]).numpy()

    return run


def measure(
    captioner: Captioner, images: list[bytes], clients: list[int], num_requests: int, rounds: int
) -> dict[str, object]:
    """Measures the CNN and the server alternately.

    Args:
        captioner: what the server captions with.
        images: the contents of image files, which are sent in turn.
        clients: the numbers of clients.
        num_requests: in a measurement.
        rounds: measurements of each.

    Returns:
        What the benchmark prints.
    """
    loads = [*(Load(count, MAX_BATCH) for count in clients), Load(max(clients), 1)]
    seconds: dict[str, list[float]] = {load.name: [] for load in loads}
    pixels = np.stack([features.load_image(content) for content in images])
    with run_server(captioner, max_requests=max(clients)) as (app, address):

        def run_load(load: Load) -> None:
            app.batcher.max_batch = load.max_batch
            seconds[load.name] += send_images(address, images, load.clients, num_requests)

        runs = {f"cnn, batch of {size}": (cnn_run(captioner, pixels, size), len(pixels)) for size in CNN_BATCH_SIZES}
        runs |= {load.name: (functools.partial(run_load, load), num_requests) for load in loads}
        for run, _ in runs.values():
            run()  # compiles
        for times in seconds.values():
            times.clear()
        variants = {name: functools.partial(items_per_second, run, count) for name, (run, count) in runs.items()}
        rates = interleaved_median_rates(variants, rounds, "images")
    return {
        "images": len(images),
        "requests": num_requests * rounds,
        "images_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "seconds": {name: percentiles(times) for name, times in seconds.items()},
    }


def percentiles(seconds: list[float]) -> dict[str, float]:
    """Returns the median of times and the time that 1 % of them exceed."""
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    return {"p50": round(cuts[49], 3), "p99": round(cuts[98], 3)}


def read_images(folder: Path) -> list[bytes]:
    """Reads the first images of a folder."""
    paths = itertools.islice(sorted(path for path in folder.iterdir() if is_image_file(path)), NUM_PHOTOS)
    return [path.read_bytes() for path in paths]


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    count = int_at_least(1)
    text = f"folder of the images, of which the first {NUM_PHOTOS} are sent in turn (default: drawn)"
    parser.add_argument("--images", type=Path, metavar="DIR", help=text)
    parser.add_argument(
        "--clients",
        type=count,
        nargs="+",
        metavar="N",
        default=[1, 4, 16],
        help="clients at the same time (default: 1 4 16)",
    )
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
        if not args.images:
            draw_photos(folder, NUM_PHOTOS)
        if not run:
            train_small_run(folder / "training")
            run = folder / "training/run"
        captioner = Captioner.load(run, DecodeConfig.from_args(args))
        images = read_images(args.images or folder)
        print(json.dumps(measure(captioner, images, args.clients, args.requests, args.rounds)))


if __name__ == "__main__":
    run_main(main)
