"""How close caching features comes to the speed of InceptionV3 alone, and how far it is from an eager loop.

    python benchmarks/features.py

`features.cache_features` decodes JPEGs of 500x375 pixels, runs the CNN and writes the files. It is compared with the
CNN alone on pixels already in memory, at the best of several batch sizes, and with the tutorial's loop: tf.data
that decodes, an eager call for each 16 pictures, np.save for each. Weights are random; they do not change the
speed. The last line is JSON.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from common import at_least, make_parser, run_command, say  # before TensorFlow

import json
import tempfile

import numpy as np
import tensorflow as tf
from PIL import Image

import features as suite
from turns import median_rates, rate_of


def draw_photos(folder: Path, count: int) -> list[str]:
    """JPEGs that cost as much to decode as photographs: smooth noise, 500x375, about 60 KB each."""
    dice, names = np.random.default_rng(0), [f"{i}.jpg" for i in range(count)]
    for name in names:
        coarse = Image.fromarray(dice.integers(0, 256, (47, 63, 3), np.uint8))
        photo = np.asarray(coarse.resize((500, 375), Image.Resampling.BICUBIC)).astype(np.int16)
        photo = (photo + dice.normal(0, 6, photo.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(photo).save(folder / name, quality=90)
    return names


def tutorial_loop(cnn: tf.keras.Model, images: Path, names: list[str], folder: Path) -> None:
    """The tutorial's: eager, 16 pictures at a time, float32 files."""

    def load(path: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        pixels = tf.image.resize(tf.io.decode_jpeg(tf.io.read_file(path), channels=3), (299, 299))
        return tf.cast(pixels, tf.uint8), path

    data = tf.data.Dataset.from_tensor_slices([str(images / name) for name in names])
    for pixels, paths in data.map(load, num_parallel_calls=tf.data.AUTOTUNE).batch(16):
        for values, path in zip(cnn(pixels, training=False), paths, strict=True):
            np.save(folder / f"{Path(path.numpy().decode()).name}.npy", values.numpy())


def main(argv: list[str] | None = None) -> None:
    """Times everything by turns, and prints the ratios."""
    parser = make_parser(__doc__)
    parser.add_argument("--pictures", type=at_least(2), default=192, help="pictures in a turn (default: 192)")
    parser.add_argument(
        "--batch-sizes", type=at_least(1), nargs="+", default=[8, 16, 32, 64], help="for the CNN alone (8 16 32 64)"
    )
    parser.add_argument("--rounds", type=at_least(1), default=3, help="turns of each (default: 3)")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as name:
        root = Path(name)
        images, cached, tutorial = root / "images", root / "cache", root / "tutorial"
        for folder in (images, tutorial):
            folder.mkdir()
        names = draw_photos(images, args.pictures)
        cache = suite.open_cache(cached, images, names, "random", "float16")
        cnn = suite.build_cnn(cache.weights)
        run = tf.function(lambda pixels: cnn(pixels, training=False), reduce_retracing=True)
        pixels = np.stack([suite.load_image(images / name) for name in names])

        def alone(batch_size: int) -> None:
            for start in range(0, len(pixels), batch_size):
                found = run(tf.constant(pixels[start : start + batch_size]))
            found.numpy()

        def caching() -> float:
            """The rate from the first batch's files to the last file: building the CNN is not counted."""
            for path in cached.glob("*.npy"):
                path.unlink()
            first = min(32, len(names) // 2)
            suite.cache_features(cache, images, names, first)
            written = sorted(path.stat().st_mtime_ns for path in cached.glob("*.npy"))
            return (len(names) - first) / (written[-1] - written[first - 1]) * 1e9

        for size in args.batch_sizes:
            alone(size)  # compiles
        by_size = {size: rate_of(lambda size=size: alone(size), len(names)) for size in args.batch_sizes}
        best = max(by_size, key=by_size.get)
        say(f"the CNN alone, pictures/s by batch size: { {size: round(rate, 1) for size, rate in by_size.items()} }")
        few = names[: max(2, len(names) // 4)]
        ways = {
            "cnn": lambda: rate_of(lambda: alone(best), len(names)),
            "suite": caching,
            "tutorial": lambda: rate_of(lambda: tutorial_loop(cnn, images, few, tutorial), len(few)),
        }
        median = {name: round(rate, 2) for name, rate in median_rates(ways, args.rounds, "pictures").items()}
        megabytes = sum(path.stat().st_size for path in images.iterdir()) / len(names) / 1e6
    result = {
        "pictures": len(names),
        "megabytes_per_jpeg": round(megabytes, 3),
        "cnn_batch_size": best,
        "pictures_per_second": median,
        "share_of_cnn": round(median["suite"] / median["cnn"], 3),
        "ratio_to_tutorial": round(median["suite"] / median["tutorial"], 2),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    run_command(main)
