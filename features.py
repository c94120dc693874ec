"""Computes the features of the images with a CNN and caches them, one .npy file per image.

Tutorial sections: "Preprocess the images using InceptionV3", "Initialize InceptionV3 and load the pretrained
Imagenet weights" and "Caching the features extracted from InceptionV3".

    python features.py                                              # the images of the default dataset, COCO
    python features.py --annotations captions.csv --images photos/  # your own images
    python features.py --shard 1/2                                  # half of the images, on one of two machines
    python features.py --cnn vgg19                                  # the paper's CNN, 14x14 locations

The features of an image are (L, C): C channels at the L locations of the CNN's last convolutional layer. Those of
InceptionV3 are (64, 2048), from a grid of 8x8. The CNN is not trained, so they are computed only once. Training
then reads 256 KB per image (float16) and does not repeat 5.7 billion multiplications. docs/use.md compares the
CNNs. The command can be stopped at any time. Run again, it continues.
"""

import argparse
import errno
import itertools
import math
import os
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

import data_utils
from captioning.base.cli import InputError, add_quiet_option, format_bytes, log, make_parser, progress_bar, run_main
from captioning.base.files import check_disk_space, file_sha256, write_json
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN, INCEPTION_V3
from captioning.config.options import add_options
from captioning.config.settings import DataConfig, FeatureConfig
from captioning.images.cnn_loader import find_cnn, load_cnn, preprocess
from captioning.images.feature_cache import (
    CNN_FILE,
    MANIFEST_FILE,
    SCALED_JPEG_SIDE,
    FeatureCache,
    check_cnn_weights,
    find_difference,
    find_outdated,
    make_manifest,
    read_manifest,
    scaled_jpeg_side,
)
from captioning.images.image_records import ImageRecords
from captioning.images.random_cnn import calibrate, make_local
from captioning.images.reading import ImageSource, map_threads, read_image, set_max_megapixels

NUM_CALIBRATION_IMAGES = 64
NUM_WRITERS = 4  # threads
NOT_WRITTEN = "its features cannot be written"
NAME_ERRORS = (errno.ENAMETOOLONG, errno.EINVAL, errno.EILSEQ, errno.EISDIR, errno.ENOTDIR)  # of one file, not of all
DECODE_BUFFER = 69e6  # largest size of decoded images that wait for the CNN, in bytes


# Preprocess the images using InceptionV3. Training and inference use the same function.


def load_image(
    image: ImageSource, min_jpeg_side: int | None = SCALED_JPEG_SIDE, image_size: int = INCEPTION_V3.image_size
) -> np.ndarray:
    """Reads an image of any format that Pillow knows as the pixels that the CNN takes.

    The image is converted to upright RGB (`reading.read_image`). As in the tutorial, it is squeezed to a
    square and not cropped. The feature extractor scales the pixels (`preprocess_input` in the tutorial).
    `min_jpeg_side` and `image_size` are by default those of a new cache; `Captioner.load_image` takes those of its run.

    Returns:
        (image_size, image_size, 3) uint8.

    Raises:
        InputError: see `read_image`.
    """
    return to_pixels(read_image(image, min_jpeg_side), image_size)


def to_pixels(image: Image.Image, image_size: int = INCEPTION_V3.image_size) -> np.ndarray:
    """Squeezes an image, upright and in RGB, to what the CNN takes: (image_size, image_size, 3) uint8."""
    return np.asarray(image.resize((image_size, image_size), Image.Resampling.BILINEAR))


# Initialize InceptionV3 and load the pretrained ImageNet weights.


def build_feature_extractor(cnn_weights: str = "imagenet", cnn: CNN = INCEPTION_V3) -> tf.keras.Model:
    """Builds the CNN that turns pixels into features (`image_features_extract_model` in the tutorial).

    It computes in float32, on a GPU too, so that all devices compute the same features.

    Args:
        cnn_weights: `imagenet` (downloaded on first use), `random` (see `random_cnn`), or a file of weights.
        cnn: which one, and the size of its images.

    Returns:
        A model from (B, size, size, 3) uint8 to (B, L, C) float32; InceptionV3: (B, 299, 299, 3) to (B, 64, 2048).

    Raises:
        InputError: the weights cannot be downloaded, are missing, or do not belong to the CNN.
    """
    check_cnn_weights(cnn_weights)
    model = load_cnn(cnn, cnn_weights)
    if cnn_weights == "random":
        make_local(model)
    pixels = tf.keras.Input((cnn.image_size, cnn.image_size, 3), dtype="uint8")
    x = model(preprocess(pixels, cnn))  # (B, H, W, C), of InceptionV3 (B, 8, 8, 2048)
    x = tf.keras.layers.Reshape(cnn.features_shape, dtype="float32")(x)  # (B, L, C), row after row
    return tf.keras.Model(pixels, x)


# Caching the features extracted from InceptionV3.


def open_or_create_cache(
    folder: Path | str,
    image_dir: Path,
    image_paths: list[str],
    cnn_weights: str,
    dtype: str,
    cnn: CNN = INCEPTION_V3,
) -> FeatureCache:
    """Opens the cache in a folder, or creates one there.

    Random weights are drawn when the cache is created, calibrated on its first images, and saved in its folder.

    Args:
        folder: the cache's folder.
        image_dir: the folder of the images.
        image_paths: the images, relative to `image_dir`.
        cnn_weights: `imagenet`, `random`, or a file of weights.
        dtype: `float16` or `float32`, the type of the stored features.
        cnn: the CNN, and the size of its images.

    Raises:
        InputError: the folder holds features of other images, of another CNN, of other weights, or of another dtype.
    """
    folder = Path(folder)
    check_cnn_weights(cnn_weights)
    expected = make_manifest(folder, image_dir, cnn_weights, dtype, cnn)
    # A cache without features is created again. It may be left over from weights that could not be downloaded.
    if not (folder / MANIFEST_FILE).exists() or next(folder.rglob("*.npy"), None) is None:
        if cnn_weights == "random":
            expected["sha256"] = _save_random_weights(folder, image_dir, image_paths, cnn)
        write_json(folder / MANIFEST_FILE, expected)
    manifest = read_manifest(folder)
    were_moved = manifest["images"] != expected["images"] and not (folder / manifest["images"]).exists()
    if were_moved:  # those with another content are computed again
        manifest["images"] = expected["images"]
    expected["jpeg_decoding"] = manifest.get("jpeg_decoding")  # a cache goes on as it began
    # A file may have another name. The shape, which earlier versions did not write, follows from CNN and image size.
    keys = [key for key in expected if key != "shape" and (key != "weights" or "sha256" not in expected)]
    if key := find_difference(manifest, expected, keys):
        raise InputError(
            f"{folder} holds features made with {key} {manifest.get(key)}, expected {expected[key]}; choose another "
            f"--features-dir, or give the settings in {folder / MANIFEST_FILE}"
        )
    if were_moved:
        log(f"features: the images of {folder}/ have moved, and are now in {image_dir}/")
        write_json(folder / MANIFEST_FILE, manifest)
    return FeatureCache(folder, {**manifest, "weights": cnn_weights})


def _save_random_weights(folder: Path, image_dir: Path, image_paths: list[str], cnn: CNN) -> str:
    """Saves a calibrated random CNN in the cache's folder and returns the SHA-256 of the file."""
    extractor = build_feature_extractor("random", cnn)
    candidates = image_paths[: 2 * NUM_CALIBRATION_IMAGES]  # twice as many, since some may be unreadable
    loaded = load_images(image_dir, candidates, None, scaled_jpeg_side(cnn), cnn.image_size)
    images = [image for _, image in loaded if isinstance(image, np.ndarray)]
    if not images:
        raise InputError(f"{image_dir}: none of the first {len(candidates)} images can be read")
    calibrate(extractor, np.stack(images[:NUM_CALIBRATION_IMAGES]), cnn)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{CNN_FILE}"  # not atomic_write: Keras demands the ending .weights.h5
    find_cnn(extractor).save_weights(partial)
    os.replace(partial, folder / CNN_FILE)
    return file_sha256(folder / CNN_FILE)


def load_images(
    image_dir: Path,
    image_paths: Iterable[str],
    records: ImageRecords | None,
    min_jpeg_side: int | None,
    image_size: int = INCEPTION_V3.image_size,
) -> Iterator[tuple[str, np.ndarray | InputError]]:
    """Loads images in their order, with several threads, and notes their files in `records`.

    Yields:
        The image's path, and its pixels, (image_size, image_size, 3) uint8, or the reason why it cannot be read.
    """

    def load(image_path: str) -> np.ndarray | InputError:
        if records:
            records.note(image_path)
        try:
            return load_image(image_dir / image_path, min_jpeg_side, image_size)
        except InputError as error:
            return error

    return map_threads(load, image_paths, math.ceil(DECODE_BUFFER / (3 * image_size**2)))


def announce_extraction(cache: FeatureCache, missing: list[str], num_images: int) -> None:
    """Logs how many of `num_images` images are missing in a cache, and the disk space and time that they take.

    Raises:
        InputError: the disk has too little space.
    """
    num_bytes = len(missing) * math.prod(cache.shape) * cache.dtype.itemsize
    cost = format_bytes(num_bytes)
    if not tf.config.list_physical_devices("GPU"):
        cost += f", about {math.ceil(cache.cnn.seconds(len(missing)) / 60)} min on two CPU cores"
    log(
        f"features: {num_images - len(missing):,} of {num_images:,} images are cached in {cache.folder}/, "
        f"computing {len(missing):,} ({cost})"
    )
    check_disk_space(cache.folder, num_bytes, "caching them", "use --features-dir on a larger disk, or fewer images")


def compute_features(
    extractor: tf.keras.Model, images: Iterator[tuple[str, np.ndarray]], batch_size: int, dtype: np.dtype
) -> Iterator[tuple[list[str], np.ndarray]]:
    """Computes the features of images, given with their paths, in batches.

    Yields:
        The paths of B images, and their features, (B, L, C), rounded on the device: float16 is sooner copied.
    """

    @tf.function(reduce_retracing=True)
    def extract(pixels: tf.Tensor) -> tf.Tensor:
        return tf.cast(extractor(pixels, training=False), dtype)  # (B, L, C)

    def stack() -> Iterator[tuple[list[str], np.ndarray]]:
        while batch := list(itertools.islice(images, batch_size)):
            yield [image_path for image_path, _ in batch], np.stack([image for _, image in batch])

    # A thread runs the CNN while this one makes the next batch. On a GPU that one is queued before this one is awaited.
    for (image_paths, _), values in map_threads(lambda batch: extract(batch[1]), stack(), 2, num_threads=1):
        yield image_paths, values.numpy()


def write_features(
    cache: FeatureCache,
    records: ImageRecords,
    batches: Iterable[tuple[list[str], np.ndarray]],
    progress: tqdm,
    unreadable: dict[str, str],
) -> None:
    """Stores batches of features with several threads, while the CNN computes the next batch (the tutorial's loop).

    Images whose features cannot be written because of their name are added to `unreadable`, with the reason.
    """

    def store(image_path: str, features: np.ndarray) -> None:
        cache.write(image_path, features)  # np.save of one image's features, (L, C)
        records.add(image_path)

    def finish(pending: dict[str, Future]) -> None:
        for image_path, future in pending.items():
            try:
                future.result()
            except OSError as error:
                if error.errno not in NAME_ERRORS:  # such as a full disk, which concerns all images
                    raise
                unreadable[image_path] = f"{records.image_dir / image_path}: {NOT_WRITTEN} ({error.strerror})"
                log(f"skipped {unreadable[image_path]}", error=True)

    with ThreadPoolExecutor(NUM_WRITERS) as pool:
        pending: dict[str, Future] = {}
        for image_paths, features in batches:
            finish(pending)
            pending = {path: pool.submit(store, path, x) for path, x in zip(image_paths, features, strict=True)}
            progress.update(len(image_paths))
        finish(pending)


def cache_features(cache: FeatureCache, image_dir: Path, image_paths: list[str], batch_size: int) -> dict[str, str]:
    """Computes and stores the features that a cache lacks. If it is stopped at any moment, the next call continues.

    Returns:
        The images that cannot be read, or whose features cannot be written, each with the reason.

    Raises:
        InputError: none of the images can be read, the CNN's weights are missing, or the disk is too small.
    """
    image_paths = list(dict.fromkeys(image_paths))  # without duplicates
    records = ImageRecords(cache.folder, image_dir)
    missing = find_outdated(cache, records, image_paths)
    if not missing:
        return {}
    announce_extraction(cache, missing, len(image_paths))
    check_cnn_weights(cache.cnn_weights, cache.manifest.get("sha256"))
    extractor = build_feature_extractor(cache.cnn_weights, cache.cnn)
    unreadable: dict[str, str] = {}
    with progress_bar(total=len(missing), unit="image", desc="features") as progress:
        loaded = load_images(image_dir, missing, records, cache.min_jpeg_side, cache.cnn.image_size)
        batches = compute_features(extractor, _skip_unreadable(loaded, unreadable), batch_size, cache.dtype)
        write_features(cache, records, batches, progress, unreadable)
        progress.update(len(missing) - progress.n)  # those that cannot be read
    if len(unreadable) == len(image_paths):
        first = next(iter(unreadable.values()))
        raise InputError(f"{image_dir}: none of the {len(image_paths):,} images can be read; the first: {first}")
    return unreadable


def _skip_unreadable(
    images: Iterable[tuple[str, np.ndarray | InputError]], unreadable: dict[str, str]
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields the images that could be read, and adds the others to `unreadable`, with the reason."""
    for image_path, image in images:
        if isinstance(image, InputError):
            unreadable[image_path] = str(image)
            log(f"skipped {image}", error=True)
        else:
            yield image_path, image


def extract_features(
    dataset: data_utils.CaptionDataset, config: FeatureConfig, shard: slice = slice(None)
) -> tuple[FeatureCache, data_utils.CaptionDataset]:
    """Caches the features of a dataset's images.

    Args:
        dataset: the images.
        config: how the features are computed and stored.
        shard: the part of the images whose features are computed; all by default.

    Returns:
        The cache, and the dataset without the images that cannot be read.
    """
    set_max_megapixels(config.max_megapixels)
    cnn = config.sized_cnn
    folder = config.features_dir or f"features/{dataset.name}{cnn.suffix}"
    image_paths = [example.image_path for example in dataset.examples]
    cache = open_or_create_cache(folder, dataset.image_dir, image_paths, config.cnn_weights, config.dtype, cnn)
    unreadable = cache_features(cache, dataset.image_dir, image_paths[shard], config.cnn_batch_size)
    if unreadable:
        count = len(image_paths[shard])
        log(f"features: {len(unreadable):,} of {count:,} images cannot be read: left out, with their captions")
    return cache, dataset.exclude(set(unreadable))


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
    add_quiet_option(parser)
    args = parser.parse_args(argv)
    dataset = data_utils.load_dataset(DataConfig.from_args(args))
    if args.shard != slice(None) and args.cnn_weights == "random":
        raise InputError("--shard needs weights that all processes have; --cnn-weights random draws its own")
    cache, readable = extract_features(dataset, FeatureConfig.from_args(args), args.shard)
    num_cached = len(set(dataset.examples[args.shard]).intersection(readable.examples))
    print(f"{num_cached:,} images have their features in {cache.folder}/")


if __name__ == "__main__":
    run_main(main)
