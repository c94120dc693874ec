"""The input pipeline: batches of captions with the features of their images, in an order that seed and epoch decide.

Unless captions are shuffled one by one, those of an image are neighbours, so that its features are read and encoded
once for all of them.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from captioning.base.devices import has_gpu
from captioning.base.quiet_tensorflow import tf
from captioning.base.special_tokens import END_ID, UNK_ID
from captioning.config.settings import TrainConfig
from captioning.data.annotations import Example
from captioning.decoder.fused_decoder import ORDER_SHAPES, WordOrder, order_words
from captioning.images.feature_cache import FeatureSource, map_prefetch
from data_utils import CaptionDataset
from tokenizer import Tokenizer

SORT_WINDOW = 50  # batches within which images are sorted by length: little padding, and batches differ by epoch


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

    features: tf.Tensor  # (images, L, C), in the cache's dtype; or pixels, where the CNN is trained, too
    image_index: tf.Tensor  # (B,) int32, the image of each caption
    tokens: tf.Tensor  # (B, T + 1) int32, padded with <pad> to the batch's longest caption
    images: tf.Tensor  # (images,) int32, their numbers in the split
    order: WordOrder | None  # the order of the words in fused_decoder.py; None with static shapes


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


def make_dataset(
    captions: EncodedCaptions,
    batches: list[np.ndarray],
    read_features: Callable[[tf.Tensor], tf.Tensor],
    static_shapes: bool = False,
) -> tf.data.Dataset:
    """Makes a dataset that yields batches of caption indices as `Batch`, read in parallel and ahead of the model.

    `read_features` maps the paths (images,) of feature files to their content, (images, L, C). With `static_shapes`
    captions are padded to the largest batch, and images and tokens to multiples of 8, so that there are few shapes: XLA
    compiles anew for each.
    """
    largest = max(map(len, batches), default=0)
    feature_paths = tf.constant([os.fsencode(path) for path in captions.feature_paths])  # which may be no Unicode

    def round_up(count):
        return -(-count // 8) * 8 if static_shapes else count

    def make_arrays(number: int) -> tuple[np.ndarray, ...]:
        rows = batches[number]
        images, image_index = np.unique(captions.image_index[rows], return_inverse=True)
        num_steps = captions.lengths[rows].max() - 1
        tokens = np.zeros((largest if static_shapes else len(rows), 1 + round_up(num_steps)), np.int32)
        tokens[: len(rows), : 1 + num_steps] = captions.tokens[rows, : 1 + num_steps]
        order = () if static_shapes else order_words(tokens)
        return images, np.pad(image_index, (0, len(tokens) - len(rows))).astype(np.int32), tokens, *order

    def load_batch(number: tf.Tensor) -> Batch:
        num_arrays = 3 if static_shapes else 3 + len(ORDER_SHAPES)
        images, image_index, tokens, *order = tf.numpy_function(make_arrays, [number], [tf.int32] * num_arrays)
        features = read_features(tf.gather(feature_paths, images))
        padding = round_up(tf.shape(features)[0]) - tf.shape(features)[0]
        features = tf.pad(features, [[0, padding]] + [[0, 0]] * (len(features.shape) - 1))
        images = tf.ensure_shape(tf.pad(images, [[0, padding]]), (None,))
        word_order = WordOrder(*map(tf.ensure_shape, order, ORDER_SHAPES)) if order else None
        image_index, tokens = tf.ensure_shape(image_index, (None,)), tf.ensure_shape(tokens, (None, None))
        return Batch(features, image_index, tokens, images, word_order)

    # Not from_generator: it makes malloc map and unmap every large tensor of the process, those of training included.
    return map_prefetch(tf.data.Dataset.range(len(batches)), load_batch)


def copy_ahead(batches: Iterable[Batch], strategy: tf.distribute.Strategy) -> Iterator[Batch]:
    """Yields the batches with their features on the GPU, if one trains, each copied while the step before it runs.

    The integers stay where they are, in the memory of the machine: they are the shapes and indices of the step.
    """
    if not has_gpu() or strategy is not tf.distribute.get_strategy():
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


class TrainBatches(NamedTuple):
    """The batches of a training, made for the devices of a strategy, each of which gets its part of every batch."""

    captions: EncodedCaptions
    read_features: Callable[[tf.Tensor], tf.Tensor]
    config: TrainConfig
    strategy: tf.distribute.Strategy

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
        return copy_ahead(self._make_dataset(order), self.strategy)

    def _make_dataset(self, order: list[np.ndarray]) -> tf.data.Dataset:
        def make_input(context: tf.distribute.InputContext) -> tf.data.Dataset:
            num_replicas = context.num_replicas_in_sync
            num_local = num_replicas // context.num_input_pipelines
            first = context.input_pipeline_id * num_local
            parts = [part for rows in order for part in np.array_split(rows, num_replicas)[first : first + num_local]]
            return make_dataset(self.captions, parts, self.read_features, static_shapes=self.config.jit == "on")

        # To the replicas' devices only the step copies, what it needs there: see copy_ahead.
        options = tf.distribute.InputOptions(experimental_fetch_to_device=False)
        return self.strategy.distribute_datasets_from_function(make_input, options)
