"""Computes the features of the images with a CNN and caches them, one .npy file per image.

Tutorial sections: "Preprocess the images using InceptionV3", "Initialize InceptionV3 and load the pretrained
Imagenet weights" and "Caching the features extracted from InceptionV3".

    python features.py                                              # the images of the default dataset, COCO
    python features.py --annotations captions.csv --images photos/  # your own images
    python features.py --shard 1/2                                  # half of the images, on one of two machines
    python features.py --cnn vgg19                                  # the paper's CNN, 14x14 locations
    python features.py --verify                                     # are they still what was written?

The features of an image are (L, C): C channels at the L locations of the CNN's last convolutional layer. Those of
InceptionV3 are (64, 2048), from a grid of 8x8. The CNN is not trained, so they are computed only once. Training
then reads 256 KB per image (float16) and does not repeat 5.7 billion multiplications. docs/use.md compares the
CNNs. The command can be stopped at any time. Run again, it continues.
"""

import argparse
import itertools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

import data_utils
from captioning.base import devices
from captioning.base.cli import (
    FirstRate,
    InputError,
    add_quiet_option,
    format_bytes,
    format_seconds,
    log,
    make_parser,
    print_results,
    progress_bar,
    run_main,
)
from captioning.base.files import check_disk_space, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN, INCEPTION_V3
from captioning.config.options import add_options
from captioning.config.settings import DataConfig, FeatureConfig
from captioning.images.cnn_loader import computing_in, load_cnn, preprocess
from captioning.images.feature_cache import (
    CNN_FILE,
    MANIFEST_FILE,
    FeatureCache,
    check_cnn_weights,
    compare_manifests,
    find_damaged,
    find_outdated,
    location_fields,
    make_manifest,
    read_manifest,
)
from captioning.images.image_records import ImageRecords
from captioning.images.random_cnn import make_local, save_random_cnn
from captioning.images.reading import ImageSource, map_threads, read_image, set_max_megapixels

BATCH_SIZE, GPU_BATCH_SIZE = 32, 128  # images
NUM_AHEAD = 4  # batches of images that are read before the CNN takes them
NUM_WRITERS = 4  # threads
MAX_NAME_BYTES = 255 - len(".npy")  # a file system allows 255

Batch = tuple[tuple[str, ...], np.ndarray]  # B paths, and the pixels of their images, (B, size, size, 3) uint8


# Preprocess the images using InceptionV3. Training and inference use the same function.


def load_image(image: ImageSource, image_size: int = INCEPTION_V3.image_size) -> np.ndarray:
    """Reads an image as the pixels that the CNN takes.

    Args:
        image: a path, a file's content, an open file, pixels or a Pillow image.
        image_size: the sides of the square that the CNN takes.

    Returns:
        (image_size, image_size, 3) uint8. The feature extractor scales them (`preprocess_input` in the tutorial).

    Raises:
        InputError: the image cannot be read, see `captioning.images.reading.read_image`.
    """
    # A photo of 12 megapixels is far larger than the square. Decoding it at a part of its size takes a third of the
    # time, and twice the pixels of the square are still enough to shrink it smoothly.
    return to_pixels(read_image(image, 2 * image_size), image_size)


def to_pixels(image: Image.Image, image_size: int = INCEPTION_V3.image_size) -> np.ndarray:
    """Squeezes an image, upright and in RGB, to what the CNN takes: (image_size, image_size, 3) uint8."""
    # As in the tutorial the whole image becomes a square, and nothing is cropped: a caption may tell of its edges.
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR))


# Initialize InceptionV3 and load the pretrained ImageNet weights.


def build_feature_extractor(cnn_weights: str = "imagenet", cnn: CNN = INCEPTION_V3) -> tf.keras.Model:
    """Builds the CNN that turns pixels into features (`image_features_extract_model` in the tutorial).

    It computes in float32, on a GPU too, so that all devices compute the same features, unless `computing_in` says
    otherwise.

    Args:
        cnn_weights: `imagenet` (downloaded on first use), `random` (see `random_cnn`), or a file of weights.
        cnn: which one, and the size of its images.

    Returns:
        A model from (B, size, size, 3) uint8 to (B, L, C) float32; InceptionV3: (B, 299, 299, 3) to (B, 64, 2048).

    Raises:
        InputError: the weights cannot be downloaded, are missing, or do not belong to the CNN.
    """
    check_cnn_weights(cnn_weights)
    # The CNN without its top: not the 1,000 classes of ImageNet, but the grid from which they are computed.
    model = load_cnn(cnn, cnn_weights)
    if cnn_weights == "random":
        make_local(model)
    pixels = tf.keras.Input((cnn.image_size, cnn.image_size, 3), dtype="uint8")
    # Every CNN expects the pixels as in its own training, InceptionV3 from -1 to 1.
    x = model(preprocess(pixels, cnn))  # (B, H, W, C), of InceptionV3 (B, 8, 8, 2048)
    # Attention looks at a list of locations, and does not care that they are a grid: they are listed row after row.
    x = tf.keras.layers.Reshape(cnn.features_shape, dtype="float32")(x)  # (B, L, C), (B, 64, 2048)
    return tf.keras.Model(pixels, x)


# Caching the features extracted from InceptionV3.


def match_manifest(folder: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the manifest of a cache, with the new folder of images that have moved; None if it is still empty.

    Raises:
        InputError: it holds other features than those that the manifest `expected` describes.
    """
    if not (folder / MANIFEST_FILE).exists() or next(folder.rglob("*.npy"), None) is None:
        return None
    manifest = read_manifest(folder)
    if not (folder / manifest["images"]).exists():  # those with another content are computed again
        manifest["images"] = expected["images"]
    # A file of weights may have another name. The SHA-256 of random ones is only in the cache.
    if difference := compare_manifests(manifest, expected, {"weights" if "sha256" in expected else "sha256"}):
        key, found, value = difference
        raise InputError(
            f"{folder} holds features made with {key} {found}, expected {value}; choose another --features-dir, or "
            f"give the settings in {folder / MANIFEST_FILE}"
        )
    return manifest


def open_or_create_cache(  # noqa: PLR0913 - all that a manifest records
    folder: Path | str,
    image_dir: Path,
    image_paths: list[str],
    cnn_weights: str,
    dtype: str,
    cnn: CNN = INCEPTION_V3,
    precision: str = "float32",
) -> FeatureCache:
    """Opens the cache in a folder, or creates one there for the features of images, given relative to `image_dir`.

    `cnn_weights` is `imagenet`, `random`, or a file of weights; `dtype`, that of the stored features, float16 or
    float32; `precision`, what the CNN computes in.

    Raises:
        InputError: the folder holds features of other images, of another CNN, of other weights, of another dtype, or
            computed in another precision.
    """
    folder = Path(folder)
    check_cnn_weights(cnn_weights)
    expected = make_manifest(folder, image_dir, cnn_weights, dtype, cnn, precision)
    # A cache that is still empty is created again. It may be left over from weights that could not be downloaded.
    if not (manifest := match_manifest(folder, expected)):
        if cnn_weights == "random":  # drawn now, and saved: features of two random CNNs have nothing in common
            extractor = build_feature_extractor(cnn_weights, cnn)
            files = [image_dir / image_path for image_path in image_paths]
            expected["sha256"] = save_random_cnn(folder / CNN_FILE, extractor, cnn, files, load_image)
        write_json(folder / MANIFEST_FILE, expected)
        return FeatureCache(folder, expected)
    if manifest != read_manifest(folder):
        log(f"features: the images of {folder}/ have moved, and are now in {image_dir}/")
        write_json(folder / MANIFEST_FILE, manifest)
    return FeatureCache(folder, {**manifest, "weights": cnn_weights})


def check_manifest_is_ours(cache: FeatureCache) -> None:
    """Raises InputError if another process has created the cache, still empty, with other settings meanwhile."""
    stored = read_manifest(cache.folder)
    if difference := compare_manifests(stored, cache.manifest, ignored=location_fields(cache.manifest)):
        key, found, expected = difference
        raise InputError(
            f"{cache.folder}: another process computes features there with {key} {found}, expected {expected}; choose "
            "another --features-dir"
        )


def describe_cost(cache: FeatureCache, num_images: int) -> str:
    """Describes the disk that the features of so many images take, and the time, unless a GPU computes them."""
    cost = format_bytes(num_images * cache.num_bytes)
    if not tf.config.list_physical_devices("GPU"):
        cost += f", about {format_seconds(cache.cnn.seconds(num_images))} on two CPU cores"
    return cost


def announce_extraction(cache: FeatureCache, missing: list[str], num_images: int) -> None:
    """Logs how many of `num_images` images are missing in a cache, and checks that the disk has space for them."""
    log(
        f"features: {num_images - len(missing):,} of {num_images:,} images are cached in {cache.folder}/, "
        f"computing {len(missing):,} ({describe_cost(cache, len(missing))})"
    )
    num_bytes = len(missing) * cache.num_bytes
    check_disk_space(cache.folder, num_bytes, "caching them", "use --features-dir on a larger disk, or fewer images")


def announce_time_left(rate: float, num_left: int) -> None:
    """Logs how long images take at a rate, in images per second, once it is known; not less than a minute."""
    if rate and num_left >= 60 * rate:
        log(f"features: {rate:.1f} images/s, {format_seconds(num_left / rate)} left")


def choose_batch_size() -> int:
    """Returns the number of images that the CNN takes at a time on this device."""
    return GPU_BATCH_SIZE if devices.has_gpu() else BATCH_SIZE


def cache_features(
    cache: FeatureCache, image_dir: Path, image_paths: list[str], batch_size: int | None = None
) -> dict[str, str]:
    """Computes and stores the features that a cache lacks. If it is stopped at any moment, the next call continues.

    Without a batch size, it is chosen for the device.

    Returns:
        The images that cannot be read, each with the reason.

    Raises:
        InputError: no image can be read, the CNN's weights or space are missing, or others fill the cache otherwise.
    """
    image_paths = list(dict.fromkeys(image_paths))  # each once
    records = ImageRecords(cache.folder, image_dir)  # of the images' files, to find those that change later
    missing = find_outdated(cache, records, image_paths)
    if not missing:
        return {}
    announce_extraction(cache, missing, len(image_paths))
    check_cnn_weights(cache.cnn_weights, cache.manifest.get("sha256"))
    devices.check_gpus()
    batch_size = batch_size or choose_batch_size()
    unreadable: dict[str, str] = {}

    def load(image_path: str) -> np.ndarray | InputError:
        # A bad image among thousands must not stop the others: its error is passed on as a value.
        path = image_dir / image_path
        try:
            if len(os.fsencode(path.name)) > MAX_NAME_BYTES:
                raise InputError(f"{path}: its features cannot be written (file name too long)")
            records.note(image_path)
            return load_image(path, cache.cnn.image_size)  # (299, 299, 3)
        except InputError as error:
            return error

    def save(image_path: str, features: np.ndarray) -> None:  # (64, 2048)
        records.add(image_path, cache.write(image_path, features))  # np.save, as in the tutorial

    # In the tutorial's loop reading, computing and writing wait for each other. Here they overlap: many threads read
    # images ahead, one runs the CNN (on a GPU two: one's batch is copied meanwhile), others write the batch before.
    num_threads = 2 if devices.has_gpu() else 1
    readable = skip_unreadable(map_threads(load, missing, NUM_AHEAD * batch_size), unreadable)
    bar, rate = progress_bar(total=len(missing), unit="image", desc="features"), FirstRate()
    with computing_in(cache.precision), ThreadPoolExecutor(NUM_WRITERS) as writers:
        extract, batches = build_while_reading(cache, make_batches(readable, batch_size), batch_size)
        with bar as progress:
            written: Iterable[None] = ()
            for (paths, _), features in map_threads(extract, batches, 1 + num_threads, num_threads):
                list(written)  # waits for the files of the batch before, and raises the error of a full disk
                if not progress.n:
                    check_manifest_is_ours(cache)
                written = writers.map(save, paths, features)
                progress.update(len(paths))
                announce_time_left(rate.measure(progress.n), len(missing) - len(unreadable) - progress.n)
            list(written)
            progress.update(len(unreadable))
    if len(unreadable) == len(image_paths):
        first = next(iter(unreadable.values()))
        raise InputError(f"{image_dir}: none of the {len(image_paths):,} images can be read; the first: {first}")
    return unreadable


def build_while_reading(
    cache: FeatureCache, batches: Iterator[Batch], batch_size: int
) -> tuple[Callable[[Batch], np.ndarray], Iterator[Batch]]:
    """Builds the CNN while the first batch is read; returns what `make_extract` does, and all batches."""
    with ThreadPoolExecutor(2) as threads:
        first_batch = threads.submit(list, itertools.islice(batches, 1))
        threads.submit(start_gpu)
        extract = make_extract(cache, batch_size)
    return extract, itertools.chain(first_batch.result(), batches)


def start_gpu() -> None:
    """Loads what a GPU needs for a convolution, which takes seconds: beside the building of the CNN."""
    if devices.has_gpu():
        tf.nn.conv2d(tf.zeros((1, 8, 8, 3)), tf.zeros((3, 3, 3, 8)), 1, "SAME")


def make_extract(cache: FeatureCache, batch_size: int) -> Callable[[Batch], np.ndarray]:
    """Builds the CNN of a cache, as a function from a batch to its features, (B, L, C)."""
    extractor, size = build_feature_extractor(cache.cnn_weights, cache.cnn), cache.cnn.image_size

    # A graph runs several times as fast as eager mode. It is built for any batch size, since the last batch is smaller.
    @tf.function(input_signature=[tf.TensorSpec((None, size, size, 3), tf.uint8)])
    def run(pixels: tf.Tensor) -> tf.Tensor:  # (B, 299, 299, 3)
        # training=False: batch normalization uses the statistics of its own training, not of this batch. The features
        # are rounded to float16 on the device, since half as many bytes are sooner copied from a GPU.
        features = tf.cast(extractor(pixels, training=False), cache.dtype)  # (B, 64, 2048)
        with tf.device("CPU"):
            return tf.identity(features)

    def extract(batch: Batch) -> np.ndarray:
        paths, pixels = batch
        if devices.has_gpu() and len(paths) < batch_size:  # it would look for the fastest kernels of the new shape
            pixels = np.concatenate([pixels, np.zeros((batch_size - len(paths), size, size, 3), np.uint8)])
        # To and from a GPU the graph copies. Python would hold its lock meanwhile, for which the other threads wait.
        with tf.device("CPU"):
            pixels = tf.constant(pixels)
        return run(pixels).numpy()[: len(paths)]

    return extract


def skip_unreadable(
    images: Iterable[tuple[str, np.ndarray | InputError]], unreadable: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the images that could be read, and adds the others to `unreadable`, with the reason."""
    for image_path, pixels in images:
        if isinstance(pixels, InputError):
            log(f"skipped {pixels}", error=True)
            unreadable[image_path] = str(pixels)
        else:
            yield image_path, pixels


def make_batches(images: Iterator[tuple[str, np.ndarray]], batch_size: int) -> Iterator[Batch]:
    """Groups images into batches."""
    while batch := list(itertools.islice(images, batch_size)):
        paths, pixels = zip(*batch, strict=True)
        yield paths, np.stack(pixels)


def cache_folder(dataset: data_utils.CaptionDataset, config: FeatureConfig) -> Path:
    """Returns the folder of a dataset's features."""
    return Path(config.features_dir or f"features/{dataset.name}{config.sized_cnn.suffix}")


def extract_features(
    dataset: data_utils.CaptionDataset, config: FeatureConfig, shard: slice = slice(None)
) -> tuple[FeatureCache, data_utils.CaptionDataset]:
    """Caches the features of a dataset's images, or of a shard of them.

    Returns:
        The cache, and the dataset without the images that cannot be read.
    """
    set_max_megapixels(config.max_megapixels)
    cnn, folder = config.sized_cnn, cache_folder(dataset, config)
    image_paths = [example.image_path for example in dataset.examples]
    options = config.cnn_weights, config.dtype, cnn, config.cnn_precision
    cache = open_or_create_cache(folder, dataset.image_dir, image_paths, *options)
    unreadable = cache_features(cache, dataset.image_dir, image_paths[shard], config.cnn_batch_size)
    if unreadable:
        counts = f"{len(unreadable):,} of {len(image_paths[shard]):,}"
        log(f"features: {counts} images cannot be read: left out, with their captions")
    return cache, dataset.exclude(set(unreadable))


def verify_features(dataset: data_utils.CaptionDataset, folder: Path, shard: slice = slice(None)) -> str:
    """Reads the cached features of a dataset's images, or of a shard of them, and deletes those that are damaged.

    Returns:
        A line that says that the others are as they were written.

    Raises:
        InputError: some are damaged.
    """
    cache = FeatureCache(folder, read_manifest(folder))
    image_paths = list(dict.fromkeys(example.image_path for example in dataset.examples[shard]))
    cached = [image_path for image_path in image_paths if os.path.exists(cache.path(image_path))]
    damaged, num_unknown = find_damaged(cache, ImageRecords(folder, dataset.image_dir), cached)
    for image_path in damaged:
        cache.path(image_path).unlink()
    unknown = f" ({num_unknown:,} have no checksum: only their size was compared)" if num_unknown else ""
    if damaged:
        raise InputError(
            f"{folder}: {len(damaged):,} of {len(cached):,} files of features were damaged, the first: {damaged[0]}.npy"
            f"{unknown}; they are deleted, run the same command without --verify to compute them again"
        )
    return f"{len(cached):,} of {len(image_paths):,} images have their features in {folder}/, as written{unknown}"


# The command line.


def parse_shard(text: str) -> slice:
    """Parses the value of --shard: `I/N` selects every N-th image, beginning with the I-th."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"expected I/N with I from 1 to N, found {text!r}")
    return slice(int(match[1]) - 1, None, int(match[2]))


def main(argv: list[str] | None = None) -> None:
    """Caches the features of a dataset."""
    parser = make_parser(__doc__)
    data_utils.add_data_options(parser)
    add_options(parser.add_argument_group("features"), FeatureConfig)
    text = "compute only part I of N, for N processes or machines that share the folder (default: all images)"
    parser.add_argument("--shard", type=parse_shard, default=slice(None), metavar="I/N", help=text)
    text = "compare the cached features with their checksums, and compute none; damaged ones are deleted"
    parser.add_argument("--verify", action="store_true", help=text)
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    config = FeatureConfig.from_args(args)
    dataset = data_utils.load_dataset(DataConfig.from_args(args), with_images=not args.verify)
    if args.verify:
        print(verify_features(dataset, cache_folder(dataset, config), args.shard))
        return
    if args.shard != slice(None) and args.cnn_weights == "random":
        raise InputError("--shard needs weights that all processes have; --cnn-weights random draws its own")
    cache, readable = extract_features(dataset, config, args.shard)
    num_cached = len(set(dataset.examples[args.shard]).intersection(readable.examples))
    print_results(f"{num_cached:,} images have their features in {cache.folder}/")


if __name__ == "__main__":
    run_main(main)
