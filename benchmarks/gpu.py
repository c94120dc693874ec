"""Checks on a machine with a GPU that it computes what the CPU does, and measures how fast it is.

    python -m benchmarks.gpu                              # everything
    python -m benchmarks.gpu --only numbers training      # some of it
    python -m benchmarks.gpu --small                      # tiny sizes, on any machine: only whether the benchmark runs

numbers   features of drawings, losses of five training steps, and captions, each compared with those of the CPU of the
          same machine, from the same weights and inputs
search    captions per second from features, greedy and with a beam of 5, without XLA and compiled by it
features  images per second of the CNN alone, and of features.py, which also reads JPEGs and writes files
training  captions per second by batch size: fused decoder, plain loop and, on a GPU, float16
xla       the same of the step that XLA compiles, with features from files and on the GPU, all lengths compiled before
pytorch   the same of a step in PyTorch, if it is installed: features on the GPU, captions of one length
whole     seconds of features.py, of train.py --recipe best and of evaluate.py, on drawings

All data are random, the weights too. Each result is printed as a line when it is known; the last line is JSON: please
add it to a report. The exit code is 1 if a number differs from the CPU's or is not finite.
"""

import dataclasses
import functools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import features
import model
from benchmarks import captioning, pytorch, training
from benchmarks.features import draw_photos, make_cnn_run, project_rate
from benchmarks.timing import items_per_second
from captioning.base.cli import log, make_parser, run_main
from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN, CNNS, INCEPTION_V3
from captioning.config.settings import DecodeConfig, ModelConfig, TrainConfig
from captioning.data import shapes
from captioning.decoder.decoding import decode
from captioning.images.feature_cache import CNN_FILE
from captioning.images.reading import count_cores
from captioning.training.input_pipeline import TrainBatches, make_dataset
from captioning.training.resident_features import load_features

MAX_FEATURE_DIFFERENCE = 1e-3  # of float32, relative to the CPU's
MAX_LOSS_DIFFERENCE = 1e-4  # of a step, relative to the CPU's
MIN_EQUAL_CAPTIONS = 0.95  # of random weights, with which words are nearly equally probable
NUM_STEPS_COMPARED = 5
SEARCHES = ((1, False), (1, True), (5, False), (5, True))  # the beam, and whether XLA compiles it
ROUNDS = 3  # of each measurement, whose median counts
ROOT = Path(__file__).parents[1]
ON_DISK = TrainConfig(jit="off", features_on_gpu="off")  # as on a CPU


class Sizes(NamedTuple):
    """How much work the checks and measurements do."""

    num_captions: int = 12_800
    num_images: int = 1600
    model: ModelConfig = ModelConfig(vocab_size=5000)
    batch_sizes: tuple[int, ...] = (64, 256, 1024)
    num_steps: int = 30  # of the smallest batch size, in a round
    num_pictures: int = 1024  # that the CNN turns into features, some batches read ahead
    cnn: CNN = INCEPTION_V3
    num_drawings: int = 8000  # of the whole run
    whole_options: tuple[str, ...] = ("--recipe", "best", "--epochs", "8")


SMALL = Sizes(
    num_captions=40,
    num_images=16,
    model=ModelConfig(vocab_size=60, embedding_dim=8, units=16),
    batch_sizes=(8,),
    num_steps=2,
    num_pictures=4,
    cnn=CNNS["mobilenet_v3_large"].at(64),
    num_drawings=24,
    whole_options=("--recipe", "best", "--epochs", "1", "--units", "16", "--embedding-dim", "8"),
)


class Report:
    """The results, printed as they come: figures, and checks that may fail."""

    def __init__(self) -> None:
        self.results: dict[str, float | str] = {}
        self.failed: list[str] = []

    def add(self, name: str, value: float | str, passed: bool | None = None, expected: str = "") -> None:
        """Prints a result as a line; `passed` tells whether a check is met, and is None of a figure."""
        self.results[name] = value
        if passed is False:
            self.failed.append(name)
        mark = {None: "", True: "ok", False: f"FAILED, expected {expected}"}[passed]
        print(f"{name:66} {value!s:>12}  {mark}".rstrip(), flush=True)


# The numbers of a CPU.


def set_random_weights(caption_model: model.CaptionModel, scale: float) -> None:
    """Sets all weights to numbers that NumPy draws, which are the same on every device."""
    rng = np.random.default_rng(0)
    for variable in caption_model.trainable_variables:
        variable.assign(rng.normal(0, scale, variable.shape))


def compute_features(folder: Path, sizes: Sizes) -> np.ndarray:
    """Computes the features (images, L, C) of drawings; the first call draws the CNN's weights, the next reads them."""
    image_dir = folder / "drawings"
    if not image_dir.exists():
        shapes.draw_dataset(image_dir, num_images=max(4, sizes.num_pictures // 32))
    names = sorted(str(path.relative_to(image_dir)) for path in image_dir.rglob("*.png"))
    weights = folder / "cnn" / CNN_FILE
    if not weights.exists():
        features.open_or_create_cache(weights.parent, image_dir, names, "random", "float32", sizes.cnn)
    extractor = features.build_feature_extractor(str(weights), sizes.cnn)
    pixels = np.stack([features.load_image(image_dir / name, image_size=sizes.cnn.image_size) for name in names])
    return tf.function(lambda batch: extractor(batch, training=False))(pixels).numpy()


def compute_losses(data: training.TrainingData, settings: TrainConfig) -> np.ndarray:
    """Trains for a few steps, and returns the mean loss of each, (NUM_STEPS_COMPARED,)."""
    caption_model, strategy = model.build(data.config), tf.distribute.get_strategy()
    set_random_weights(caption_model, 0.05)
    image_features = load_features(data.captions.feature_paths, data.cache.read, settings, strategy)
    batches = TrainBatches(data.captions, data.cache.read if image_features is None else None, settings, strategy)
    order = batches.order(0)[:NUM_STEPS_COMPARED]
    dataset = make_dataset(data.captions, order, batches.read_features, batches.shapes)
    step = training.make_project_step(caption_model, settings, dataset.element_spec, image_features)
    losses, total = [], 0.0
    for batch in dataset:
        before, total = total, float(step(batch))
        losses.append((total - before) / np.count_nonzero(batch.tokens[:, 1:]))
    return np.array(losses)


def compute_captions(config: ModelConfig, num_images: int, with_xla: bool = False) -> dict[str, np.ndarray]:
    """Returns the captions (images, MAX_WORDS) of random features, found by both searches."""
    caption_model = model.build(config)
    set_random_weights(caption_model, 0.1)
    image_features = tf.constant(np.random.default_rng(1).random((num_images, 64, 2048), np.float32))
    captions = {}
    for name, beam_size in (("greedy captions", 1), ("captions of a beam of 3", 3)):
        search = DecodeConfig(beam_size, length_penalty=1.0, max_words=captioning.MAX_WORDS)
        tokens = decode(caption_model, image_features, search, with_xla=with_xla).tokens.numpy()  # (images, T)
        captions[name] = np.pad(tokens, ((0, 0), (0, captioning.MAX_WORDS - tokens.shape[1])))
    return captions


def compute_numbers(folder: Path, data: training.TrainingData, sizes: Sizes) -> dict[str, np.ndarray]:
    """Computes features, losses and captions, from weights and inputs that are the same on every device."""
    batch_size = sizes.batch_sizes[0]
    return {
        "features": compute_features(folder, sizes),
        "losses, fused": compute_losses(data, dataclasses.replace(ON_DISK, batch_size=batch_size)),
        "losses, plain": compute_losses(data, dataclasses.replace(ON_DISK, batch_size=batch_size, fused=False)),
        **compute_captions(data.config, batch_size),
    }


def compare_numbers(report: Report, found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Reports how far the numbers are from the CPU's."""
    for name, value in found.items():
        if "captions" in name:
            equal = float(np.mean([np.array_equal(*pair) for pair in zip(value, expected[name], strict=True)]))
            limit = f"at least {MIN_EQUAL_CAPTIONS:.0%}"
            report.add(f"{name}, equal to the CPU's", f"{equal:.0%}", equal >= MIN_EQUAL_CAPTIONS, limit)
            continue
        if name == "features":
            difference = float(np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name]))
            largest = MAX_FEATURE_DIFFERENCE
        else:
            difference = float(np.max(np.abs(value / expected[name] - 1)))
            largest = MAX_LOSS_DIFFERENCE
        passed = difference < largest
        report.add(f"{name}, relative difference to the CPU's", f"{difference:.1e}", passed, f"less than {largest:.0e}")


def check_numbers(report: Report, folder: Path, sizes: Sizes) -> None:
    """Compares features, losses and captions with those that the CPU computes."""
    data = make_data(folder, sizes)
    with tf.device("CPU:0"):
        expected = compute_numbers(folder, data, sizes)
    found = compute_numbers(folder, data, sizes)
    compiled = TrainConfig(batch_size=sizes.batch_sizes[0], jit="on", features_on_gpu="on")
    found["losses, XLA"], expected["losses, XLA"] = compute_losses(data, compiled), expected["losses, plain"]
    for name, captions in compute_captions(data.config, sizes.batch_sizes[0], with_xla=True).items():
        found[f"{name}, XLA"], expected[f"{name}, XLA"] = captions, expected[name]
    compare_numbers(report, found, expected)


# Speed.


def make_data(folder: Path, sizes: Sizes) -> training.TrainingData:
    """Makes random captions and features."""
    examples = training.make_examples(sizes.num_captions, sizes.num_images)
    return training.make_data(folder / "features", examples, sizes.model)


def median_rate(run: Callable[[], object], num_items: int) -> float:
    """Calls a function several times, and returns its median rate."""
    return statistics.median(items_per_second(run, num_items) for _ in range(ROUNDS))


def measure_search(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures how many captions a second are generated from features."""
    del folder
    caption_model = model.build(sizes.model)
    batch_size = sizes.batch_sizes[0]
    image_features = np.random.default_rng(0).random((batch_size, 64, 2048), np.float32)
    for beam_size, with_xla in SEARCHES:
        config = dataclasses.replace(captioning.GREEDY, beam_size=beam_size)
        arguments = (caption_model, image_features, batch_size, config, with_xla)
        run = functools.partial(captioning.project_captions, *arguments)
        first = 1 / items_per_second(run, 1)  # compiles
        name = f"captions/s, beam of {beam_size}" if beam_size > 1 else "captions/s, greedy"
        name += f", {captioning.MAX_WORDS} words, batch {batch_size}" + ", XLA" * with_xla + f" (first {first:.1f} s)"
        report.add(name, round(median_rate(run, batch_size)))


def measure_features(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures the CNN alone, and caching features of JPEG files."""
    image_dir = folder / "photos"
    image_dir.mkdir()
    names = draw_photos(image_dir, sizes.num_pictures)
    cache = features.open_or_create_cache(folder / "photo_features", image_dir, names, "random", "float16", sizes.cnn)
    extractor = features.build_feature_extractor(cache.cnn_weights, sizes.cnn)
    image_size = sizes.cnn.image_size
    pixels = np.stack([features.load_image(image_dir / name, image_size=image_size) for name in names])
    batch_size = features.choose_batch_size()
    run = functools.partial(make_cnn_run(extractor, pixels), batch_size)
    run()  # compiles
    report.add(f"images/s, {sizes.cnn.name} alone, batch {batch_size}", round(median_rate(run, len(names))))
    report.add("images/s, features.py, reading and writing included", round(project_rate(cache, image_dir, names)))


def measure_variant(
    report: Report, data: training.TrainingData, variant_name: str, settings: TrainConfig, num_steps: int
) -> None:
    """Measures a variant of benchmarks/training.py, reading included, and checks that its loss is finite."""
    variant = training.make_variant(variant_name, data, settings)
    first_step = 1 / items_per_second(functools.partial(training.run_steps, variant, 1), 1)
    # XLA compiles anew for each length, which an epoch has all of.
    loss = training.run_steps(variant, len(data.captions.lengths) // settings.batch_size if settings.jit == "on" else 3)
    rate = median_rate(functools.partial(training.run_steps, variant, num_steps), num_steps * settings.batch_size)
    kind = {"fused": "fused decoder", "plain": "plain loop"}[variant_name]
    kind += ", float16" * settings.mixed_precision + ", XLA" * (settings.jit == "on")
    kind += ", features resident" * (settings.features_on_gpu == "on")
    name = f"captions/s, batch {settings.batch_size}, {kind} (first step {first_step:.1f} s)"
    report.add(name, round(rate), bool(np.isfinite(loss)), "a finite loss")


def measure_training(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures training by batch size, decoder and precision."""
    data = make_data(folder, sizes)
    for batch_size in sizes.batch_sizes:
        num_steps = max(2, sizes.num_steps * sizes.batch_sizes[0] // batch_size)
        settings = dataclasses.replace(ON_DISK, batch_size=batch_size)
        measure_variant(report, data, "fused", settings, num_steps)
        measure_variant(report, data, "plain", settings, num_steps)
        if has_gpu():  # a CPU only imitates float16
            half = dataclasses.replace(settings, mixed_precision=True)
            measure_variant(report, data, "fused", half, num_steps)


def measure_xla(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures training that XLA compiles, anew for every length of captions."""
    data = make_data(folder, sizes)
    for batch_size in sizes.batch_sizes:
        num_steps = max(2, sizes.num_steps * sizes.batch_sizes[0] // batch_size)
        for features_on_gpu in ("off", "on"):
            settings = TrainConfig(batch_size=batch_size, jit="on", features_on_gpu=features_on_gpu)
            measure_variant(report, data, "plain", settings, num_steps)


def measure_pytorch(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures the same step in PyTorch."""
    torch = pytorch.find_torch()
    if torch is None:
        report.add("PyTorch", "none")
        return
    data = make_data(folder, sizes)
    for batch_size in sizes.batch_sizes:
        num_steps = max(2, sizes.num_steps * sizes.batch_sizes[0] // batch_size)
        batches = TrainBatches(data.captions, None, TrainConfig(batch_size=batch_size), tf.distribute.get_strategy())
        for name, step in pytorch.make_steps(torch, data, batches).items():
            step()  # the first is slower
            rate = median_rate(functools.partial(pytorch.run_steps, step, num_steps), num_steps * batch_size)
            report.add(f"captions/s, batch {batch_size}, PyTorch {torch.__version__}, {name}", round(rate))


def measure_whole_run(report: Report, folder: Path, sizes: Sizes) -> None:
    """Measures the commands of a whole run on drawings, each from its start to its end."""
    annotations = shapes.draw_dataset(folder / "drawings", sizes.num_drawings)
    images, weights = ["--images", str(annotations.parent)], ["--cnn-weights", "random"]
    cnn = ["--cnn", sizes.cnn.option, "--image-size", str(sizes.cnn.image_size), "--features-dir", "features"]
    data = ["--annotations", str(annotations), *images, *weights, *cnn]
    commands = {
        f"features.py, {sizes.num_drawings:,} images": ["features.py", *data],
        f"train.py {' '.join(sizes.whole_options)}": ["train.py", *data, *sizes.whole_options, "--run", "run"],
        "evaluate.py --beam-size 5": ["evaluate.py", "--run", "run", "--beam-size", "5"],
    }
    for name, (script, *options) in commands.items():
        start = time.perf_counter()
        done = subprocess.run([sys.executable, ROOT / script, *options], cwd=folder, capture_output=True, text=True)
        seconds = round(time.perf_counter() - start, 1)
        report.add(f"seconds, {name}", seconds, done.returncode == 0, "exit code 0")
        for line in done.stderr.splitlines()[-20:] if done.returncode else ():
            log(line)


# The command line.

PARTS: dict[str, Callable[[Report, Path, Sizes], None]] = {
    "numbers": check_numbers,
    "search": measure_search,
    "features": measure_features,
    "training": measure_training,
    "xla": measure_xla,
    "pytorch": measure_pytorch,
    "whole": measure_whole_run,
}


def describe_machine() -> dict[str, Any]:
    """Returns the versions, the number of cores and the names of the GPUs."""
    gpus = tf.config.list_physical_devices("GPU")
    names = [str(tf.config.experimental.get_device_details(gpu).get("device_name")) for gpu in gpus]
    return {
        "Python, TensorFlow, Keras": f"{sys.version.split()[0]}, {tf.__version__}, {tf.keras.__version__}",
        "cores": count_cores(),
        "GPU": ", ".join(names) or "none",
    }


def main(argv: list[str] | None = None) -> None:
    """Runs the parts; exits with 1 if a check has failed."""
    parser = make_parser(__doc__)
    parser.add_argument("--only", nargs="+", choices=PARTS, metavar="PART", help=f"run some of {', '.join(PARTS)}")
    parser.add_argument("--small", action="store_true", help="take tiny sizes, of which no figure means anything")
    args = parser.parse_args(argv)
    report = Report()
    for name, value in describe_machine().items():
        report.add(name, value)
    for name, run in PARTS.items():
        if args.only is None or name in args.only:
            with tempfile.TemporaryDirectory() as folder:
                run(report, Path(folder), SMALL if args.small else Sizes())
    print(json.dumps({"small": args.small, **report.results, "failed": report.failed}))
    sys.exit(int(bool(report.failed)))


if __name__ == "__main__":
    run_main(main)
