"""The checks of benchmarks/gpu.py, each of which runs in a process of its own.

    python -m benchmarks.gpu_checks numbers FOLDER --reference   # on a CPU: what the GPU is compared with
    python -m benchmarks.gpu_checks numbers FOLDER

The last line is JSON: the rows of the check, each with what was looked at, its value, and, where there is one, what
was expected and whether it is so.
"""

import csv
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

import data_utils
import demo
import features
import inference
import model
from benchmarks import gpu_speed, training
from benchmarks.gpu_common import SMALL, Data, Row, Sizes, make_data, row
from captioning.base.cli import make_parser, run_main
from captioning.base.files import read_json, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import TrainConfig
from captioning.data import shapes
from captioning.decoder.decoding import beam_search, greedy_search
from captioning.images.feature_cache import CNN_FILE
from captioning.images.reading import count_cores
from captioning.training.input_pipeline import make_dataset, make_epoch_batches

PROJECT = Path(__file__).resolve().parents[1]
MAX_FEATURE_DIFFERENCE = 1e-3  # relative, in float32
MAX_LOSS_DIFFERENCE = 1e-4  # relative, of a step
MIN_EQUAL_CAPTIONS = 0.95  # of an untrained model, where words are nearly equally probable
MAX_MEMORY = 4e9  # bytes, of training with batches of 64
NUM_STEPS = 5  # whose losses are compared
SMALL_TRAINING = ["train.py", "--dataset", "shapes", "--num-captions", "600", "--cnn-weights", "random"]
SMALL_TRAINING += ["--features-dir", "features", "--run", "run"]


# Device.


def check_device(folder: Path, sizes: Sizes) -> list[Row]:
    """Says what there is, and computes one operation on it."""
    gpus = tf.config.list_physical_devices("GPU")
    details = [tf.config.experimental.get_device_details(gpu) for gpu in gpus]
    names = [f"{d.get('device_name')} {'.'.join(map(str, d.get('compute_capability', ())))}" for d in details]
    value = float(tf.reduce_sum(tf.tanh(tf.ones(8))))
    return [
        row("TensorFlow, Keras", f"{tf.__version__}, {keras.__version__}"),
        row("Python, cores", f"{sys.version.split()[0]}, {count_cores()}"),
        row("GPU", ", ".join(names) or "none"),
        row("CUDA that TensorFlow was built with", str(tf.sysconfig.get_build_info().get("cuda_version", "none"))),
        row("one operation", round(value, 4), "6.0928", abs(value - 6.0928) < 1e-3),
    ]


# The same numbers as on a CPU.


def losses_of_steps(data: Data, batch_size: int, fused: bool) -> np.ndarray:
    """Trains a few steps from the same weights, and returns the mean loss of each: (NUM_STEPS,)."""
    tf.keras.utils.set_random_seed(0)
    config = TrainConfig(batch_size=batch_size, jit="off", fused=fused)
    caption_model = model.build(data.config)
    rng = np.random.default_rng(0)
    for variable in caption_model.trainable_variables:  # not those that the device draws
        variable.assign(rng.normal(0, 0.05, variable.shape))
    caption_model.decoder.fused = fused
    batches = make_epoch_batches(data.captions, batch_size, seed=0, epoch=0)[:NUM_STEPS]
    dataset = make_dataset(data.captions, batches, data.cache.read)
    step = training.make_project_step(caption_model, config, dataset.element_spec)
    losses, total = [], 0.0
    for batch in dataset:
        before, total = total, float(step(batch))
        losses.append((total - before) / np.count_nonzero(batch.tokens[:, 1:]))
    return np.array(losses)


def compute_features(folder: Path, num_images: int) -> np.ndarray:
    """Computes the features of some drawings with a CNN of random weights, which the CPU draws: (images, 64, 2048)."""
    image_dir = folder / "drawings"
    if not image_dir.exists():
        shapes.draw_dataset(image_dir, num_images=num_images)
    names = sorted(str(path.relative_to(image_dir)) for path in image_dir.rglob("*.png"))
    weights = folder / "random_cnn" / CNN_FILE
    if not weights.exists():
        features.open_or_create_cache(weights.parent, image_dir, names, "random", "float32")
    extractor = features.build_feature_extractor(str(weights))
    pixels = np.stack([features.load_image(image_dir / name) for name in names])
    return tf.function(lambda batch: extractor(batch, training=False))(pixels).numpy()


def compute_numbers(folder: Path, sizes: Sizes) -> dict[str, Any]:
    """Computes features, losses and captions, all from weights and inputs that no device draws."""
    data = make_data(folder, sizes)
    batch_size = sizes.batch_sizes[0]
    caption_model = model.build(data.config)
    rng = np.random.default_rng(1)
    for variable in caption_model.trainable_variables:
        variable.assign(rng.normal(0, 0.1, variable.shape))
    image_features = tf.constant(rng.random((batch_size, 64, 2048), np.float32))
    greedy = greedy_search(caption_model, image_features, max_words=12)
    beam = beam_search(caption_model, image_features, 3, length_penalty=1.0, max_words=12)
    return {
        "features": compute_features(folder, max(4, sizes.num_pictures // 8)),
        "losses, fused": losses_of_steps(data, batch_size, fused=True),
        "losses, plain": losses_of_steps(data, batch_size, fused=False),
        "captions, greedy": greedy.tokens.numpy(),
        "captions, beam of 3": beam.tokens.numpy(),
    }


def check_numbers(folder: Path, sizes: Sizes, reference: bool) -> list[Row]:
    """Computes the numbers, and compares them with the CPU's."""
    file = folder / "numbers.npz"
    numbers = compute_numbers(folder, sizes)
    if reference:
        np.savez(file, **numbers)
        return []
    rows = []
    with np.load(file, allow_pickle=False) as expected:
        for name, value in numbers.items():
            if name.startswith("captions"):
                equal = float(np.mean([np.array_equal(a, b) for a, b in zip(value, expected[name], strict=True)]))
                text = f"at least {100 * MIN_EQUAL_CAPTIONS:.0f} %"
                rows.append(row(f"{name}, as on the CPU", f"{100 * equal:.0f} %", text, equal >= MIN_EQUAL_CAPTIONS))
                continue
            limit = MAX_FEATURE_DIFFERENCE if name == "features" else MAX_LOSS_DIFFERENCE
            if name == "features":
                difference = float(np.linalg.norm(value - expected[name]) / np.linalg.norm(expected[name]))
            else:
                difference = float(np.max(np.abs(value / expected[name] - 1)))
            what = f"{name}, relative difference to the CPU"
            rows.append(row(what, f"{difference:.1e}", f"less than {limit:.0e}", difference < limit))
    return rows


# Every way to train takes a step.


def train_variant(data: Data, batch_size: int, mixed_precision: bool, jit: bool) -> tuple[float, float]:
    """Takes two steps; returns the loss of the second, and the seconds of the first, compilation included."""
    config = TrainConfig(batch_size=batch_size, mixed_precision=mixed_precision, jit="on" if jit else "off")
    caption_model = model.build(data.config, mixed_precision=mixed_precision)
    caption_model.decoder.fused = data.config.attention == "soft" and not jit
    batches = make_epoch_batches(data.captions, batch_size, seed=0, epoch=0)[:1] * 2
    dataset = make_dataset(data.captions, batches, data.cache.read, static_shapes=jit)
    step = training.make_project_step(caption_model, config, dataset.element_spec)
    losses, seconds = [], []
    for batch in dataset:
        start = time.perf_counter()
        losses.append(float(step(batch)))
        seconds.append(time.perf_counter() - start)
    return losses[1] - losses[0], seconds[0]


def check_variants(folder: Path, sizes: Sizes) -> list[Row]:
    """Takes steps with all combinations of attention, precision and compiler."""
    rows = []
    small = sizes._replace(model=(16, 32), num_captions=min(sizes.num_captions, 640))
    for attention, mixed_precision, jit in itertools.product(("soft", "hard"), (False, True), (False, True)):
        loss, seconds = train_variant(make_data(folder, small, attention), 16, mixed_precision, jit)
        what = f"{attention}, {'float16' if mixed_precision else 'float32'}{', XLA' * jit}: first step"
        rows.append(row(what, f"{seconds:.1f} s", "a finite loss", bool(np.isfinite(loss))))
    return rows


# Memory, and what is more than a step.


def check_memory(folder: Path, sizes: Sizes) -> list[Row]:
    """Measures the memory of training, and starts a second process beside it."""
    data = make_data(folder, sizes)
    gpu_speed.measure_training(data, sizes._replace(num_steps=2), "fused", sizes.batch_sizes[0])
    peak = tf.config.experimental.get_memory_info("GPU:0")["peak"]
    code = (
        "from captioning.base.quiet_tensorflow import tf; a = tf.ones((512, 512)); print(float(tf.reduce_sum(a @ a)))"
    )
    second = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True)
    growth = [tf.config.experimental.get_memory_growth(gpu) for gpu in tf.config.list_physical_devices("GPU")]
    grows = all(growth) or os.environ.get("TF_FORCE_GPU_ALLOW_GROWTH") == "true"
    return [
        row("memory grows with need", grows, "True", grows),
        row("peak in training, batch 64", f"{peak / 1e9:.2f} GB", f"< {MAX_MEMORY / 1e9:.0f} GB", peak < MAX_MEMORY),
        row("a second process beside it", second.stdout.strip() or "fails", "134217728.0", second.returncode == 0),
    ]


def run_script(folder: Path, *command: str) -> subprocess.Popen:
    """Starts a script of the project in a folder, its output in a file there."""
    with (folder / "output.txt").open("a") as output:
        return subprocess.Popen(
            [sys.executable, str(PROJECT / command[0]), *command[1:]], cwd=folder, stdout=output, stderr=output
        )


def check_resume(folder: Path, sizes: Sizes) -> list[Row]:
    """Kills a training within an epoch, and continues it."""
    place = folder / "resume"
    place.mkdir()
    command = [*SMALL_TRAINING, "--epochs", "200", "--checkpoint-minutes", "0.02", "--patience", "0"]
    process = run_script(place, *command)
    deadline = time.monotonic() + 100
    while not list(place.glob("run/checkpoints/last/*.index")) and time.monotonic() < deadline:
        if process.poll() is not None:
            break
        time.sleep(0.2)
    time.sleep(2)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (place / "output.txt").unlink()
    command[command.index("200")] = "1"  # it has more than that, or goes on to it
    code = run_script(place, *command).wait()
    output = (place / "output.txt").read_text(errors="replace")
    passed = code == 0 and "resuming" in output
    value = "resumed" if passed else output.strip().splitlines()[-1][:100]
    return [row("training that was killed", value, "resumed", passed)]


def check_demo(folder: Path, sizes: Sizes) -> list[Row]:
    """Runs the demo."""
    place = folder / "demo"
    place.mkdir()
    start = time.monotonic()
    code = run_script(place, "demo.py").wait()
    minutes = (time.monotonic() - start) / 60
    lines = (place / "output.txt").read_text(errors="replace").strip().splitlines()
    prefix = "test images captioned exactly right: "
    exact = next((float(line.removeprefix(prefix).split()[0]) for line in lines if line.startswith(prefix)), 0.0)
    return [
        row("exit code", code, "0", code == 0),
        row("test images captioned exactly right", f"{exact} %", "at least 90 %", exact >= 90),
        row("minutes", round(minutes, 1)),
    ]


def check_captions(folder: Path, sizes: Sizes, reference: bool) -> list[Row]:
    """Captions the demo's test images with its run, from the images on, and compares with the CPU's captions."""
    os.chdir(folder / "demo")
    captioner = inference.Captioner.load(demo.RUN)
    dataset = data_utils.load_run_dataset(captioner.config)
    paths = [dataset.image_dir / example.image_path for example in dataset.split("test")]
    captions = [caption.text for caption in captioner.caption_batch(paths)]
    file = folder / "captions.json"
    if reference:
        write_json(file, captions)
        return []
    equal = float(np.mean([a == b for a, b in zip(captions, read_json(file), strict=True)]))
    return [row("captions of images, as on the CPU", f"{100 * equal:.1f} %", "at least 99 %", equal >= 0.99)]


def check_several(folder: Path, sizes: Sizes) -> list[Row]:
    """Compares a training on all GPUs with one on a single GPU."""
    num_gpus = len(tf.config.list_physical_devices("GPU"))
    if num_gpus < 2:
        return [row("left out", f"{num_gpus} GPU")]
    losses = {}
    for strategy in ("none", "mirrored"):
        place = folder / strategy
        place.mkdir()
        command = [*SMALL_TRAINING, "--epochs", "2", "--strategy", strategy]
        run_script(place, *command).wait()
        with (place / "run/history.csv").open() as file:
            losses[strategy] = [float(line["train_loss"]) for line in csv.DictReader(file)]
    difference = max(abs(a / b - 1) for a, b in zip(losses["none"], losses["mirrored"], strict=True))
    return [row(f"loss of {num_gpus} GPUs by that of one", f"{difference:.1e}", "less than 1e-2", difference < 1e-2)]


# The command line.


CHECKS: dict[str, Callable[..., list[Row]]] = {
    "device": check_device,
    "numbers": check_numbers,
    "variants": check_variants,
    "training": gpu_speed.check_training,
    "search": gpu_speed.check_search,
    "features": gpu_speed.check_features,
    "memory": check_memory,
    "resume": check_resume,
    "demo": check_demo,
    "captions": check_captions,
    "several": check_several,
    "xla": gpu_speed.check_xla,
}
COMPARED = ("numbers", "captions")


def main(argv: list[str] | None = None) -> None:
    """Runs one check and prints its rows."""
    parser = make_parser(__doc__, prog="python -m benchmarks.gpu_checks")
    parser.add_argument("check", choices=CHECKS, help="the check")
    parser.add_argument("folder", type=Path, help="what the checks share")
    parser.add_argument("--small", action="store_true", help="tiny sizes")
    parser.add_argument("--reference", action="store_true", help="keep the numbers for the comparison")
    args = parser.parse_args(argv)
    rows = CHECKS[args.check](
        args.folder, SMALL if args.small else Sizes(), *[args.reference] * (args.check in COMPARED)
    )
    print(json.dumps(rows))


if __name__ == "__main__":
    run_main(main)
