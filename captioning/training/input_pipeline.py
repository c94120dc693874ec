"""The input pipeline: batches of captions with the features of their images, in an order that seed and epoch decide.

Unless captions are shuffled one by one, those of an image are neighbours, so that its features are read and encoded
once for all of them.
"""

import itertools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from captioning.base.devices import has_gpu, is_single
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, UNK_ID
from captioning.config.settings import TrainConfig
from captioning.data.annotations import Example
from captioning.decoder.fused_decoder import ORDER_SHAPES, WordOrder, order_words
from captioning.images.feature_cache import FeatureSource, map_prefetch
from data_utils import CaptionDataset
from tokenizer import Tokenizer

SORT_WINDOW = 50  # batches within which images are sorted by length: little padding, and batches differ by epoch
NUM_LENGTHS = 3  # of the batches that XLA compiles: each takes some seconds
IMAGE_MARGIN = 1.1  # a batch of a later epoch may have a few more images than those of the first


class TrainData(NamedTuple):
    """What a model is trained on."""

    dataset: CaptionDataset
    cache: FeatureSource  # the features of its images
    tokenizer: Tokenizer  # the words of its captions


class EncodedCaptions(NamedTuple):
    """All captions of a split as arrays, a few bytes each. The features stay on the disk."""

    feature_paths: np.ndarray  # (images,) of str
    image_index: np.ndarray  # (captions,) int32, the image of each caption
    tokens: np.ndarray  # (captions, longest) int32, padded with <pad>
    lengths: np.ndarray  # (captions,) int32, in tokens
    full_lengths: np.ndarray  # (captions,) int32, before they were cut


class Batch(NamedTuple):
    """B captions of some images."""

    # (images, L, C), in the cache's dtype; or pixels, where the CNN is trained, too; None where the step gathers them
    features: tf.Tensor | None
    image_index: tf.Tensor  # (B,) int32, the image of each caption
    tokens: tf.Tensor  # (B, T + 1) int32, padded with <pad> to the batch's longest caption
    images: tf.Tensor  # (images,) int32, their numbers in the split
    order: WordOrder | None  # the order of the words in fused_decoder.py; None with fixed shapes


class FixedShapes(NamedTuple):
    """The shapes that batches are padded to where XLA compiles the training step, anew for each shape."""

    num_captions: int
    num_images: int  # a batch that has more is padded to num_captions
    lengths: np.ndarray  # (at most NUM_LENGTHS,) of captions in tokens, ascending


def encode_captions(
    examples: list[Example],
    encode: Callable[[str], list[int]],
    feature_path: Callable[[str], object],
    max_length: int | None = None,
) -> EncodedCaptions:
    """Turns the captions of a split into arrays, padded to the longest of them (the tutorial's `pad_sequences`).

    `encode` maps a caption to its token ids, and `feature_path` an image's path to the file of its features. Captions
    of more than `max_length` tokens are cut, and then have no <end>.
    """
    sequences = [encode(caption) for example in examples for caption in example.captions]
    full_lengths = np.array([len(ids) for ids in sequences], np.int32)
    lengths = full_lengths if max_length is None else np.minimum(full_lengths, max_length).astype(np.int32)
    tokens = np.zeros((len(sequences), lengths.max()), np.int32)  # <pad> is 0
    for row, length, ids in zip(tokens, lengths, sequences, strict=True):
        row[:length] = ids[:length]
    paths = np.array([str(feature_path(example.image_path)) for example in examples])
    image_index = np.repeat(np.arange(len(examples), dtype=np.int32), [len(example.captions) for example in examples])
    return EncodedCaptions(paths, image_index, tokens, lengths, full_lengths)


def describe_cut(captions: EncodedCaptions) -> str | None:
    """Describes in one line how many captions are cut, and what the model cannot learn from them; None if none is."""
    num_captions = len(captions.lengths)
    num_cut = np.count_nonzero(captions.lengths < captions.full_lengths)
    if not num_cut:
        return None
    lesson = "a cut caption does not teach <end>"
    if num_cut == num_captions:
        lesson = "none teaches <end>, so that no caption of the model will end; raise --max-length"
    return (
        f"{num_cut:,} of {num_captions:,} captions have more than {captions.lengths.max()} tokens (--max-length) and "
        f"are cut: {lesson}; the longest has {captions.full_lengths.max()} tokens"
    )


def describe_captions(captions: EncodedCaptions, vocab_size: int) -> str:
    """Describes how much there is to learn from, and what share of the words the vocabulary lacks."""
    num_known = int(np.count_nonzero(captions.tokens > END_ID))
    num_unknown = int(np.count_nonzero(captions.tokens == UNK_ID))
    unknown = 100 * num_unknown / max(num_known + num_unknown, 1)
    return (
        f"{len(captions.lengths):,} captions of {len(captions.feature_paths):,} images, {vocab_size:,} words "
        f"({unknown:.1f} % of those in the captions are unknown)"
    )


def make_epoch_batches(
    captions: EncodedCaptions,
    batch_size: int,
    seed: int,
    epoch: int,
    min_last_batch: int = 1,
    group_by_image: bool = True,
) -> list[np.ndarray]:
    """Makes the batches of an epoch, each an array of caption indices; a stopped epoch can be resumed at any of them.

    Images are shuffled, sorted by their longest caption within windows of 50 batches, and their captions are cut into
    batches, which are shuffled. With `group_by_image=False` the same is done with captions one by one. The incomplete
    last batch comes last, or is merged into the one before if it has fewer than `min_last_batch` captions.
    """
    rng = np.random.default_rng((seed, epoch))
    if group_by_image:
        shuffled_image = rng.permutation(len(captions.feature_paths))[captions.image_index]
        order = np.argsort(shuffled_image, kind="stable")
        image_max_length = np.zeros(len(captions.feature_paths), np.int32)
        np.maximum.at(image_max_length, captions.image_index, captions.lengths)
        sort_key = image_max_length[captions.image_index]
    else:
        order, sort_key = rng.permutation(len(captions.lengths)), captions.lengths
    num_full = len(order) // batch_size * batch_size  # captions in complete batches
    last_batch = order[num_full:]
    batches = []
    for start in range(0, num_full, SORT_WINDOW * batch_size):
        window = order[start : min(start + SORT_WINDOW * batch_size, num_full)]
        window = window[np.argsort(sort_key[window], kind="stable")]
        batches += np.split(window, len(window) // batch_size)
    batches = [batches[i] for i in rng.permutation(len(batches))]
    if len(last_batch) == 0:
        return batches
    if batches and len(last_batch) < min_last_batch:
        return [*batches[:-1], np.concatenate([batches[-1], last_batch])]
    return [*batches, last_batch]


def choose_shapes(captions: EncodedCaptions, batches: list[np.ndarray]) -> FixedShapes:
    """Chooses shapes for batches of caption indices such that little is padded; those of other epochs are alike."""
    longest = np.array([captions.lengths[rows].max() for rows in batches])  # (batches,)
    candidates = np.unique(np.quantile(longest, np.linspace(0, 1, 21), method="higher"))
    choices = [
        np.unique([*lengths, captions.lengths.max()])
        for lengths in itertools.combinations_with_replacement(candidates, NUM_LENGTHS - 1)
    ]
    lengths = min(choices, key=lambda lengths: lengths[np.searchsorted(lengths, longest)].sum())
    num_captions = max(map(len, batches))
    num_images = max(len(np.unique(captions.image_index[rows])) for rows in batches)
    return FixedShapes(num_captions, min(num_captions, math.ceil(IMAGE_MARGIN * num_images)), lengths)


def make_dataset(
    captions: EncodedCaptions,
    batches: list[np.ndarray],
    read_features: Callable[[tf.Tensor], tf.Tensor] | None,
    shapes: FixedShapes | None = None,
) -> tf.data.Dataset:
    """Makes a dataset that yields batches of caption indices as `Batch`, read in parallel and ahead of the model.

    `read_features` maps the paths (images,) of feature files to their content, (images, L, C); None if the batches
    bring no features. With `shapes` batches are padded to these, with captions that have no words.
    """
    feature_paths = tf.constant([os.fsencode(path) for path in captions.feature_paths])  # which may be no Unicode
    num_arrays = 3 if shapes else 3 + len(ORDER_SHAPES)

    def make_arrays(number: int) -> tuple[np.ndarray, ...]:
        rows = batches[number]
        images, image_index = np.unique(captions.image_index[rows], return_inverse=True)
        length = captions.lengths[rows].max()
        tokens = captions.tokens[rows, :length]
        if not shapes:
            return images, image_index.astype(np.int32), tokens, *order_words(tokens)
        more_captions = shapes.num_captions - len(rows)
        more_tokens = shapes.lengths[np.searchsorted(shapes.lengths, length)] - length
        image_index = np.pad(image_index, (0, more_captions)).astype(np.int32)
        return images, image_index, np.pad(tokens, ((0, more_captions), (0, more_tokens)))

    def load_batch(number: tf.Tensor) -> Batch:
        images, image_index, tokens, *order = tf.numpy_function(make_arrays, [number], [tf.int32] * num_arrays)
        features = read_features(tf.gather(feature_paths, images)) if read_features else None
        if shapes:
            num_images = tf.shape(images)[0]
            fixed = tf.where(num_images <= shapes.num_images, shapes.num_images, shapes.num_captions)
            images = tf.pad(images, [[0, fixed - num_images]])
            if features is not None:
                features = tf.pad(features, [[0, fixed - num_images]] + [[0, 0]] * (len(features.shape) - 1))
        word_order = WordOrder(*map(tf.ensure_shape, order, ORDER_SHAPES)) if order else None
        images, image_index = tf.ensure_shape(images, (None,)), tf.ensure_shape(image_index, (None,))
        return Batch(features, image_index, tf.ensure_shape(tokens, (None, None)), images, word_order)

    # Not from_generator: it makes malloc map and unmap every large tensor of the process, those of training included.
    return map_prefetch(tf.data.Dataset.range(len(batches)), load_batch)


def copy_ahead(batches: Iterable[Batch], strategy: tf.distribute.Strategy) -> Iterator[Batch]:
    """Yields the batches with their features on the GPU, if one trains, each copied while the step before it runs.

    The integers stay where they are, in the memory of the machine: they are the shapes and indices of the step.
    """
    if not has_gpu() or not is_single(strategy):
        yield from batches
        return
    iterator = iter(batches)

    def copy_next() -> Batch | None:
        batch = next(iterator, None)
        if batch is None:
            return None
        with tf.device("GPU:0"):
            return batch._replace(features=tf.identity(batch.features))

    # In a thread, since a copy returns when it is done, and waits for all work that the GPU has been given before.
    with ThreadPoolExecutor(1) as thread:
        copied = thread.submit(copy_next)
        while (batch := copied.result()) is not None:
            copied = thread.submit(copy_next)
            yield batch


class TrainBatches:
    """The batches of a training, made for the devices of a strategy, each of which gets its part of every batch.

    `read_features` is that of `make_dataset`.
    """

    def __init__(
        self,
        captions: EncodedCaptions,
        read_features: Callable[[tf.Tensor], tf.Tensor] | None,
        config: TrainConfig,
        strategy: tf.distribute.Strategy,
    ):
        self.captions, self.read_features = captions, read_features
        self.config, self.strategy = config, strategy
        self.shapes: FixedShapes | None = None
        if config.jit == "on":
            num_replicas = strategy.num_replicas_in_sync
            parts = [part for rows in self.order(0) for part in np.array_split(rows, num_replicas)]
            self.shapes = choose_shapes(captions, parts)  # the same in a run that is resumed

    @property
    def spec(self) -> Any:
        """The shapes and types of a batch, for `tf.function`."""
        return self._make_dataset([]).element_spec

    def order(self, epoch: int) -> list[np.ndarray]:
        """Returns the batches of an epoch as arrays of caption indices; see `make_epoch_batches`."""
        return make_epoch_batches(
            self.captions,
            self.config.batch_size,
            self.config.seed,
            epoch,
            min_last_batch=self.strategy.num_replicas_in_sync,
            group_by_image=self.config.shuffle_by == "image",
        )

    def load(self, order: list[np.ndarray]) -> Iterator[Batch]:
        """Yields batches, given as arrays of caption indices, read ahead of the model."""
        batches = self._make_dataset(order)
        return copy_ahead(batches, self.strategy) if self.read_features else iter(batches)

    def _make_dataset(self, order: list[np.ndarray]) -> tf.data.Dataset:
        def make_input(context: tf.distribute.InputContext) -> tf.data.Dataset:
            num_replicas = context.num_replicas_in_sync
            num_local = num_replicas // context.num_input_pipelines
            first = context.input_pipeline_id * num_local
            parts = [part for rows in order for part in np.array_split(rows, num_replicas)[first : first + num_local]]
            return make_dataset(self.captions, parts, self.read_features, self.shapes)

        # To the replicas' devices only the step copies, what it needs there: see copy_ahead.
        options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
        return self.strategy.distribute_datasets_from_function(make_input, options)
