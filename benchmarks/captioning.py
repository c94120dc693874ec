"""Compares the speed of captioning with that of the tutorial's code, and times `python inference.py` as a process.

    python -m benchmarks.captioning
    python -m benchmarks.captioning --skip-process                         # only the captions per second

The tutorial captions one image at a time, one word at a time, eagerly. The project captions batches of images in a
graph, by greedy search and by beam search. The weights are random, so captions are cut after 12 words, COCO's mean
with <end>.

The process is compared with a bare one, which imports TensorFlow, builds InceptionV3 with the same weights and runs it
once on the same image. The last line is JSON.
"""

import argparse
import functools
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import model
import train
from benchmarks.timing import interleaved_median_rates, items_per_second
from captioning import shapes
from captioning.cli import int_at_least, log, make_parser, run_main
from captioning.config import ModelConfig
from captioning.decoding import beam_search, greedy_search
from captioning.quiet_tensorflow import tf
from captioning.settings import add_options
from captioning.special_tokens import END_ID, PAD_ID, START_ID

PROJECT = Path(__file__).resolve().parents[1]
MAX_WORDS = 12
BARE_PROCESS = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
from PIL import Image
cnn = tf.keras.applications.InceptionV3(include_top=False, weights=sys.argv[1])
pixels = np.asarray(Image.open(sys.argv[2]).convert("RGB").resize((299, 299)), np.float32)
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
        hidden = caption_model.decoder.initial_state(1)
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
    caption_model: model.CaptionModel, features: np.ndarray, batch_size: int, beam_size: int
) -> list[list[int]]:
    """Captions images with the project's searches, in batches; the arguments and result as `tutorial_captions`."""
    results = []
    for start in range(0, len(features), batch_size):
        batch = tf.constant(features[start : start + batch_size])
        if beam_size == 1:
            decoded = greedy_search(caption_model, batch, max_words=MAX_WORDS)
        else:
            decoded = beam_search(caption_model, batch, beam_size, length_penalty=1.0, max_words=MAX_WORDS)
        results += [[int(token) for token in row if token != PAD_ID] for row in decoded.tokens.numpy()]
    return results


class Variant(NamedTuple):
    """One way to caption."""

    run: Callable[[], list]
    num_images: int


def make_variants(args: argparse.Namespace) -> dict[str, Variant]:
    """Makes what is compared, with a model with random weights and random features."""
    caption_model = model.build(ModelConfig(args.vocab_size, args.embedding_dim, args.units))
    features = np.random.default_rng(0).random((args.images, 64, 2048), np.float32).astype(np.float16)
    few_features = features[: args.tutorial_images]
    beam_batch_size = max(1, args.batch_size // args.beam_size)
    greedy = functools.partial(project_captions, caption_model, features, args.batch_size, 1)
    beam = functools.partial(project_captions, caption_model, features, beam_batch_size, args.beam_size)
    tutorial = functools.partial(tutorial_captions, caption_model, few_features)
    return {
        "greedy": Variant(greedy, len(features)),
        f"beam {args.beam_size}": Variant(beam, len(features)),
        "tutorial": Variant(tutorial, len(few_features)),
    }


def measure_variants(variants: dict[str, Variant], rounds: int) -> dict[str, float]:
    """Returns the captions per second of each variant, compilation not counted."""
    for variant in variants.values():
        variant.run()  # compiles
    measurements = {name: functools.partial(items_per_second, *variant) for name, variant in variants.items()}
    rates = interleaved_median_rates(measurements, rounds, "captions")
    return {name: round(rate, 1) for name, rate in rates.items()}


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


def time_processes(rounds: int) -> dict[str, float]:
    """Times inference.py with one image, and the bare process, alternately.

    Returns:
        The shortest time of each, in seconds.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train_small_run(folder)
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
    return {name: round(min(values), 2) for name, values in times.items()}


# The command line.


def main(argv: list[str] | None = None) -> None:
    """Measures everything alternately, and prints the rates and ratios."""
    parser = make_parser(__doc__, prog="python -m benchmarks.captioning")
    count = int_at_least(1)
    parser.add_argument(
        "--images", type=count, metavar="N", default=512, help="images for the project (default: %(default)s)"
    )
    parser.add_argument(
        "--tutorial-images", type=count, metavar="N", default=16, help="images for the tutorial (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size", type=count, metavar="N", default=64, help="captions in a batch (default: %(default)s)"
    )
    parser.add_argument(
        "--beam-size",
        type=int_at_least(2),
        metavar="N",
        default=5,
        help="width of the beam search (default: %(default)s)",
    )
    parser.add_argument(
        "--rounds", type=count, metavar="N", default=3, help="measurements of each (default: %(default)s)"
    )
    parser.add_argument("--skip-process", action="store_true", help="do not time inference.py as a process")
    add_options(parser, ModelConfig, only=("vocab_size", "embedding_dim", "units"))
    args = parser.parse_args(argv)
    rates = measure_variants(make_variants(args), args.rounds)
    result = {
        "words": MAX_WORDS,
        "captions_per_second": rates,
        "ratio": {name: round(rate / rates["tutorial"], 1) for name, rate in rates.items() if name != "tutorial"},
    }
    if not args.skip_process:
        seconds = time_processes(args.rounds)
        result["process_seconds"] = seconds
        result["process_ratio"] = round(seconds["inference"] / seconds["bare"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
