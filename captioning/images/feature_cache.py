"""The cache of image features: a folder with one .npy file per image, and features.json.

features.json is the manifest: it records how the features were made, so that features of different CNNs, images or
number formats are never mixed. features.py fills the cache. Training and evaluation read it.
"""

import contextlib
import io
import os
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from captioning.base.cli import InputError, log, progress_bar
from captioning.base.files import atomic_write, check_schema, file_sha256, read_json, relative_path
from captioning.base.quiet_tensorflow import tf
from captioning.config.cnns import CNN, INCEPTION_V3, cnn_of_manifest
from captioning.config.run_config import find_difference
from captioning.images.image_records import ImageRecords
from captioning.images.reading import map_threads

HEADER_BYTES = 128  # what np.save writes before the features of an image
NUM_READERS = 8  # threads that read features, and batches that are read ahead
MANIFEST_FILE = "features.json"
MANIFEST_FIELDS = {
    "cnn": str,  # its name in keras.applications, such as InceptionV3
    "weights": str,  # imagenet, random, or a file; with the file's "sha256" unless it is imagenet
    "image_size": int,
    "shape": list,  # of the features of an image, [L, C], which the CNN and the image size decide
    "dtype": str,  # of the stored features: float16 or float32
    "images": str,  # the image folder, relative to the cache
}
# What the CNN computes in; of another than float32 the manifest says it as its "precision".
PRECISIONS = ("float32", "tf32", "float16")
CNN_FILE = "cnn.weights.h5"  # the CNN's weights, which are kept in the cache if they are random


class FeatureSource(Protocol):
    """What training reads: a cache of features, or the images, where the CNN is trained, too."""

    folder: Path
    manifest: dict[str, Any]
    failure: InputError | None  # what could not be read; see `explain_failure`

    @property
    def cnn_weights(self) -> str:
        """The weights of the CNN: `imagenet` or a file."""

    def path(self, image_path: str) -> Path:
        """Returns the file that is read for an image."""

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Reads files (B,) inside a tf.data pipeline."""


class FeatureCache:
    """A folder of image features.

    Attributes:
        folder: the folder; the features of `a/b.jpg` are in `a/b.jpg.npy`.
        manifest: the content of features.json.
        cnn: the CNN that computes them, and the size of its images.
        shape: of the features of an image: L locations and C channels, of InceptionV3 (64, 2048).
        dtype: the stored features' type, float16 or float32.
        num_bytes: of the file of an image's features.
        precision: what the CNN computes in, one of `PRECISIONS`.
        failure: features that could not be read.
    """

    def __init__(self, folder: Path | str, manifest: dict[str, Any]):
        self.folder = Path(folder)
        self.manifest = manifest
        self.cnn = cnn_of_manifest(manifest)
        self.shape = self.cnn.features_shape
        self.dtype = np.dtype(manifest["dtype"])
        self.precision = manifest.get("precision", "float32")
        self.failure: InputError | None = None
        example = io.BytesIO()
        np.save(example, np.empty(self.shape, self.dtype))
        self.num_bytes = len(example.getvalue())
        self._header = example.getvalue()[:HEADER_BYTES]

    @property
    def cnn_weights(self) -> str:
        """The weights of the CNN that computes the features: `imagenet` or a file."""
        if self.manifest["weights"] == "random":
            return str(self.folder / CNN_FILE)
        return self.manifest["weights"]

    def path(self, image_path: str) -> Path:
        """Returns the file that holds the features of an image, whether it exists or not."""
        return self.folder / f"{image_path}.npy"

    def missing(self, image_paths: Iterable[str]) -> list[str]:
        """Returns the images that have no complete file of features."""
        return [image_path for image_path in image_paths if not self._is_complete(self.path(image_path))]

    def _is_complete(self, path: Path) -> bool:
        """Tells whether a file has the size and the header that `write` gives it. `read` checks neither."""
        try:
            with open(path, "rb") as file:
                return file.read(HEADER_BYTES) == self._header and file.seek(0, os.SEEK_END) == self.num_bytes
        except (OSError, ValueError):  # there is no such file, or its name is too long or contains a NUL
            return False

    def write(self, image_path: str, features: np.ndarray) -> int:
        """Stores the features of one image, (L, C), and returns the CRC-32 of the file."""
        content = np.ascontiguousarray(features, self.dtype).data
        with atomic_write(self.path(image_path), "wb") as file:
            file.write(self._header)  # as np.save does, which would copy the features first
            file.write(content)
        return zlib.crc32(content, zlib.crc32(self._header))

    def read(self, paths: tf.Tensor) -> tf.Tensor:
        """Reads files (B,) inside a tf.data pipeline: features (B, L, C), as stored.

        They are read as plain bytes: that releases Python's lock, which np.load holds, so that several threads read at
        the same time. One that cannot be read is an error of the pipeline; see `explain_failure`.
        """

        def load(paths: np.ndarray) -> np.ndarray:
            features = np.empty((len(paths), *self.shape), self.dtype)
            for row, path in zip(features, paths, strict=True):
                try:
                    with open(path, "rb") as file:
                        file.seek(-row.nbytes, os.SEEK_END)  # skips the header
                        file.readinto(row)
                except OSError as error:
                    self.failure = InputError(
                        f"{os.fsdecode(path)}: these features are gone or damaged since the start ({error.strerror}); "
                        "features.py, or train.py run again, computes them"
                    )
                    raise
            return features

        features = tf.numpy_function(load, [paths], self.dtype)
        return tf.ensure_shape(features, (None, *self.shape))


@contextlib.contextmanager
def explain_failure(source: FeatureSource) -> Iterator[None]:
    """Turns the error of a tf.data pipeline into the `InputError` behind it, if a file could not be read."""
    try:
        yield
    except tf.errors.OpError:
        if source.failure:
            raise source.failure from None
        raise


def map_prefetch(dataset: tf.data.Dataset, fn: Callable) -> tf.data.Dataset:
    """Maps a dataset with several threads, and keeps some results ready for the model."""
    # Without autotuning: at the end of a dataset TensorFlow waits for its autotuner, which may sleep for a minute.
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.map(fn, num_parallel_calls=NUM_READERS).prefetch(NUM_READERS).with_options(options)


def read_batches(source: FeatureSource, image_paths: Iterable[str], batch_size: int) -> Iterator[tf.Tensor]:
    """Yields what a source has of images, batch by batch; several threads read the next ones.

    Raises:
        InputError: a file cannot be read.
    """
    paths = [os.fsencode(source.path(image_path)) for image_path in image_paths]
    with explain_failure(source):
        yield from map_prefetch(tf.data.Dataset.from_tensor_slices(paths).batch(batch_size), source.read)


def find_outdated(cache: FeatureCache, records: ImageRecords, image_paths: list[str]) -> list[str]:
    """Returns the images that have no features, damaged ones, or those of another file of the same name."""
    missing = cache.missing(image_paths)
    for path in map(cache.path, missing):
        if os.path.exists(path):
            log(f"features: {path} is damaged and will be computed again")
    outdated = set(missing)
    changed = records.find_changed(image_path for image_path in image_paths if image_path not in outdated)
    if changed:
        log(f"features: {len(changed):,} images have changed and will be computed again, the first: {changed[0]}")
    outdated.update(changed)
    return [image_path for image_path in image_paths if image_path in outdated]


def find_damaged(cache: FeatureCache, records: ImageRecords, image_paths: list[str]) -> tuple[list[str], int]:
    """Reads the features of images, which have some, and compares them with what was written.

    Returns:
        The images whose features are another content, and the number of those without a checksum.
    """

    def read(image_path: str) -> tuple[int, bool]:
        return zlib.crc32(cache.path(image_path).read_bytes()), not cache.missing([image_path])

    damaged, num_unknown = [], 0
    with progress_bar(total=len(image_paths), desc="verifying", unit="image") as progress:
        for image_path, (checksum, is_complete) in map_threads(read, image_paths, NUM_READERS):
            progress.update()
            expected = records.checksum(image_path)
            num_unknown += expected is None
            if not is_complete or expected not in (None, checksum):
                damaged.append(image_path)
    return damaged, num_unknown


# The manifest.


def check_manifest(manifest: Any) -> None:
    """Checks a manifest of a features.json or a config.json; raises InputError if a field is missing or wrong."""
    check_schema(manifest, MANIFEST_FIELDS)
    if manifest["weights"] != "imagenet":
        check_schema(manifest, {"sha256": str})
    if manifest["dtype"] not in ("float16", "float32"):
        raise InputError(f"dtype: expected float16 or float32, found {manifest['dtype']!r}")
    if (precision := manifest.get("precision", "float32")) not in PRECISIONS:
        raise InputError(f"precision: expected {', '.join(PRECISIONS)}, found {precision!r}")
    cnn_of_manifest(manifest)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the features.json of a cache; raises InputError if it is missing, or is not a manifest."""
    manifest = read_json(folder / MANIFEST_FILE)
    try:
        check_manifest(manifest)
    except InputError as error:
        raise InputError(f"{folder / MANIFEST_FILE}: not the manifest of a feature cache ({error})") from None
    return manifest


def make_manifest(
    folder: Path,
    image_dir: Path,
    cnn_weights: str,
    dtype: str,
    cnn: CNN = INCEPTION_V3,
    precision: str = "float32",
) -> dict[str, Any]:
    """Makes the manifest of a cache, without the SHA-256 of random weights, which are drawn later.

    `cnn_weights` is `imagenet`, `random`, or a file, which exists; `precision` is one of `PRECISIONS`.
    """
    manifest = {
        "cnn": cnn.name,
        "weights": cnn_weights,
        "image_size": cnn.image_size,
        "shape": list(cnn.features_shape),
        "dtype": dtype,
        # A relative path: a project that is moved as a whole keeps its cache.
        "images": relative_path(image_dir.resolve(), folder.resolve()),
    }
    if cnn_weights not in ("imagenet", "random"):
        manifest["sha256"] = file_sha256(cnn_weights)
    if precision != "float32":
        manifest["precision"] = precision
    return manifest


def compare_manifests(
    ours: dict[str, Any], theirs: dict[str, Any], ignored: Collection[str]
) -> tuple[str, Any, Any] | None:
    """Returns the first field in which two manifests differ, and both values; see `find_difference`."""
    return find_difference({"precision": "float32"} | ours, {"precision": "float32"} | theirs, ignored)


def location_fields(manifest: dict[str, Any]) -> set[str]:
    """Returns the fields of a run's manifest that say where something is, and not how features are computed."""
    # A file of weights is identified by its content, not by its name. The images may have moved.
    return {"folder", "images", "weights" if "sha256" in manifest else "sha256"}


def open_run_cache(manifest: dict[str, Any]) -> FeatureCache:
    """Opens the cache of a run, by the manifest in its config.json, which also has the cache's `folder`.

    Raises:
        InputError: the cache is missing, or its features were computed again with another CNN.
    """
    folder = Path(manifest["folder"])
    stored = read_manifest(folder)
    if difference := compare_manifests(stored, manifest, ignored=location_fields(manifest)):
        key, found, expected = difference
        raise InputError(
            f"{folder} does not hold the features this run was trained with: its {key} is {found}, that of the run's "
            f"config.json {expected}; compute them again with features.py and the options of the run"
        )
    return FeatureCache(folder, manifest)


# The weights of the CNN.


def check_cnn_weights(cnn_weights: str, sha256: str | None = None) -> None:
    """Checks that the CNN's weights exist: `imagenet`, `random`, or a file, with this SHA-256 if one is given.

    Raises:
        InputError: there is no such file, or it has another SHA-256.
    """
    if cnn_weights not in ("imagenet", "random") and not Path(cnn_weights).is_file():
        raise InputError(
            f"{cnn_weights}: no such weights file; expected imagenet, random, or a file of the CNN's weights"
        )
    # Random weights are read from the file that was saved with them, never drawn again.
    if sha256 and (cnn_weights in ("imagenet", "random") or file_sha256(cnn_weights) != sha256):
        raise InputError(
            f"{cnn_weights}: not the weights of the CNN that computed the features, whose SHA-256 is {sha256}"
        )


def find_cnn_weights(run: Path) -> str | None:
    """Returns the file of CNN weights in a run's folder. There is none if they are ImageNet's."""
    return next((str(path) for path in sorted(run.glob("cnn*.h5"))), None)
