"""The checks of benchmarks/gpu.py that measure speed."""

import collections
import functools
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

import features
import model
from benchmarks import captioning, training
from benchmarks import features as features_benchmark
from benchmarks.gpu_common import Data, Row, Sizes, make_data, row
from benchmarks.timing import items_per_second
from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import FeatureConfig, ModelConfig


def count_gpu_events(run: Callable[[], object]) -> collections.Counter[str]:
    """Counts the kernels and copies that a function starts on the GPU, with TensorFlow's profiler.

    Returns:
        The number of each kind, `kernels`, `MemcpyD2H` and so on; none where CUDA's library for it (CUPTI) is missing.
    """
    from tensorflow.tsl.profiler.protobuf import xplane_pb2  # not a public name of TensorFlow

    counts: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder:
        with tf.profiler.experimental.Profile(folder):
            run()
        for file in Path(folder).rglob("*.xplane.pb"):
            space = xplane_pb2.XSpace.FromString(file.read_bytes())
            for plane in (plane for plane in space.planes if "/device:GPU" in plane.name):
                for event in (event for line in plane.lines if "Stream" in line.name for event in line.events):
                    name = plane.event_metadata[event.metadata_id].name
                    counts[name if name.startswith("Mem") else "kernels"] += 1
    return counts


class Measured(NamedTuple):
    """A measurement of training."""

    captions_per_second: int  # reading included
    first_step: float  # seconds, compilation included
    variant: training.Variant


def measure_training(data: Data, sizes: Sizes, name: str, batch_size: int, *options: str) -> Measured:
    """Trains with a variant of benchmarks/training.py, and returns the median rate of three rounds."""
    variants = "fused" if name == "fused" else "plain"  # of those that its command line takes alone
    args = training.parse(["--variants", variants, "--batch-size", str(batch_size), *options])
    args.steps = args.tutorial_steps = max(2, sizes.num_steps * sizes.batch_sizes[0] // batch_size)
    variant = training.make_variant(name, args, data.config, data.captions, data.cache)
    first = 1 / items_per_second(lambda: training.run_steps(variant, 1), 1)
    training.run_steps(variant, 3)
    run = functools.partial(training.run_steps, variant, args.steps)
    rates = [items_per_second(run, args.steps * batch_size) for _ in range(3)]
    return Measured(round(statistics.median(rates)), first, variant)


def describe_rate(what: str, measured: Measured) -> Row:
    """Makes the row of a measurement of training."""
    return row(f"captions/s, {what} (first step {measured.first_step:.1f} s)", measured.captions_per_second)


def check_training(folder: Path, sizes: Sizes) -> list[Row]:
    """Measures training by batch size and precision, and counts what a step starts on the GPU."""
    data, rows = make_data(folder, sizes), []
    first_size = sizes.batch_sizes[0]
    measured = measure_training(data, sizes, "fused", first_size)  # warms the machine up, too
    for batch_size in sizes.batch_sizes:
        for precision in ("float32", "float16"):
            if precision == "float16" and not has_gpu():
                continue  # a CPU only emulates it
            options = ["--mixed-precision"] * (precision == "float16")
            measured = measure_training(data, sizes, "fused", batch_size, *options)
            rows.append(describe_rate(f"batch {batch_size}, {precision}", measured))
            if has_gpu() and (batch_size, precision) == (first_size, "float32"):
                counts = count_gpu_events(functools.partial(training.run_steps, measured.variant, 10))
                rows += [row(f"{kind} in a step", round(count / 10, 1)) for kind, count in sorted(counts.items())]
    rows.append(describe_rate(f"batch {first_size}, plain loop", measure_training(data, sizes, "plain", first_size)))
    tutorial = measure_training(data, sizes, "tutorial", first_size)
    rows.append(describe_rate(f"batch {first_size}, the tutorial's code", tutorial))
    return rows


def check_xla(folder: Path, sizes: Sizes) -> list[Row]:
    """Measures training with XLA, which compiles anew for every shape of a batch."""
    data, rows = make_data(folder, sizes), []
    for batch_size in sizes.batch_sizes[:2]:
        measured = measure_training(data, sizes, "plain", batch_size, "--jit", "on")
        rows.append(describe_rate(f"batch {batch_size}, XLA", measured))
    return rows


def check_search(folder: Path, sizes: Sizes) -> list[Row]:
    """Measures how many captions a second are decoded from features."""
    embedding_dim, units = sizes.model
    caption_model = model.build(ModelConfig(5000, embedding_dim, units))
    batch_size = sizes.batch_sizes[0]
    image_features = np.random.default_rng(0).random((batch_size, 64, 2048), np.float32)
    rows = []
    for beam_size in (1, 5):
        run = functools.partial(captioning.project_captions, caption_model, image_features, batch_size, beam_size)
        run()  # compiles
        rate = statistics.median(items_per_second(run, batch_size) for _ in range(3))
        rows.append(row(f"captions/s, beam of {beam_size}, {captioning.MAX_WORDS} words", round(rate)))
    return rows


def check_features(folder: Path, sizes: Sizes) -> list[Row]:
    """Measures the CNN alone, and caching features of JPEG files, decoding and writing included."""
    image_dir = folder / "jpegs"
    names = [Path(path).name for path in captioning.write_photos(image_dir, sizes.num_pictures)]
    cache = features.open_or_create_cache(folder / "jpeg_features", image_dir, names, "random", "float16")
    extractor = features.build_feature_extractor(cache.cnn_weights)
    pixels = np.stack([features.load_image(image_dir / name) for name in names])
    batch_size = FeatureConfig().cnn_batch_size
    run = features_benchmark.make_cnn_run(extractor, pixels)
    run(batch_size)  # compiles
    cnn = statistics.median(items_per_second(lambda: run(batch_size), len(names)) for _ in range(3))
    project = features_benchmark.project_rate(cache, image_dir, names)
    return [
        row(f"images/s, the CNN alone, batch {batch_size}", round(cnn)),
        row("images/s, features.py, decoding and writing included", round(project)),
    ]
