"""Compares the speed of caching features with that of InceptionV3 alone, and with the tutorial's loop.

    python -m benchmarks.features
    python -m benchmarks.features --images 96 --batch-sizes 16 32

The variants, in images per second:

    project   features.cache_features: decodes JPEGs of 500x375 pixels, runs the CNN and writes the files.
    cnn       the CNN alone, on pixels that are in memory, with the best of several batch sizes.
    tutorial  the tutorial's loop: tf.data decodes, the CNN is called eagerly for batches of 16 images, and np.save
              writes a file for each image.

The weights are random, which does not change the speed. The last line is JSON.
"""

import functools
import json
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

import features
from benchmarks.timing import interleaved_median_rates, items_per_second
from captioning.cli import int_at_least, log, make_parser, run_main
from captioning.feature_cache import FeatureCache
from captioning.quiet_tensorflow import tf

BATCH_SIZES = [8, 16, 32, 64]


def draw_photos(folder: Path, num_images: int) -> list[str]:
    """Writes JPEGs that take as long to decode as photographs: smooth noise, 500x375 pixels, about 60 KB each."""
    rng = np.random.default_rng(0)
    names = [f"{i}.jpg" for i in range(num_images)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
        pixels = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)  # (375, 500, 3)
        pixels = (pixels + rng.normal(0, 6, pixels.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / name, quality=90)
    return names


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
    """Measures `features.cache_features`, in images per second.

    The time is that from the files of the first batch to the last file, so that building the CNN is not counted.
    """
    for path in cache.folder.glob("*.npy"):
        path.unlink()
    batch_size = min(32, len(names) // 2)
    features.cache_features(cache, image_dir, names, batch_size)
    written = sorted(path.stat().st_mtime_ns for path in cache.folder.glob("*.npy"))
    return (len(names) - batch_size) / (written[-1] - written[batch_size - 1]) * 1e9


def make_cnn_run(extractor: tf.keras.Model, pixels: np.ndarray) -> Callable[[int], None]:
    """Makes a function that runs the CNN on all pixels (images, 299, 299, 3), in batches of its argument."""
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


def measure(root: Path, num_images: int, batch_sizes: list[int], rounds: int) -> dict[str, object]:
    """Measures all variants.

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


def main(argv: list[str] | None = None) -> None:
    """Measures everything alternately, and prints the rates and ratios."""
    parser = make_parser(__doc__, prog="python -m benchmarks.features")
    parser.add_argument(
        "--images",
        type=int_at_least(2),
        metavar="N",
        default=192,
        help="images in a measurement (default: %(default)s)",
    )
    parser.add_argument(
        "--batch-sizes",
        type=int_at_least(1),
        nargs="+",
        metavar="N",
        default=BATCH_SIZES,
        help="batch sizes to try with the CNN alone (default: 8 16 32 64)",
    )
    parser.add_argument(
        "--rounds", type=int_at_least(1), metavar="N", default=3, help="measurements of each (default: %(default)s)"
    )
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as root:
        print(json.dumps(measure(Path(root), args.images, args.batch_sizes, args.rounds)))


if __name__ == "__main__":
    run_main(main)
