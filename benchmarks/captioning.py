"""Compares the speed of captioning with that of the tutorial's code, with that of the CNN alone, and of a process.

    python -m benchmarks.captioning
    python -m benchmarks.captioning --only search                          # captions per second from features
    python -m benchmarks.captioning --only folder --beam-size 3            # images per second of a folder

search: the tutorial captions one image at a time, one word at a time, eagerly. The project captions batches of images
in a graph, by greedy search, by beam search, and by drawing 16 captions of each. The weights are random, so captions
are cut after 12 words, COCO's mean with <end>.

folder: a folder of JPEG files of 500x375 pixels, the size of Flickr8k's, is captioned into a table, as `python
inference.py DIR --csv FILE` does it. The CNN alone computes the features of as many images that are in memory already,
in batches of the same size. The growth of memory is that from the first half of the folder to the end.

process: `python inference.py` with one image is compared with a bare process, which imports TensorFlow, builds
InceptionV3 with the same weights and runs it once on the same image.

Each comparison is measured alternately. The last line is JSON.
"""

import argparse
import contextlib
import dataclasses
import functools
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import features
import inference
import model
import train
from benchmarks.features import draw_photos
from benchmarks.timing import add_counts, interleaved_median_rates, items_per_second
from captioning.base.cli import int_at_least, log, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, PAD_ID, START_ID
from captioning.config.options import add_options
from captioning.config.settings import DecodeConfig, ModelConfig
from captioning.data import shapes
from captioning.decoder.decoding import decode
from captioning.output.results import CsvWriter, TextWriter

PROJECT = Path(__file__).resolve().parents[1]
MAX_WORDS = 12
GREEDY = DecodeConfig(max_words=MAX_WORDS)
SAMPLES = DecodeConfig(sample=True, captions=16, max_words=MAX_WORDS)  # of each image
BARE_PROCESS = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
from PIL import Image
cnn = tf.keras.applications.InceptionV3(include_top=False, weights=sys.argv[1])
pixels = np.asarray(Image.open(sys.argv[2], formats=["PNG"]).convert("RGB").resize((299, 299)), np.float32)
print(cnn(tf.keras.applications.inception_v3.preprocess_input(pixels[None])).shape)
"""


def tutorial_captions(caption_model: model.CaptionModel, features: np.ndarray) -> list[list[int]]:
    """Captions images with the tutorial's `evaluate`, one image after the other.

    Args:
        caption_model: the model.
        features: (images, 64, 2048).

    Returns:
        The token ids of each caption, with <end>.
    """
    results = []
    for image_features in features:
        hidden = tf.zeros((1, caption_model.decoder.units))  # the tutorial's `reset_state`
        encoded = caption_model.encoder(tf.constant(image_features[np.newaxis], tf.float32))  # (1, 64, 256)
        dec_input = tf.constant([START_ID])
        result: list[int] = []
        for _ in range(MAX_WORDS):
            predictions, hidden, _ = caption_model.decoder(dec_input, encoded, hidden)
            # The most probable word. The special tokens before <end> are not generated, as in the project's searches.
            dec_input = tf.argmax(predictions[:, END_ID:], axis=1, output_type=tf.int32) + END_ID  # (1,)
            result.append(int(dec_input[0]))
            if result[-1] == END_ID:
                break
        results.append(result)
    return results


def project_captions(
    caption_model: model.CaptionModel,
    features: np.ndarray,
    batch_size: int,
    config: DecodeConfig = GREEDY,
    with_xla: bool = False,
) -> list[list[int]]:
    """Captions images with the project's searches, in batches; the arguments and result as `tutorial_captions`."""
    results = []
    for start in range(0, len(features), batch_size):
        batch = tf.constant(features[start : start + batch_size])
        decoded = decode(caption_model, batch, config, with_xla=with_xla)
        results += [[int(token) for token in row if token != PAD_ID] for row in decoded.tokens.numpy()]
    return results


def measure_search(args: argparse.Namespace) -> dict[str, Any]:
    """Measures the captions per second of the searches, with a model with random weights and random features."""
    caption_model = model.build(ModelConfig(args.vocab_size, args.embedding_dim, args.units))
    features = np.random.default_rng(0).random((args.images, 64, 2048), np.float32).astype(np.float16)
    few_features = features[: args.tutorial_images]
    beam_batch_size = max(1, args.batch_size // args.beam_size)
    sample_batch_size = max(1, args.batch_size // SAMPLES.captions)
    num_samples = len(features) * SAMPLES.captions
    beam_search = dataclasses.replace(GREEDY, beam_size=args.beam_size)
    greedy = functools.partial(project_captions, caption_model, features, args.batch_size)
    beam = functools.partial(project_captions, caption_model, features, beam_batch_size, beam_search)
    sampled = functools.partial(project_captions, caption_model, features, sample_batch_size, SAMPLES)
    tutorial = functools.partial(tutorial_captions, caption_model, few_features)
    measurements = {
        "greedy": functools.partial(items_per_second, greedy, len(features)),
        f"beam {args.beam_size}": functools.partial(items_per_second, beam, len(features)),
        "sampled": functools.partial(items_per_second, sampled, num_samples),
        "tutorial": functools.partial(items_per_second, tutorial, len(few_features)),
    }
    for measure in measurements.values():
        measure()  # compiles
    rates = interleaved_median_rates(measurements, args.rounds, "captions")
    return {
        "words": MAX_WORDS,
        "captions_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "ratio": {name: round(rate / rates["tutorial"], 1) for name, rate in rates.items() if name != "tutorial"},
    }


# A folder of images.


def resident_mb() -> float:
    """Returns the memory of this process that is in use, in MB."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * resource.getpagesize() / 1e6


def measure_folder(folder: Path, args: argparse.Namespace) -> dict[str, float]:
    """Measures the images per second of a folder and of the CNN alone, and the growth of memory.

    Args:
        folder: has the run of `train_small_run`; the images are written into it.
        args: the command line.
    """
    config = DecodeConfig(beam_size=args.folder_beam_size, max_words=MAX_WORDS)
    captioner = inference.Captioner.load(folder / "run", config)
    photos = folder / "photos"
    photos.mkdir()
    paths = [str(photos / name) for name in draw_photos(photos, args.folder_images)]
    size = inference.BATCH_SIZE
    pixels = np.stack([features.load_image(path) for path in paths[:size]])
    memory: list[float] = []

    def caption_folder() -> None:
        with contextlib.closing(
            CsvWriter(folder / f"captions{len(memory)}.csv", captioner.run, config, paths)
        ) as table:
            for half in (paths[: len(paths) // 2], paths[len(paths) // 2 :]):
                inference.caption_images(captioner, half, [table])
                memory.append(resident_mb())

    def run_cnn() -> None:
        for start in range(0, len(paths), size):
            captioner.extract_features(pixels[: len(paths) - start])

    measurements = {
        "cnn": functools.partial(items_per_second, run_cnn, len(paths)),
        "folder": functools.partial(items_per_second, caption_folder, len(paths)),
    }
    inference.caption_images(captioner, paths[: 2 * size + 1], [TextWriter()])  # compiles
    rates = interleaved_median_rates(measurements, args.rounds, "images")
    return {
        "images": len(paths),
        **{f"{name}_images_per_second": round(rate, 2) for name, rate in rates.items()},
        "ratio": round(rates["folder"] / rates["cnn"], 3),
        "memory_growth_mb": round(memory[-1] - memory[0], 1),
    }


# The whole process.


def train_small_run(folder: Path) -> None:
    """Trains a run on a few shapes, until its captions have the usual length.

    An untrained model generates 50 words, and their plot has 50 panels.
    """
    annotations = shapes.draw_dataset(folder / "shapes", num_images=24)
    data_args = ["--annotations", str(annotations), "--images", str(folder / "shapes")]
    feature_args = ["--cnn-weights", "random", "--features-dir", str(folder / "features")]
    train_args = ["--epochs", "25", "--patience", "0", "--batch-size", "8", "--run", str(folder / "run")]
    train.main([*data_args, *feature_args, *train_args])


def time_process(command: list[str], folder: Path) -> float:
    """Returns the wall time of a Python process, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def time_processes(folder: Path, rounds: int) -> dict[str, float]:
    """Times inference.py with one image, and the bare process, alternately.

    Args:
        folder: has the run of `train_small_run`.
        rounds: how often each is timed.

    Returns:
        The shortest time of each in seconds, and their ratio.
    """
    image = "shapes/images/shapes_00000.png"
    commands = {
        "inference": [str(PROJECT / "inference.py"), "--run", "run", image],
        "bare": ["-c", BARE_PROCESS, "run/cnn.weights.h5", image],
    }
    first = subprocess.run([sys.executable, *commands["inference"]], cwd=folder, capture_output=True, text=True)
    log(f"caption: {first.stdout.strip()}")
    times: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds):
        for name, command in commands.items():
            times[name].append(time_process(command, folder))
            log(f"{name}: {times[name][-1]:.2f} s")
    seconds = {name: round(min(values), 2) for name, values in times.items()}
    return {**seconds, "ratio": round(seconds["inference"] / seconds["bare"], 2)}


# The command line.


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parses the command line."""
    parser = make_parser(__doc__)
    text = "measure one of the three (default: all)"
    parser.add_argument("--only", choices=("search", "folder", "process"), help=text)
    counts = {
        "images": (512, "search for captions of so many images"),
        "tutorial-images": (16, "let the tutorial's code caption so many"),
        "batch-size": (64, "search for so many captions at a time"),
        "folder-images": (1000, "caption a folder of so many images"),
        "rounds": (3, "measure each variant so often"),
    }
    add_counts(parser, counts)
    text = "search with a beam of N, of the folder too if it is given (default: 5, and 1 for the folder)"
    parser.add_argument("--beam-size", type=int_at_least(2), metavar="N", help=text)
    add_options(parser, ModelConfig, only=("vocab_size", "embedding_dim", "units"))
    args = parser.parse_args(argv)
    args.folder_beam_size = args.beam_size or 1
    args.beam_size = args.beam_size or 5
    return args


def main(argv: list[str] | None = None) -> None:
    """Measures everything alternately, and prints the rates and ratios."""
    args = parse(argv)
    result: dict[str, Any] = {}
    if args.only in (None, "search"):
        result["search"] = measure_search(args)
    if args.only != "search":
        with tempfile.TemporaryDirectory() as name:
            train_small_run(Path(name))
            if args.only != "process":
                result["folder"] = measure_folder(Path(name), args)
            if args.only != "folder":
                result["process_seconds"] = time_processes(Path(name), args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
