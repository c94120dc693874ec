"""Compares the speed of caching features with that of InceptionV3 alone, and with the tutorial's loop.

    python -m benchmarks.features
    python -m benchmarks.features --images 96 --batch-sizes 16 32
    python -m benchmarks.features --only cnns --images 64

cnn: the variants, in images per second:

    project   features.cache_features: decodes JPEGs of 500x375 pixels, runs the CNN and writes the files.
    around    the same with a CNN that costs nothing: how many images a second reading, copying and writing allow.
    cnn       the CNN alone, on pixels that are in memory, with the best of several batch sizes.
    tutorial  the tutorial's loop: tf.data decodes, the CNN is called eagerly for batches of 16 images, and np.save
              writes a file for each image.

decoding: how many JPEGs of several sizes one core turns into pixels in a second, decoded in full and scaled.

cnns: the CNNs of captioning/config/cnns.py alone, in images per second of a core's time, whatever else the cores do,
      and the multiplications for an image. Only if asked for.

The weights are random, which does not change the speed. The last line is JSON.
"""

import functools
import json
import math
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
from PIL import Image

import features
from benchmarks.timing import add_counts, interleaved_median_rates, items_per_second
from captioning.base.cli import int_at_least, log, make_parser, run_main
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNNS, INCEPTION_V3
from captioning.images.cnn_loader import find_cnn
from captioning.images.feature_cache import FeatureCache
from captioning.images.reading import read_image

BATCH_SIZES = [8, 16, 32, 64, 128]
CNN_BATCH_SIZE = 32
PHOTO_SIZE = (500, 375)  # as most of COCO and Flickr
SIZES = (PHOTO_SIZE, (640, 480), (4000, 3000))
MIN_CPU_SECONDS = 0.2  # of a measurement of decoding


def draw_photos(folder: Path, num_images: int, size: tuple[int, int] = PHOTO_SIZE) -> list[str]:
    """Writes JPEGs that take as long to decode as photographs: smooth noise, about 60 KB each at 500x375 pixels."""
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(num_images)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (size[1] // 8 + 1, size[0] // 8 + 1, 3), np.uint8))
        pixels = np.asarray(coarse.resize(size, Image.Resampling.BICUBIC)).astype(np.int16)  # (height, width, 3)
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=90)
    return names


# Decoding.


def decoding_rate(path: Path, min_jpeg_side: int | None) -> float:
    """Measures how many times in a second one core makes pixels of an image."""
    start, count = time.thread_time(), 0
    while (seconds := time.thread_time() - start) < MIN_CPU_SECONDS or not count:
        features.to_pixels(read_image(path, min_jpeg_side))
        count += 1
    return count / seconds


def measure_decoding(root: Path, sizes: tuple[tuple[int, int], ...], rounds: int) -> dict[str, float]:
    """Measures decoding of JPEGs, in full and scaled, in images per second of a core; see `measure` for the rest."""
    variants = {}
    for width, height in sizes:
        folder = root / f"{width}x{height}"
        folder.mkdir()
        [name] = draw_photos(folder, 1, (width, height))
        for decoding, min_jpeg_side in (("full", None), ("scaled", 2 * INCEPTION_V3.image_size)):
            run = functools.partial(decoding_rate, folder / name, min_jpeg_side)
            variants[f"{width}x{height}, {decoding}"] = run
    rates = interleaved_median_rates(variants, rounds, "images")
    return {name: round(rate, 1) for name, rate in rates.items()}


# The CNN.


def tutorial_loop(extractor: tf.keras.Model, image_dir: Path, names: list[str], output: Path) -> None:
    """Caches features as the tutorial does: eagerly, 16 images at a time, in float32."""

    def load_image(path: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), channels=3), (299, 299))
        return tf.cast(image, tf.uint8), path

    dataset = tf.data.Dataset.from_tensor_slices([str(image_dir / name) for name in names])
    dataset = dataset.map(load_image, num_parallel_calls=tf.data.AUTOTUNE).batch(16)
    for images, paths in dataset:
        batch_features = extractor(images, training=False)  # (16, 64, 2048)
        for image_features, path in zip(batch_features, paths, strict=True):
            np.save(output / f"{Path(path.numpy().decode()).name}.npy", image_features.numpy())


def project_rate(cache: FeatureCache, image_dir: Path, names: list[str]) -> float:
    """Measures `features.cache_features`, in images per second, while it reads, computes and writes at the same time.

    Some batches are read ahead: the time begins after the files of those that were read while the CNN was built, and
    ends with those of the batch that is computed when the last image is read.
    """
    for path in cache.folder.glob("*.npy"):
        path.unlink()
    num_batches = features.NUM_AHEAD + 2  # that are read ahead, computed and written at a time
    batch_size = max(1, min(features.choose_batch_size(), len(names) // (2 * num_batches + 2)))
    features.cache_features(cache, image_dir, names, batch_size)
    written = sorted(path.stat().st_mtime_ns for path in cache.folder.glob("*.npy"))
    first = min(num_batches * batch_size, len(names) // 2) - 1
    last = max(len(names) - 1 - num_batches * batch_size, first + 1)
    return (last - first) / (written[last] - written[first]) * 1e9


def around_rate(cache: FeatureCache, image_dir: Path, names: list[str]) -> float:
    """Measures `features.cache_features` with a CNN that costs nothing, in images per second, its start included."""

    def free_cnn(pixels: tf.Tensor, training: bool) -> tf.Tensor:
        return tf.zeros((tf.shape(pixels)[0], *cache.shape))

    for path in cache.folder.glob("*.npy"):
        path.unlink()
    with mock.patch.object(features, "build_feature_extractor", lambda *_: free_cnn):
        return items_per_second(lambda: features.cache_features(cache, image_dir, names), len(names))


def make_cnn_run(extractor: tf.keras.Model, pixels: np.ndarray) -> Callable[[int], None]:
    """Makes a function that runs the CNN on all pixels (images, size, size, 3), in batches of its argument."""
    extract = tf.function(lambda batch: extractor(batch, training=False), reduce_retracing=True)

    def run(batch_size: int) -> None:
        for start in range(0, len(pixels), batch_size):
            batch_features = extract(tf.constant(pixels[start : start + batch_size]))
        batch_features.numpy()  # waits for the last batch

    return run


def find_best_batch_size(run: Callable[[int], None], batch_sizes: list[int], num_images: int) -> int:
    """Returns the batch size with which the CNN alone is fastest."""
    for batch_size in batch_sizes:
        run(batch_size)  # compiles
    rates = {batch_size: items_per_second(functools.partial(run, batch_size), num_images) for batch_size in batch_sizes}
    text = ", ".join(f"{batch_size}: {rate:.1f}" for batch_size, rate in rates.items())
    log(f"the CNN alone, images/s by batch size: {text}")
    return max(rates, key=lambda batch_size: rates[batch_size])


def measure_cnn(root: Path, num_images: int, batch_sizes: list[int], rounds: int) -> dict[str, Any]:
    """Measures the variants with the CNN.

    Args:
        root: an empty folder.
        num_images: images in a measurement; the tutorial's loop has a quarter of them.
        batch_sizes: those to try with the CNN alone.
        rounds: measurements of each variant.

    Returns:
        What the benchmark prints.
    """
    image_dir, tutorial_dir = root / "images", root / "tutorial"
    image_dir.mkdir()
    tutorial_dir.mkdir()
    num_images = max(2, num_images)  # `project_rate` needs two
    names = draw_photos(image_dir, num_images)
    megabytes = sum((image_dir / name).stat().st_size for name in names) / num_images / 1e6
    cache = features.open_or_create_cache(root / "cache", image_dir, names, "random", "float16")
    extractor = features.build_feature_extractor(cache.cnn_weights)
    run_cnn = make_cnn_run(extractor, np.stack([features.load_image(image_dir / name) for name in names]))
    best = find_best_batch_size(run_cnn, batch_sizes, num_images)
    few_names = names[: max(2, num_images // 4)]
    tutorial = functools.partial(tutorial_loop, extractor, image_dir, few_names, tutorial_dir)
    variants = {
        "cnn": functools.partial(items_per_second, functools.partial(run_cnn, best), num_images),
        "project": functools.partial(project_rate, cache, image_dir, names),
        "around": functools.partial(around_rate, cache, image_dir, names),
        "tutorial": functools.partial(items_per_second, tutorial, len(few_names)),
    }
    rates = interleaved_median_rates(variants, rounds, "images")
    rates = {name: round(rate, 2) for name, rate in rates.items()}
    return {
        "images": num_images,
        "megabytes_per_jpeg": round(megabytes, 3),
        "cnn_batch_size": best,
        "images_per_second": rates,
        "share_of_cnn": round(rates["project"] / rates["cnn"], 3),
        "ratio_to_tutorial": round(rates["project"] / rates["tutorial"], 2),
    }


# All CNNs.


def count_multiplications(model: tf.keras.Model) -> int:
    """Counts the multiplications of convolutions and Dense layers for one image."""
    total = 0
    for layer in model.layers:
        if isinstance(layer, tf.keras.Model):
            total += count_multiplications(layer)
        elif isinstance(kernel := getattr(layer, "kernel", None), tf.keras.Variable):
            total += math.prod(layer.output.shape[1:-1]) * math.prod(kernel.shape)
    return total


def measure_cnns(num_images: int, rounds: int) -> dict[str, dict[str, float]]:
    """Measures all CNNs alone, alternately, with images of their own size; returns the figures of each."""

    def rate_of_a_core(run: Callable[[], None]) -> float:
        start = time.process_time()
        run()
        return num_images / (time.process_time() - start)

    figures, variants = {}, {}
    for option, cnn in CNNS.items():
        extractor = features.build_feature_extractor("random", cnn)
        pixels = np.random.default_rng(0).integers(0, 256, (num_images, *extractor.input_shape[1:]), np.uint8)
        run_cnn = make_cnn_run(extractor, pixels)
        run_cnn(CNN_BATCH_SIZE)  # compiles
        run = functools.partial(run_cnn, CNN_BATCH_SIZE)
        variants[option] = functools.partial(rate_of_a_core, run)
        figures[option] = {"billion_multiplications": round(count_multiplications(find_cnn(extractor)) / 1e9, 2)}
    rates = interleaved_median_rates(variants, rounds, "images")
    return {option: figures[option] | {"images_per_second_of_a_core": round(rate, 2)} for option, rate in rates.items()}


def main(argv: list[str] | None = None) -> None:
    """Measures all, or one part, and prints the rates and ratios."""
    parser = make_parser(__doc__)
    add_counts(parser, {"images": (640, "measure with so many images"), "rounds": (3, "measure each variant so often")})
    parser.add_argument(
        "--batch-sizes",
        type=int_at_least(1),
        nargs="+",
        metavar="N",
        default=BATCH_SIZES,
        help="try these batch sizes with the CNN alone (default: 8 16 32 64 128)",
    )
    text = "measure only this part (default: all but cnns)"
    parser.add_argument("--only", choices=("cnn", "decoding", "cnns"), help=text)
    args = parser.parse_args(argv)
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        if args.only in (None, "cnn"):
            result |= measure_cnn(Path(folder), args.images, args.batch_sizes, args.rounds)
        if args.only in (None, "decoding"):
            result["decoded_per_second_of_a_core"] = measure_decoding(Path(folder), SIZES, args.rounds)
    if args.only == "cnns":
        result["cnns"] = measure_cnns(args.images, args.rounds)
    print(json.dumps(result))


if __name__ == "__main__":
    run_main(main)
