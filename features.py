"""Pictures to features: InceptionV3's last convolutional block, cached as one .npy per picture.

    python features.py                                     # the default data set
    python features.py --annotations captions.csv --images photos/

A picture becomes (64, 2048): 8x8 locations of 2,048 channels. They are computed once, since the CNN is
not trained; training then reads 256 KB per picture (float16) instead of running 5.7 billion
multiplications.
"""

import argparse
import io
import itertools
import math
import os
import re
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import (
    in_words,
    InputError,
    add_quiet,
    at_least,
    atomic_write,
    check_fields,
    file_sha256,
    make_parser,
    need_room,
    progress_bar,
    quiet,
    read_json,
    run_command,
    say,
    write_json,
)  # before TensorFlow

import numpy as np

with quiet():
    import tensorflow as tf
from PIL import Image, ImageOps
from tqdm import tqdm

import data_utils

IMAGE_SIZE = 299  # pixels, InceptionV3's input
LOCATIONS, CHANNELS = 64, 2048  # 8x8 locations, "mixed10"
CPU_RATE = 22  # pictures a second, measured on two cores of a Xeon
CALIBRATION_PICTURES = 64
DECODE_AHEAD = 256  # decoded pictures waiting for the CNN at the most: 69 MB
READERS = 8  # threads that read features, and batches read ahead
MANIFEST = "features.json"
SETTINGS = {"cnn": str, "weights": str, "image_size": int, "dtype": str, "images": str}  # what it says; see open_cache
CNN_FILE = "cnn.weights.h5"  # the CNN's weights, kept where they are not ImageNet's
IMAGENET_FILE = "inception_v3_weights_tf_dim_ordering_tf_kernels_notop.h5"


# One picture to pixels: the same for training and captioning.


def load_image(path: Path | str) -> np.ndarray:
    """Reads any picture Pillow can read as the pixels the CNN takes.

    Grey, CMYK, palette and 16-bit pictures become RGB, transparency becomes white, and the orientation a
    camera noted (EXIF) is applied. Like the tutorial, the picture is squeezed to a square, not cropped.

    Returns:
        (299, 299, 3) uint8.

    Raises:
        InputError: there is no such file, or it is not a picture that can be read.
    """
    try:
        with Image.open(path) as picture:
            return np.asarray(upright_rgb(picture).resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BILINEAR))
    except FileNotFoundError:
        raise InputError(f"{path}: no such picture") from None
    except Exception as error:  # Pillow raises many kinds for a damaged file, struct.error and TypeError among them
        reason = "no format that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else repr(error)
        raise InputError(f"{path}: not a picture that can be read ({reason})") from None


def upright_rgb(picture: Image.Image) -> Image.Image:
    """The picture turned as it should be seen, in RGB, on white where it is transparent."""
    picture = ImageOps.exif_transpose(picture)
    if picture.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would clip them to white
        values = np.asarray(picture, np.float32)
        picture = Image.fromarray((255 * values / max(values.max(), 1e-6)).clip(0, 255).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    return picture.convert("RGB")


# The CNN.


def build_cnn(weights: str = "imagenet") -> tf.keras.Model:
    """InceptionV3 without its top, from pixels to features: (B, 299, 299, 3) uint8 -> (B, 64, 2048) float32.

    On a GPU it computes in float16 (mixed precision), which halves its time and changes features by about
    as much as storing them in float16 does.

    Args:
        weights: `imagenet` (a download on first use), `random` (seeded; see `calibrate`), or a weights file.

    Raises:
        InputError: the weights cannot be downloaded, are missing, or are not InceptionV3's.
    """
    check_weights(weights)
    if weights == "random":
        tf.keras.utils.set_random_seed(0)
    policy = tf.keras.config.dtype_policy()
    tf.keras.config.set_dtype_policy("mixed_float16" if tf.config.list_physical_devices("GPU") else "float32")
    try:
        cnn = tf.keras.applications.InceptionV3(
            include_top=False,
            weights="imagenet" if weights == "imagenet" else None,
            input_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
            name="inception_v3",
        )
        if weights not in ("imagenet", "random"):
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)  # Keras only warns of layers that a file does not have
                cnn.load_weights(weights)
    except Exception as error:  # Keras raises a bare Exception where a download fails, h5py and Keras many others
        reason = str(error).strip().split("\n")[0][:200]
        if weights == "imagenet":
            raise InputError(
                f"InceptionV3's ImageNet weights cannot be downloaded ({reason}); put the file {IMAGENET_FILE} into "
                f"{Path.home() / '.keras/models'}/, or give --weights FILE, or try the pipeline with --weights random"
            ) from None
        raise InputError(f"{weights}: not the weights of InceptionV3 without its top ({reason})") from None
    finally:
        tf.keras.config.set_dtype_policy(policy)
    if weights == "random":
        _narrow_kernels(cnn)
    pixels = tf.keras.Input((IMAGE_SIZE, IMAGE_SIZE, 3), dtype="uint8")
    x = tf.keras.layers.Rescaling(1 / 127.5, offset=-1.0)(pixels)  # as inception_v3.preprocess_input
    x = cnn(x)  # (B, 8, 8, 2048)
    x = tf.keras.layers.Reshape((LOCATIONS, CHANNELS), dtype="float32")(x)  # (B, 64, 2048)
    return tf.keras.Model(pixels, x)


def check_weights(weights: str, sha256: str | None = None) -> None:
    """Raises InputError unless `weights` is imagenet, random or a file, one of this SHA-256 if there is one."""
    if weights not in ("imagenet", "random") and not Path(weights).is_file():
        raise InputError(
            f"{weights}: no such weights file; expected imagenet, random, or a file of InceptionV3's weights"
        )
    if sha256 and (weights == "random" or file_sha256(weights) != sha256):  # random ones are kept, not made again
        raise InputError(
            f"{weights}: not the weights of the CNN that the features were made with, whose SHA-256 is {sha256}"
        )


def _narrow_kernels(cnn: tf.keras.Model, sigma: float = 0.7) -> None:
    """Weighs a random CNN's kernels towards their centres, by a Gaussian of `sigma` pixels.

    Otherwise every location of the 8x8 grid sees nearly the whole picture equally well, and attention has no
    reason to look at what it names; training is what makes kernels local in a real CNN.
    """
    for layer in cnn.layers:
        if isinstance(layer, tf.keras.layers.Conv2D):
            down, across = (np.arange(size) - (size - 1) / 2 for size in layer.kernel.shape[:2])
            window = np.exp(-(down[:, np.newaxis] ** 2 + across**2) / (2 * sigma**2))
            layer.kernel.assign(layer.kernel * window[..., np.newaxis, np.newaxis])


def calibrate(cnn: tf.keras.Model, pixels: np.ndarray) -> None:
    """Sets the batch-norm statistics of a randomly initialised CNN from pictures, (B, 299, 299, 3) uint8.

    Without it the activations of random weights die out on their way through 94 layers.
    """
    norms = [layer for layer in cnn.get_layer("inception_v3").layers if "moving_mean" in dir(layer)]
    momenta = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0  # so that the moving statistics become this batch's
    cnn(pixels, training=True)
    for layer, momentum in zip(norms, momenta, strict=True):
        layer.momentum = momentum


# The cache.


class FeatureCache:
    """A folder of features, one `<picture's name>.npy` of (64, 2048) each, and features.json: how they were made."""

    def __init__(self, folder: Path | str, settings: dict[str, Any]):
        self.folder, self.settings, self.dtype = Path(folder), settings, np.dtype(settings["dtype"])
        header = io.BytesIO()
        kind = np.lib.format.dtype_to_descr(self.dtype)
        shape = (LOCATIONS, CHANNELS)
        np.lib.format.write_array_header_1_0(header, {"descr": kind, "fortran_order": False, "shape": shape})
        self.header = header.getvalue()  # what every file begins with, 128 bytes

    @property
    def weights(self) -> str:
        """The CNN's weights, for `build_cnn`."""
        return str(self.folder / CNN_FILE) if self.settings["weights"] == "random" else self.settings["weights"]

    def path(self, image: str) -> Path:
        """Where the features of a picture are kept."""
        return self.folder / f"{image}.npy"

    def missing(self, images: Iterable[str]) -> list[str]:
        """The pictures that have no whole file of features."""
        return [image for image in images if not self.is_whole(self.path(image))]

    def is_whole(self, path: Path) -> bool:
        """Whether there is a file as `write` writes it, told by its size and header: `read` looks at neither."""
        try:
            with open(path, "rb") as file:
                size = len(self.header) + LOCATIONS * CHANNELS * self.dtype.itemsize
                return os.fstat(file.fileno()).st_size == size and file.read(len(self.header)) == self.header
        except (OSError, ValueError):  # there is none, or its name is too long or holds a NUL
            return False

    def write(self, image: str, features: np.ndarray) -> None:
        """Stores one picture's features, (64, 2048)."""
        with atomic_write(self.path(image), "wb") as file:
            np.save(file, features.astype(self.dtype), allow_pickle=False)

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Paths (P,) of files -> their features, (P, 64, 2048) float16 or float32, inside a tf.data pipeline.

        A plain read of a file lets go of Python's lock, which np.load holds, so that readers run side by side.
        """

        def load(paths: np.ndarray) -> np.ndarray:
            values = np.empty((len(paths), LOCATIONS, CHANNELS), self.dtype)
            for row, path in zip(values, paths, strict=True):
                with open(path, "rb") as file:
                    file.seek(-row.nbytes, os.SEEK_END)  # behind the header
                    file.readinto(row)
            return values

        return tf.ensure_shape(tf.numpy_function(load, [paths], self.dtype), (None, LOCATIONS, CHANNELS))


def read_ahead(data: tf.data.Dataset, read: Callable) -> tf.data.Dataset:
    """Maps with several threads, some batches ahead of the model.

    How many is fixed: at the end of a data set TensorFlow waits for its autotuner, which may sleep for a minute.
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return data.map(read, num_parallel_calls=READERS).prefetch(READERS).with_options(options)


def open_cache(folder: Path | str, images: Path, names: list[str], weights: str, dtype: str) -> FeatureCache:
    """Opens a cache, or begins one, for the pictures of one folder as seen through one CNN.

    Random weights are made when the cache begins, calibrated on its first pictures, and kept in it.

    Raises:
        InputError: the folder holds features of other pictures, other weights, or another dtype.
    """
    folder = Path(folder)
    check_weights(weights)
    settings = {
        "cnn": "InceptionV3",
        "weights": weights,
        "image_size": IMAGE_SIZE,
        "dtype": dtype,
        # Relative, so that a project moved as a whole keeps its cache.
        "images": Path(os.path.relpath(images.resolve(), folder.resolve())).as_posix(),
    }
    if weights not in ("imagenet", "random"):
        settings["sha256"] = file_sha256(weights)
    # A cache without features can begin again, say because the weights could not be downloaded.
    if not (folder / MANIFEST).exists() or next(folder.rglob("*.npy"), None) is None:
        if weights == "random":
            settings["sha256"] = _make_random_weights(folder, images, names)
        write_json(folder / MANIFEST, settings)
    found = read_manifest(folder)
    for key, value in settings.items():
        if key == "weights" and "sha256" in settings:
            continue  # a file is what it holds, not what it is called
        if found.get(key) != value:
            raise InputError(
                f"{folder} holds features made with {key} {found.get(key)}, expected {value}; choose another "
                f"--features-dir, or give the settings in {folder / MANIFEST}"
            )
    return FeatureCache(folder, {**found, "weights": weights})


def check_settings(settings: Any) -> None:
    """Raises InputError unless these can be the settings of a cache, from its features.json or a run's config.json."""
    check_fields(settings, SETTINGS)
    if settings["weights"] != "imagenet":
        check_fields(settings, {"sha256": str})
    if settings["dtype"] not in ("float16", "float32"):
        raise InputError(f"dtype: expected float16 or float32, found {settings['dtype']!r}")


def read_manifest(folder: Path) -> dict[str, Any]:
    """A cache's features.json; raises InputError if it is none."""
    found = read_json(folder / MANIFEST)
    try:
        check_settings(found)
    except InputError as error:
        raise InputError(f"{folder / MANIFEST}: not how the features of a folder were made ({error})") from None
    return found


def cache_of(settings: dict[str, Any]) -> FeatureCache:
    """The cache a run was trained with, from the features of its config.json.

    Raises:
        InputError: the cache is gone, or was made anew with another CNN.
    """
    folder = Path(settings["folder"])
    found = read_manifest(folder)
    for key in ("cnn", "sha256" if "sha256" in settings else "weights", "image_size", "dtype"):
        if found.get(key) != settings[key]:
            raise InputError(
                f"{folder} does not hold the features this run was trained with: its {key} is {found.get(key)}, that "
                f"of the run's config.json {settings[key]}; make them anew with features.py and the options of the run"
            )
    return FeatureCache(folder, settings)


def own_weights(run: Path) -> str | None:
    """The CNN's weights that a run folder holds, unless they are ImageNet's."""
    return next((str(path) for path in sorted(run.glob("cnn*.h5"))), None)


def _make_random_weights(folder: Path, images: Path, names: list[str]) -> str:
    """Saves a calibrated random CNN in the cache's folder and returns the file's SHA-256."""
    cnn = build_cnn("random")
    pixels = [p for _, p in decode(images, names[: 2 * CALIBRATION_PICTURES]) if isinstance(p, np.ndarray)]
    if not pixels:
        raise InputError(f"{images}: none of the first {len(names[: 2 * CALIBRATION_PICTURES])} pictures can be read")
    calibrate(cnn, np.stack(pixels[:CALIBRATION_PICTURES]))
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CNN_FILE}"  # Keras insists on the ending, so atomic_write cannot name it
    cnn.get_layer("inception_v3").save_weights(partial)
    os.replace(partial, folder / CNN_FILE)
    return file_sha256(folder / CNN_FILE)


def decode(images: Path, names: Iterable[str]) -> Iterator[tuple[str, np.ndarray | InputError]]:
    """Decodes pictures on several threads, a bounded number ahead: (name, pixels, or why it cannot be read)."""

    def load(name: str) -> np.ndarray | InputError:
        try:
            return load_image(images / name)
        except InputError as error:
            return error

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        ahead: deque = deque()
        for name in names:
            ahead.append((name, pool.submit(load, name)))
            if len(ahead) >= DECODE_AHEAD:
                name, future = ahead.popleft()
                yield name, future.result()
        for name, future in ahead:
            yield name, future.result()


def cache_features(cache: FeatureCache, images: Path, names: list[str], batch_size: int = 32) -> dict[str, str]:
    """Computes and stores what the cache lacks of these pictures; stopped at any moment, it continues there.

    Returns:
        The pictures that cannot be read, each with the reason.

    Raises:
        InputError: none of the pictures can be read.
    """
    names = list(dict.fromkeys(names))
    missing = cache.missing(names)
    if not missing:
        return {}
    size = len(missing) * LOCATIONS * CHANNELS * cache.dtype.itemsize
    on_cpu = f", about {math.ceil(len(missing) / CPU_RATE / 60)} min on two CPU cores"
    say(
        f"features: {len(names) - len(missing):,} of {len(names):,} pictures are cached in {cache.folder}/, "
        f"computing {len(missing):,} ({in_words(size)}{on_cpu * (not tf.config.list_physical_devices('GPU'))})"
    )
    need_room(cache.folder, size, "caching them", "use --features-dir on a larger disk, or fewer pictures")
    for path in filter(os.path.exists, map(cache.path, missing)):
        say(f"features: {path} is damaged: computed anew")
    check_weights(cache.weights, cache.settings.get("sha256"))
    cnn = build_cnn(cache.weights)
    run = tf.function(lambda pixels: cnn(pixels, training=False), reduce_retracing=True)
    unreadable: dict[str, str] = {}
    readable = ((name, p) for name, p in decode(images, missing) if _is_readable(name, p, unreadable))
    with ThreadPoolExecutor(4) as writers, progress_bar(total=len(missing), unit="picture", desc="features") as bar:
        writes: list[Future] = []
        while batch := list(itertools.islice(readable, batch_size)):
            features = run(np.stack([np.asarray(pixels) for _, pixels in batch])).numpy()  # (B, 64, 2048)
            for write in writes:
                write.result()  # an error of the disk shows here
            writes = [writers.submit(cache.write, name, row) for (name, _), row in zip(batch, features, strict=True)]
            bar.update(len(batch))
        for write in writes:
            write.result()
        bar.update(len(unreadable))
    if len(unreadable) == len(names):
        raise InputError(
            f"{images}: none of the {len(names):,} pictures can be read; the first: {next(iter(unreadable.values()))}"
        )
    return unreadable


def _is_readable(name: str, pixels: np.ndarray | InputError, unreadable: dict[str, str]) -> bool:
    if isinstance(pixels, InputError):
        unreadable[name] = str(pixels)
        tqdm.write(f"skipped {pixels}", file=sys.stderr)
    return name not in unreadable


# The command.


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the features, for every script that may compute them."""
    group = parser.add_argument_group("features")
    group.add_argument(
        "--weights",
        default="imagenet",
        metavar="imagenet|random|FILE",
        help="InceptionV3's weights (default: %(default)s, 88 MB downloaded by Keras on first use)",
    )
    group.add_argument(
        "--features-dir",
        metavar="DIR",
        help="folder of the cached features (default: features/<name of the data set>)",
    )
    group.add_argument(
        "--dtype",
        choices=("float16", "float32"),
        default="float16",
        help="how features are stored: 256 or 512 KB a picture (default: %(default)s)",
    )
    group.add_argument(
        "--cnn-batch-size",
        type=at_least(1),
        metavar="N",
        default=32,
        help="pictures the CNN sees at once (default: %(default)s)",
    )


def prepare(
    dataset: data_utils.Dataset, args: argparse.Namespace, shard: slice = slice(None)
) -> tuple[FeatureCache, data_utils.Dataset]:
    """Caches a data set's features, or those of a shard of its pictures, as the command line says.

    Returns:
        The cache, and the data set less the pictures that cannot be read.
    """
    folder = args.features_dir or f"features/{dataset.name}"
    names = [example.image for example in dataset.examples]
    cache = open_cache(folder, dataset.images, names, args.weights, args.dtype)
    unreadable = cache_features(cache, dataset.images, names[shard], args.cnn_batch_size)
    if unreadable:
        count = len(names[shard])
        say(f"features: {len(unreadable):,} of {count:,} pictures cannot be read: left out, with their captions")
    return cache, dataset.without(set(unreadable))


def shard(text: str) -> slice:
    """An argparse type: `I/N`, every N-th picture from the I-th on."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, found {text!r}")
    return slice(int(match[1]) - 1, None, int(match[2]))


def main(argv: list[str] | None = None) -> None:
    """Caches the features of a data set."""
    parser = make_parser(__doc__)
    data_utils.add_arguments(parser)
    add_arguments(parser)
    parser.add_argument(
        "--shard",
        type=shard,
        default=slice(None),
        metavar="I/N",
        help="only the I-th of N parts of the pictures, for N processes or machines that share the folder "
        "(default: all)",
    )
    add_quiet(parser)
    args = parser.parse_args(argv)
    dataset = data_utils.load_dataset(data_utils.options_from(args))
    if args.shard != slice(None) and args.weights == "random":
        raise InputError("--shard needs weights that all its processes have; --weights random makes its own")
    cache, _ = prepare(dataset, args, args.shard)
    names = [example.image for example in dataset.examples][args.shard]
    print(f"{len(names) - len(cache.missing(names)):,} pictures have their features in {cache.folder}/")


if __name__ == "__main__":
    run_command(main)
