"""How long training on all of COCO takes to start, and how much memory it needs: 82,783 pictures, 414,000 captions.

    python benchmarks/memory.py

The annotations are made, and every picture's features are a hard link to one of a few files, so that this needs
200 MB of disk. It runs train.py itself, and stops it after 50 steps. It also measures how many captions a second the
reading of batches alone delivers. The last line is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import at_least, make_parser, run_command, write_json  # before TensorFlow

import contextlib
import json
import os
import resource
import tempfile
import time

import features
import numpy as np
import train

from batches import Captions, make_pipeline, order_batches
from training import draw_lengths
from turns import rate_of

FILES = 200  # of features, each linked many times


class Enough(Exception):
    """So many steps are done."""


def make_data(folder: Path, pictures: int, captions: int) -> None:
    """Annotations in COCO's format, a cache of features, and empty files for the pictures, which nobody opens."""
    dice = np.random.default_rng(0)
    names = [f"COCO_train2014_{i:012}.jpg" for i in range(pictures)]
    vocabulary = np.array([f"word{i}" for i in range(20_000)])
    frequent = 1 / np.arange(1, 20_001)  # as Zipf found
    lengths = draw_lengths(captions, dice) - 2
    said = np.split(dice.choice(vocabulary, lengths.sum(), p=frequent / frequent.sum()), np.cumsum(lengths)[:-1])
    write_json(
        folder / "captions.json",
        {
            "images": [{"id": i, "file_name": name} for i, name in enumerate(names)],
            "annotations": [{"image_id": i % pictures, "caption": " ".join(words)} for i, words in enumerate(said)],
        },
    )
    (folder / "images").mkdir()
    (folder / "images/any").touch()
    settings = {"cnn": "InceptionV3", "weights": "imagenet", "image_size": features.IMAGE_SIZE, "dtype": "float16"}
    cache = features.FeatureCache(folder / "features", settings | {"images": "../images"})
    for number, name in enumerate(names):
        if number < FILES:
            cache.write(name, dice.random((features.LOCATIONS, features.CHANNELS)))
        else:
            os.link(cache.path(names[number % FILES]), cache.path(name))
        if number % 50_000 == 0:  # a file system allows so many links
            original = folder / f"images/{name}"
            original.touch()
        else:
            os.link(original, folder / "images" / name)
    write_json(cache.folder / features.MANIFEST, cache.settings)


def start_training(folder: Path, arguments: list[str], steps: int) -> dict[str, float]:
    """Runs train.py for so many steps: seconds to the first, peak memory, and the rate of reading alone."""
    times: list[float] = []
    found: dict[str, float] = {}
    make_train_step, for_devices = train.make_train_step, train.for_devices

    def watched(*given):
        step = make_train_step(*given)

        def run(batch):
            step(batch)
            times.append(time.perf_counter())
            if len(times) == steps:
                raise Enough

        return run

    def reading(strategy, captions: Captions, batches, cache, static=False):
        if batches and not found:
            some = order_batches(captions, 64, 0, 1)[:300]
            data = iter(make_pipeline(captions, some, cache))
            next(data)
            rate = rate_of(lambda: [None for _ in data], 64 * (len(some) - 1))
            found["reading_captions_per_second"] = round(rate)
            found["reading_seconds"] = 64 * len(some) / rate
        return for_devices(strategy, captions, batches, cache, static)

    train.make_train_step, train.for_devices = watched, reading
    begun = time.perf_counter()
    where = {"annotations": "captions.json", "images": "images", "features-dir": "features", "run": "run"}
    with contextlib.suppress(Enough):
        train.main([*(f"--{option}={folder / name}" for option, name in where.items()), *arguments])
    return {
        "seconds_to_first_step": round(times[0] - begun - found.pop("reading_seconds"), 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        **found,
    }


def main(argv: list[str] | None = None) -> None:
    """Makes the data, starts the training, and prints what it took."""
    parser = make_parser(__doc__)
    parser.add_argument("--pictures", type=at_least(10), default=82_783)
    parser.add_argument("--captions", type=at_least(20), default=414_000)
    parser.add_argument("--steps", type=at_least(1), default=50, help="of training (default: 50)")
    parser.add_argument("rest", nargs="*", help="further options for train.py, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        make_data(Path(folder), args.pictures, args.captions)
        found = start_training(Path(folder), args.rest, args.steps)
    print(json.dumps({"pictures": args.pictures, "captions": args.captions, "steps": args.steps, **found}))


if __name__ == "__main__":
    run_command(main)
