"""Measures how long training on all of COCO takes to start, and its memory: 82,783 images, 414,000 captions.

    python -m benchmarks.memory
    python -m benchmarks.memory --steps 20 -- --dropout 0.3                # options of train.py follow --

The captions are made of random words, and the features of every image are a hard link to one of a few files, so that
200 MB of disk suffice. The benchmark runs train.py and stops it after 50 steps. Then it measures how many captions per
second the input pipeline delivers without a model. The last line is JSON.
"""

import contextlib
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

import data_utils
import train
from benchmarks.timing import add_counts, items_per_second
from benchmarks.training import sample_lengths
from captioning.base.cli import make_parser, run_main
from captioning.base.files import write_json
from captioning.config.settings import DataConfig
from captioning.images.feature_cache import MANIFEST_FILE, FeatureCache, make_manifest, read_manifest
from captioning.images.image_records import ImageRecords
from captioning.training.input_pipeline import encode_captions, make_dataset, make_epoch_batches
from tokenizer import Tokenizer

NUM_FEATURE_FILES = 200  # different ones, each linked many times
MAX_LINKS = 50_000  # to a file; a file system allows no more than some
NUM_WORDS = 20_000
BATCH_SIZE = 64
NUM_READ_BATCHES = 300


class StopTraining(Exception):
    """Ends the training after the last step of the benchmark."""


# The data.


def make_annotations(image_paths: list[str], num_captions: int, rng: np.random.Generator) -> dict[str, list]:
    """Makes captions in COCO's format, whose words are as frequent as Zipf's law has it."""
    vocabulary = np.array([f"word{i}" for i in range(NUM_WORDS)])
    weights = 1 / np.arange(1, NUM_WORDS + 1)
    num_words = sample_lengths(num_captions, rng) - 2  # without <start> and <end>
    words = rng.choice(vocabulary, num_words.sum(), p=weights / weights.sum())
    captions = [" ".join(caption_words) for caption_words in np.split(words, np.cumsum(num_words)[:-1])]
    return {
        "images": [{"id": i, "file_name": path} for i, path in enumerate(image_paths)],
        "annotations": [{"image_id": i % len(image_paths), "caption": text} for i, text in enumerate(captions)],
    }


def make_data(folder: Path, num_images: int, num_captions: int) -> None:
    """Writes annotations, a cache of features, and empty image files, which are never opened."""
    rng = np.random.default_rng(0)
    image_paths = [f"COCO_train2014_{i:012}.jpg" for i in range(num_images)]
    write_json(folder / "captions.json", make_annotations(image_paths, num_captions, rng))
    image_dir = folder / "images"
    image_dir.mkdir()
    cache_dir = folder / "features"
    cache = FeatureCache(cache_dir, make_manifest(cache_dir, image_dir, "imagenet", "float16"))
    records = ImageRecords(cache_dir, image_dir)  # without them the features would be computed again
    for number, image_path in enumerate(image_paths):
        if number < NUM_FEATURE_FILES:
            cache.write(image_path, rng.random(cache.shape))
        else:
            os.link(cache.path(image_paths[number % NUM_FEATURE_FILES]), cache.path(image_path))
        if number % MAX_LINKS == 0:
            empty_file = image_dir / image_path
            empty_file.touch()
        else:
            os.link(empty_file, image_dir / image_path)
        records.note(image_path)
        records.add(image_path)
    write_json(cache.folder / MANIFEST_FILE, cache.manifest)


# The measurements.


def measure_training(folder: Path, train_args: list[str], num_steps: int) -> dict[str, float]:
    """Runs train.py for some steps.

    Returns:
        The seconds until the first step is done, and the largest memory of the process, in GiB.
    """
    step_times: list[float] = []

    def record_step(state: train.TrainState) -> None:
        state.progress.get("loss_sum")  # waits for the step
        step_times.append(time.perf_counter())
        if len(step_times) == num_steps:
            raise StopTraining

    data_args = [f"--annotations={folder / 'captions.json'}", f"--images={folder / 'images'}"]
    start = time.perf_counter()
    with contextlib.suppress(StopTraining):
        train.main(
            [*data_args, f"--features-dir={folder / 'features'}", f"--run={folder / 'run'}", *train_args],
            on_step=record_step,
        )
    return {
        "seconds_to_first_step": round(step_times[0] - start, 1),
        "peak_memory_gib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
    }


def measure_reading(folder: Path) -> float:
    """Reads the batches that train.py reads, without training; returns the captions per second."""
    config = DataConfig(annotations=str(folder / "captions.json"), images=str(folder / "images"))
    examples = data_utils.load_dataset(config).split("train")
    tokenizer = Tokenizer.load(folder / "run/vocabulary.json")
    cache = FeatureCache(folder / "features", read_manifest(folder / "features"))
    captions = encode_captions(examples, tokenizer.encode, cache.path)
    batches = make_epoch_batches(captions, BATCH_SIZE, seed=0, epoch=1)[:NUM_READ_BATCHES]
    dataset = iter(make_dataset(captions, batches, cache.read))
    next(dataset)  # starts the threads

    def read_the_rest() -> None:
        for _ in dataset:
            pass

    return items_per_second(read_the_rest, sum(map(len, batches[1:])))


def main(argv: list[str] | None = None) -> None:
    """Makes the data, runs the training, and prints what it took."""
    parser = make_parser(__doc__, "[option ...] [-- option of train.py ...]")
    counts = {"images": (82_783, "make so many images"), "captions": (414_000, "make so many captions")}
    add_counts(parser, counts | {"steps": (50, "take so many training steps")})
    parser.add_argument("train_args", nargs="*", metavar="option", help="further options of train.py, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_data(folder, args.images, args.captions)
        result = measure_training(folder, args.train_args, args.steps)
        reading = round(measure_reading(folder))
    result = {"images": args.images, "captions": args.captions, "steps": args.steps, **result}
    print(json.dumps(result | {"reading_captions_per_second": reading}))


if __name__ == "__main__":
    run_main(main)
