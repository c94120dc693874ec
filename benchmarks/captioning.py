"""How fast captions come: batched in the graph against an eager loop, and `python inference.py` as a whole.

    python benchmarks/captioning.py
    python benchmarks/captioning.py --skip-process        # only the captions per second

The reference is the tutorial's: one picture at a time, one word at a time, eagerly. Weights are random, so
captions are cut after 12 words, COCO's mean with <end>. The whole command is timed against a process that
imports TensorFlow, builds InceptionV3 from the same weights and runs it once on the same picture. The last line
is JSON.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from common import at_least, make_parser, run_command, say  # before TensorFlow

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable

import numpy as np
import tensorflow as tf

import model
import search
import shapes
from tokenizer import END, START
from turns import median_rates, rate_of

WORDS = 12
BARE = """
import os, sys
os.environ["TF_CPP_MIN_LOG_LEVEL"] = "3"
import numpy as np
import tensorflow as tf
from PIL import Image
cnn = tf.keras.applications.InceptionV3(include_top=False, weights=sys.argv[1])
pixels = np.asarray(Image.open(sys.argv[2]).convert("RGB").resize((299, 299)), np.float32)
print(cnn(tf.keras.applications.inception_v3.preprocess_input(pixels[None])).shape)
"""


def tutorial_captions(captioner: model.Captioner, pictures: np.ndarray) -> list[list[int]]:
    """The tutorial's `evaluate`, one picture after the other."""
    results = []
    for picture in pictures:
        hidden = captioner.decoder.initial_state(1)
        encoded = captioner.encoder(tf.constant(picture[np.newaxis], tf.float32))
        word, result = tf.constant([START]), []
        for _ in range(WORDS):
            logits, hidden, _ = captioner.decoder(word, encoded, hidden)
            word = tf.argmax(logits[:, END:], axis=1, output_type=tf.int32) + END
            result.append(int(word[0]))
            if result[-1] == END:
                break
        results.append(result)
    return results


def suite_captions(
    captioner: model.Captioner, pictures: np.ndarray, batch_size: int, beam_size: int
) -> list[list[int]]:
    """The suite's searches, in batches."""
    results = []
    for start in range(0, len(pictures), batch_size):
        batch = tf.constant(pictures[start : start + batch_size])
        if beam_size == 1:
            tokens = search.greedy_search(captioner, batch, max_words=WORDS)[0]
        else:
            tokens = search.beam_search(captioner, batch, beam_size, max_words=WORDS)[0]
        results += [[int(i) for i in row if i] for row in tokens.numpy()]
    return results


def time_process(command: list[str], folder: Path) -> float:
    """The wall time of a process, in seconds."""
    start = time.perf_counter()
    subprocess.run([sys.executable, *command], cwd=folder, check=True, capture_output=True)
    return time.perf_counter() - start


def time_commands(rounds: int) -> dict[str, float]:
    """`inference.py` on one picture and the bare process, by turns: the fastest of each, in seconds."""
    import train

    with tempfile.TemporaryDirectory() as folder:
        before = os.getcwd()
        os.chdir(folder)
        try:
            shapes.draw_dataset("shapes", pictures=24)
            data = ["--annotations", "shapes/dataset_shapes.json", "--images", "shapes", "--weights", "random"]
            # Until captions are of the usual length: an untrained model says 50 words, and plots 50 panels.
            train.main([*data, "--epochs", "25", "--patience", "0", "--batch-size", "8", "--run", "run"])
        finally:
            os.chdir(before)
        picture = "shapes/images/shapes_00000.png"
        commands = {
            "inference": [str(ROOT / "inference.py"), "--run", "run", picture],
            "bare": ["-c", BARE, "run/cnn.weights.h5", picture],
        }
        times: dict[str, list[float]] = {name: [] for name in commands}
        done = subprocess.run([sys.executable, *commands["inference"]], cwd=folder, capture_output=True, text=True)
        say(f"the caption: {done.stdout.strip()}")
        for _ in range(rounds):
            for name, command in commands.items():
                times[name].append(time_process(command, Path(folder)))
                say(f"{name}: {times[name][-1]:.2f} s")
    return {name: round(min(found), 2) for name, found in times.items()}


def main(argv: list[str] | None = None) -> None:
    """Times everything by turns, and prints the ratios."""
    parser = make_parser(__doc__)
    parser.add_argument("--pictures", type=at_least(1), default=512, help="for the suite (default: 512)")
    parser.add_argument("--tutorial-pictures", type=at_least(1), default=16, help="for the tutorial (default: 16)")
    parser.add_argument("--batch-size", type=at_least(1), default=64)
    parser.add_argument("--beam-size", type=at_least(2), default=5)
    parser.add_argument("--vocabulary-size", type=at_least(10), default=5000)
    parser.add_argument("--units", type=at_least(1), default=512)
    parser.add_argument("--embedding-dim", type=at_least(1), default=256)
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each (default: 3)")
    parser.add_argument("--skip-process", action="store_true", help="leave out the whole command")
    args = parser.parse_args(argv)
    captioner = model.build(model.ModelConfig(args.vocabulary_size, args.embedding_dim, args.units))
    pictures = np.random.default_rng(0).random((args.pictures, 64, 2048), np.float32).astype(np.float16)
    few = pictures[: args.tutorial_pictures]
    runs: dict[str, tuple[Callable[[], list], int]] = {
        "greedy": (lambda: suite_captions(captioner, pictures, args.batch_size, 1), len(pictures)),
        f"beam {args.beam_size}": (
            lambda: suite_captions(captioner, pictures, max(1, args.batch_size // args.beam_size), args.beam_size),
            len(pictures),
        ),
        "tutorial": (lambda: tutorial_captions(captioner, few), len(few)),
    }
    for run, _ in runs.values():
        run()  # compiles
    ways = {name: lambda run=run: rate_of(*run) for name, run in runs.items()}
    median = {name: round(rate, 1) for name, rate in median_rates(ways, args.rounds, "captions").items()}
    result = {"words": WORDS, "captions_per_second": median}
    result["ratio"] = {name: round(rate / median["tutorial"], 1) for name, rate in median.items() if name != "tutorial"}
    if not args.skip_process:
        seconds = time_commands(args.rounds)
        result["process_seconds"] = seconds
        result["process_ratio"] = round(seconds["inference"] / seconds["bare"], 2)
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
