"""The index of a run's training images, by which the images that are like a new one are found, with their captions.

It is a file in the run folder, `consensus.npz`: NumPy arrays, and a line of JSON. The vector of an image is the mean of
the CNN's features over its locations, at length 1, whitened, and at length 1 again (Jégou and Chum 2012).
"""

import copy
import dataclasses
import hashlib
import io
import itertools
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import evaluate
from beyond.consensus.agreement import DocumentFrequencies
from captioning.base.cli import InputError, first_line, format_bytes, log, progress_bar
from captioning.base.downloads import DAMAGES
from captioning.base.files import atomic_write, check_schema
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import PAD_ID
from captioning.config.run_config import RunConfig
from captioning.data.annotations import Example
from captioning.images.feature_cache import FeatureCache, location_fields, read_batches
from captioning.images.image_records import ImageRecords
from captioning.images.reading import map_threads
from data_utils import CaptionDataset
from inference import BATCH_SIZE, NUM_AHEAD, Captioner
from tokenizer import Tokenizer

INDEX_FILE = "consensus.npz"
FORMAT = 1
MAX_SIZE = 512  # of a vector
IMAGES_PER_NUMBER = 8  # of a vector, at least: with as many numbers as images, whitened ones are all equally far apart
# The arrays of the file, each with its number of axes.
ARRAYS = {
    "center": 1,
    "projection": 2,
    "vectors": 2,
    "words": 1,
    "caption_starts": 1,
    "image_starts": 1,
    "codes": 1,
    "counts": 1,
    "about": 1,
}


class Whitening(NamedTuple):
    """Makes vectors of D numbers whose variance over the training images is the same in all directions."""

    center: np.ndarray  # (C,) float32, the mean of what is whitened
    projection: np.ndarray  # (C, D) float32

    @classmethod
    def fit(cls, means: np.ndarray) -> "Whitening":
        """Finds it for the mean features (N, C) of the training images."""
        size = min(MAX_SIZE, means.shape[1], max(1, len(means) // IMAGES_PER_NUMBER))
        vectors = normalize(means)
        center = vectors.mean(axis=0)
        vectors -= center  # in place: of all of COCO they are 0.7 GB
        covariance = vectors.T @ vectors / np.float32(len(means))  # (C, C)
        with tf.device("CPU:0"):  # NumPy's eigh takes up to 20 times as long where other threads compute
            variances, directions = (x.numpy() for x in tf.linalg.eigh(covariance))  # (C,), ascending, and (C, C)
        return cls(center, directions[:, -size:] / np.sqrt(np.maximum(variances[-size:], 1e-12)))

    def apply(self, means: np.ndarray) -> np.ndarray:
        """Returns the vectors (B, D) of images, each of length 1, for their mean features (B, C)."""
        return normalize((normalize(means) - self.center) @ self.projection)


@dataclasses.dataclass(frozen=True)
class Index:
    """The training images of a run with their captions.

    Attributes:
        names: of the N images.
        whitening: makes the vectors.
        vectors: (N, D) float32, each of length 1.
        words: (W,) int32, the ids of all captions, one after the other, without <start> and <end>.
        caption_starts: (M + 1,), the places in `words` where the captions begin, and its length.
        image_starts: (N + 1,), the number of each image's first caption, and M.
        frequencies: of the n-grams of the captions.
        source: what the vectors and captions were made from, see `describe_source`.
    """

    names: Sequence[str]
    whitening: Whitening
    vectors: np.ndarray
    words: np.ndarray
    caption_starts: np.ndarray
    image_starts: np.ndarray
    frequencies: DocumentFrequencies
    source: Mapping[str, Any]

    @classmethod
    def build(
        cls, examples: Sequence[Example], means: np.ndarray, tokenizer: Tokenizer, source: Mapping[str, Any]
    ) -> "Index":
        """Builds the index of images from their mean features (N, C)."""
        whitening = Whitening.fit(means)
        captions = [np.array(tokenizer.encode(text)[1:-1], np.int32) for e in examples for text in e.captions]
        counts = [len(example.captions) for example in examples]
        images = np.repeat(np.arange(len(examples)), counts)
        return cls(
            names=[example.image_path for example in examples],
            whitening=whitening,
            vectors=whitening.apply(means).astype(np.float16).astype(np.float32),  # as they are read from the file
            words=np.concatenate(captions),
            caption_starts=np.cumsum([0, *map(len, captions)]),
            image_starts=np.cumsum([0, *counts]),
            frequencies=DocumentFrequencies.of(pad(captions), images),
            source=source,
        )

    def nearest(self, means: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Finds the images whose vectors have the largest cosine with those of others, by their mean features (B, C).

        Returns:
            Their numbers, (B, count), the nearest first, and the cosines.
        """
        cosines = self.whitening.apply(means) @ self.vectors.T  # (B, N)
        count = min(count, cosines.shape[1])
        some = np.argpartition(-cosines, count - 1, axis=1)[:, :count]  # unsorted
        order = np.argsort(-np.take_along_axis(cosines, some, axis=1), axis=1, kind="stable")
        numbers = np.take_along_axis(some, order, axis=1)
        return numbers, np.take_along_axis(cosines, numbers, axis=1)

    def captions(self, image: int) -> list[np.ndarray]:
        """Returns the ids of each caption of an image."""
        starts = self.caption_starts[self.image_starts[image] : self.image_starts[image + 1] + 1]
        return [self.words[start:end] for start, end in itertools.pairwise(starts)]

    def save(self, path: Path) -> None:
        """Writes the index; the vectors as float16."""
        about = json.dumps({"format": FORMAT, "names": self.names, "source": self.source}).encode()
        with atomic_write(path, "wb") as file:
            np.savez(
                file,
                **self.whitening._asdict(),
                vectors=self.vectors.astype(np.float16),
                words=self.words,
                caption_starts=self.caption_starts,
                image_starts=self.image_starts,
                codes=self.frequencies.codes,
                counts=self.frequencies.counts,
                about=np.frombuffer(about, np.uint8),
            )

    @classmethod
    def load(cls, path: Path) -> "Index":
        """Reads what `save` wrote; raises InputError if it is something else, or damaged."""
        content = io.BytesIO(path.read_bytes())  # before the rest: an error of the disk is not damage
        try:
            with zipfile.ZipFile(content) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise InputError("expected arrays as they are, found compressed ones")  # which may be any size
            with np.load(content, allow_pickle=False) as file:
                arrays = {name: file[name] for name in ARRAYS}
            about = json.loads(arrays.pop("about").tobytes())
            check_schema(about, {"format": int, "names": list, "source": dict})
            if about["format"] != FORMAT or not all(isinstance(name, str) for name in about["names"]):
                raise InputError(f"expected format {FORMAT} and names of images, found format {about['format']}")
            _check_arrays(arrays, len(about["names"]))
        except (*DAMAGES, InputError, KeyError, TypeError, ValueError, MemoryError, RuntimeError) as error:
            raise InputError(f"{path}: damaged, or not an index ({first_line(error)}); delete it") from None
        frequencies = DocumentFrequencies(len(about["names"]), arrays["codes"], arrays["counts"])
        return cls(
            about["names"],
            Whitening(arrays["center"], arrays["projection"]),
            arrays["vectors"].astype(np.float32),
            arrays["words"],
            arrays["caption_starts"],
            arrays["image_starts"],
            frequencies,
            about["source"],
        )


def _check_arrays(arrays: Mapping[str, np.ndarray], num_images: int) -> None:
    """Raises InputError unless the arrays of an index fit each other."""
    for name, array in arrays.items():
        kind = "f" if name in ("center", "projection", "vectors") else "iu"
        if array.ndim != ARRAYS[name] or array.dtype.kind not in kind:
            raise InputError(f"{name}: expected {ARRAYS[name]} axes, found {array.dtype} {array.shape}")
    captions, images = arrays["caption_starts"], arrays["image_starts"]
    bounds = ((images, len(captions) - 1), (captions, len(arrays["words"])))
    are_starts = all(len(x) > 1 and x[0] == 0 and x[-1] == end and (np.diff(x) >= 0).all() for x, end in bounds)
    num_channels, vector_size = arrays["projection"].shape
    expected = {"center": (num_channels,), "vectors": (num_images, vector_size), "counts": arrays["codes"].shape}
    have_sizes = all(arrays[name].shape == shape for name, shape in expected.items())
    if not (are_starts and have_sizes and len(images) == num_images + 1):
        raise InputError(f"expected the captions of {num_images} images, found others")
    are_finite = all(np.isfinite(arrays[name]).all() for name in ("center", "projection", "vectors"))
    if not are_finite or (arrays["codes"][1:] <= arrays["codes"][:-1]).any():
        raise InputError("expected numbers, and n-grams in order, found others")
    if arrays["words"].min(initial=0) < 0 or arrays["counts"].min(initial=1) < 1:
        raise InputError("expected ids of words and counts of images, found negative ones")


def pad(captions: Sequence[np.ndarray]) -> np.ndarray:
    """Pads the ids of captions to one length, (R, T)."""
    lengths = np.array([len(caption) for caption in captions])
    tokens = np.full((len(captions), max(1, lengths.max(initial=0))), PAD_ID, np.int32)
    tokens[np.arange(tokens.shape[1]) < lengths[:, np.newaxis]] = np.concatenate(captions)
    return tokens


def mean_features(features: tf.Tensor) -> np.ndarray:
    """Returns the mean over the locations of features (B, L, C): (B, C) float32."""
    return tf.reduce_mean(tf.cast(features, tf.float32), axis=1).numpy()


def normalize(vectors: np.ndarray) -> np.ndarray:
    """Scales vectors (B, C) to length 1."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


# The index of a run.


def describe_source(config: RunConfig) -> dict[str, Any]:
    """Returns what an index depends on: how features are computed, the training's data, and the ids of the words."""
    where = location_fields(config.features)
    features = {name: value for name, value in config.features.items() if name not in where}
    return {"features": features, "data": config.data_fingerprint, "vocabulary": config.vocabulary_sha256}


def hash_images(folder: Path | str, names: Sequence[str]) -> str | None:
    """Returns a hash of images as the features in a folder were computed from them; None if that is not recorded."""
    records = ImageRecords(Path(folder), Path())
    checksums = [records.checksum(name) for name in names]
    return hashlib.sha256(json.dumps(checksums).encode()).hexdigest() if any(checksums) else None


def is_current(index: Index, config: RunConfig, features_dir: str | None = None) -> bool:
    """Tells whether an index belongs to a run as it is now; of its images only if their cached features are here."""
    before = index.source.get("images")
    if index.source != describe_source(config) | {"images": before}:
        return False
    now = before and hash_images(features_dir or config.features["folder"], index.names)
    return now in (None, before)


def build_index(captioner: Captioner, dataset: CaptionDataset, cache: FeatureCache | None) -> Index:
    """Builds the index of a run from the cached features of its training images, or from the images, which is slow.

    Raises:
        InputError: features are missing, damaged or of images that have changed since; or an image cannot be read.
    """
    examples = dataset.split("train")
    if cache:
        evaluate.check_features(cache, dataset.image_dir, examples)
    names = [example.image_path for example in examples]
    batches = read_batches(cache, names, BATCH_SIZE) if cache else _compute_features(captioner, dataset, names)
    means = []
    with progress_bar(total=len(examples), unit="image", desc="index") as progress:
        for features in batches:
            means.append(mean_features(features))
            progress.update(len(features))
    mean = np.concatenate(means)
    if len(wrong := np.flatnonzero(~np.isfinite(mean).all(axis=1))):
        hint = "`features.py --verify` with the data options of the run finds and mends damaged ones"
        raise InputError(f"the features of {names[wrong[0]]} are not all numbers, and of {len(wrong) - 1} more; {hint}")
    source = describe_source(captioner.config) | {"images": hash_images(cache.folder, names) if cache else None}
    return Index.build(examples, mean, captioner.tokenizer, source)


def save_index(index: Index, path: Path) -> None:
    """Writes an index, and logs what is in it."""
    index.save(path)
    num_captions = len(index.caption_starts) - 1
    log(f"{path}: {len(index.names):,} images, {num_captions:,} captions, {format_bytes(path.stat().st_size)}")


def _compute_features(captioner: Captioner, dataset: CaptionDataset, names: list[str]) -> Iterator[tf.Tensor]:
    log(f"--choose consensus: computing the features of {len(names):,} training images, once")
    _ = captioner.extractor  # built once, for both
    captioner = copy.copy(captioner)
    captioner.compile_cnn = True  # which inference.py leaves out for a single image
    paths = [dataset.image_dir / name for name in names]
    loaded = map_threads(captioner.load_image, paths, NUM_AHEAD * BATCH_SIZE)
    while batch := list(itertools.islice(loaded, BATCH_SIZE)):
        yield captioner.extract_features(np.stack([pixels for _, pixels in batch]))
