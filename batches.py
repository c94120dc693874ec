"""Batches of captions with their pictures' features, in an order that seed and epoch determine.

Captions of a picture are neighbours, unless otherwise wanted, so that its features are read and encoded once for all.
"""

from typing import NamedTuple

import features
import numpy as np
import tensorflow as tf

import data_utils
from tokenizer import Tokenizer

WINDOW = 50  # batches among which pictures are sorted by length: few steps, and batches still differ by epoch


class Captions(NamedTuple):
    """All captions of a split as arrays, a few bytes each; the features stay on the disk."""

    paths: np.ndarray  # (pictures,) of str, the features' files
    picture: np.ndarray  # (captions,) int32, each caption's picture
    tokens: np.ndarray  # (captions, longest) int32, padded with <pad>
    lengths: np.ndarray  # (captions,) int32


def encode_captions(
    examples: list[data_utils.Example], words: Tokenizer, cache: features.FeatureCache, max_length: int
) -> Captions:
    """Turns the captions of a split into arrays."""
    rows = [(i, words.encode(text, max_length)) for i, example in enumerate(examples) for text in example.captions]
    tokens = np.zeros((len(rows), max(len(ids) for _, ids in rows)), np.int32)
    for row, (_, ids) in zip(tokens, rows, strict=True):
        row[: len(ids)] = ids
    return Captions(
        np.array([str(cache.path(example.image)) for example in examples]),
        np.array([i for i, _ in rows], np.int32),
        tokens,
        np.array([len(ids) for _, ids in rows], np.int32),
    )


class Batch(NamedTuple):
    """B captions of P pictures."""

    pictures: tf.Tensor  # (P, 64, 2048), the features in the cache's dtype
    picture: tf.Tensor  # (B,) int32, each caption's picture
    tokens: tf.Tensor  # (B, T) int32, padded with <pad> to the batch's longest caption


def order_batches(
    captions: Captions, batch_size: int, seed: int, epoch: int, least: int = 1, together: bool = True
) -> list[np.ndarray]:
    """An epoch's batches, each the indices of captions.

    Pictures are shuffled, and sorted inside windows of 50 batches by their longest caption; their captions
    follow each other, and are cut into batches, which are shuffled. Unless they are to stay `together`, captions
    are shuffled and sorted one by one. What does not fill a batch comes last,
    or, if it is fewer than `least` captions, with the last full one. The order depends on nothing but the
    arguments, which is how a stopped epoch can be continued at any batch.
    """
    dice = np.random.default_rng((seed, epoch))
    if together:
        shuffled = dice.permutation(len(captions.paths))[captions.picture]
        order = np.argsort(shuffled, kind="stable")
        of_picture = np.zeros(len(captions.paths), np.int32)
        np.maximum.at(of_picture, captions.picture, captions.lengths)
        longest = of_picture[captions.picture]
    else:
        order, longest = dice.permutation(len(captions.lengths)), captions.lengths
    full = len(order) // batch_size * batch_size
    rest = order[full:]
    batches = []
    for start in range(0, full, WINDOW * batch_size):
        window = order[start : min(start + WINDOW * batch_size, full)]
        window = window[np.argsort(longest[window], kind="stable")]
        batches += np.split(window, len(window) // batch_size)
    batches = [batches[i] for i in dice.permutation(len(batches))]
    if batches and 0 < len(rest) < least:
        batches[-1] = np.concatenate([batches[-1], rest])
        return batches
    return batches + [rest] * bool(len(rest))


def make_pipeline(
    captions: Captions, batches: list[np.ndarray], cache: features.FeatureCache, static: bool = False
) -> tf.data.Dataset:
    """Yields the batches as `Batch`, their features read from the cache in parallel and ahead of the model.

    With `static` captions, pictures and tokens are padded, to the largest batch and to multiples of 8, so that
    there are few different shapes: XLA compiles anew for each.
    """
    size = max(map(len, batches), default=0)
    up = lambda count: -(-count // 8) * 8 if static else count
    paths = tf.constant(captions.paths)

    def arrays(number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        batch = batches[number]
        pictures, picture = np.unique(captions.picture[batch], return_inverse=True)
        words = captions.lengths[batch].max() - 1
        tokens = np.zeros((size if static else len(batch), 1 + up(words)), np.int32)
        tokens[: len(batch), : 1 + words] = captions.tokens[batch, : 1 + words]
        return pictures, np.pad(picture, (0, len(tokens) - len(batch))).astype(np.int32), tokens

    def read(number: tf.Tensor) -> Batch:
        pictures, picture, tokens = tf.numpy_function(arrays, [number], [tf.int32] * 3)
        values = cache.read(tf.gather(paths, pictures))
        padding = up(tf.shape(values)[0]) - tf.shape(values)[0]
        values = tf.pad(values, [[0, padding], [0, 0], [0, 0]])
        return Batch(values, tf.ensure_shape(picture, (None,)), tf.ensure_shape(tokens, (None, None)))

    # Not from_generator: it has malloc map and unmap every large tensor of the process, training's too.
    return features.read_ahead(tf.data.Dataset.range(len(batches)), read)


def for_devices(
    strategy: tf.distribute.Strategy,
    captions: Captions,
    batches: list[np.ndarray],
    cache: features.FeatureCache,
    static: bool = False,
) -> tf.data.Dataset:
    """The same for several devices, on this machine or on many: each gets its part of every batch."""

    def pipeline(context: tf.distribute.InputContext) -> tf.data.Dataset:
        replicas = context.num_replicas_in_sync
        here = replicas // context.num_input_pipelines
        first = context.input_pipeline_id * here
        parts = [part for batch in batches for part in np.array_split(batch, replicas)[first : first + here]]
        return make_pipeline(captions, parts, cache, static)

    return strategy.distribute_datasets_from_function(pipeline)
