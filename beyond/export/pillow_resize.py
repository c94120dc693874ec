"""Pillow's bilinear resize in the graph, bit for bit, so that an exported model sees the pixels that training saw.

Pillow takes, for every pixel of the result, the mean of the pixels around it, weighted by a triangle as wide as the
step between two of them; the columns and the rows one after the other, each rounded to 8 bits. The weights are whole
numbers of 22 bits (Resample.c of Pillow). Products and sums of such numbers are exact in float64.
"""

import functools

import numpy as np
from PIL import Image

from captioning.base.cli import log
from captioning.base.quiet_tensorflow import tf

PRECISION = 2.0**22  # of the weights
NUM_BLOCKS = 13  # parts of the result, for each of which only some of the source is read


@functools.cache
def pillow_takes_rows_first() -> bool:
    """Tells whether this version of Pillow resizes the rows of tall images first; others begin with the columns."""
    size = 2 * NUM_BLOCKS
    tall = np.random.default_rng(0).integers(0, 256, (4 * size, 2 * size, 3), np.uint8)
    expected = np.asarray(Image.fromarray(tall).resize((size, size), Image.Resampling.BILINEAR))
    for rows_first in (True, False):
        with tf.init_scope():  # at once, also while a graph is made
            is_equal = np.array_equal(resize_like_pillow(tf.constant(tall), size, rows_first), expected)
        if is_equal:
            return rows_first
    log("this version of Pillow resizes in a way that is not known here: exported models see slightly other pixels")
    return False


def resize_like_pillow(image: tf.Tensor, size: int, rows_first: bool) -> tf.Tensor:
    """Resizes an image (height, width, 3) uint8 as `Image.resize((size, size), BILINEAR)` does.

    Args:
        image: of any size above 0.
        size: pixels of a side.
        rows_first: see `pillow_takes_rows_first`.

    Returns:
        (size, size, 3) uint8.
    """
    height, width = tf.shape(image)[0], tf.shape(image)[1]
    is_tall = rows_first & (height > size) & (height - size > 2 * (width - size))  # found by trying
    return tf.cond(
        is_tall,
        lambda: _resize_columns(_resize_rows(image, size), size),
        lambda: _resize_rows(_resize_columns(image, size), size),
    )


def _resize_columns(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the second axis of (n, m, 3) uint8: (n, size, 3)."""
    return tf.transpose(_resize_rows(tf.transpose(image, [1, 0, 2]), size), [1, 0, 2])


def _resize_rows(image: tf.Tensor, size: int) -> tf.Tensor:
    """Resizes the first axis of (n, m, 3) uint8: (size, m, 3)."""
    block_size = -(-size // NUM_BLOCKS)
    # All blocks have as many rows, as map_fn needs: the last row is repeated until they are full.
    rows = tf.minimum(tf.range(block_size * NUM_BLOCKS), size - 1)
    first, last, weights = (tf.gather(each, rows) for each in triangle_weights(tf.shape(image)[0], size))

    def resize_block(start: tf.Tensor) -> tf.Tensor:
        """Computes some rows of the result, from the part of the image that they need: (block_size, m, 3)."""
        block = slice(start, start + block_size)
        begin, end = tf.reduce_min(first[block]), tf.reduce_max(last[block])
        source = tf.cast(image[begin:end], tf.float64)  # (r, m, 3)
        values = tf.tensordot(_to_matrix(first[block], weights[block], begin, end), source, 1)
        return tf.cast(tf.clip_by_value(tf.floor((values + PRECISION / 2) / PRECISION), 0, 255), tf.uint8)

    # One after the other: a large photo in float64 would take 24 bytes a pixel.
    starts = tf.range(NUM_BLOCKS) * block_size
    blocks = tf.map_fn(resize_block, starts, parallel_iterations=1, fn_output_signature=tf.uint8)
    return tf.reshape(blocks, [block_size * NUM_BLOCKS, tf.shape(image)[1], 3])[:size]


def triangle_weights(num_source: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Computes which pixels of a line each pixel of the result is the mean of.

    Args:
        num_source: pixels of the line.
        size: those of the result.

    Returns:
        The first pixel of each, (size,) int32; the one after the last; and their weights, (size, k) float64, whole
        numbers that are 0 where there are fewer than k.
    """
    scale = tf.cast(num_source, tf.float64) / size
    support = tf.maximum(scale, 1.0)  # half of the width of the triangle
    center = (tf.range(size, dtype=tf.float64) + 0.5) * scale  # (size,)
    first = tf.maximum(tf.cast(center - support + 0.5, tf.int32), 0)  # the cast cuts, as Pillow's does
    last = tf.minimum(tf.cast(center + support + 0.5, tf.int32), num_source)
    offsets = tf.range(tf.reduce_max(last - first))  # (k,)
    x = first[:, tf.newaxis] + offsets  # (size, k)
    distance = (tf.cast(x, tf.float64) - center[:, tf.newaxis] + 0.5) * (1.0 / support)
    weights = tf.where(x < last[:, tf.newaxis], tf.maximum(1.0 - tf.abs(distance), 0.0), 0.0)
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
    return first, last, tf.floor(0.5 + weights * PRECISION)


def _to_matrix(first: tf.Tensor, weights: tf.Tensor, begin: tf.Tensor, end: tf.Tensor) -> tf.Tensor:
    """Puts weights (b, k) of the pixels from `first` (b,) on into rows of a matrix (b, end - begin)."""
    column = first[:, tf.newaxis] - begin + tf.range(tf.shape(weights)[1])  # (b, k)
    row = tf.broadcast_to(tf.range(tf.shape(first)[0])[:, tf.newaxis], tf.shape(column))
    inside = tf.where(column < end - begin)  # beyond, weights are 0
    indices = tf.stack([tf.gather_nd(row, inside), tf.gather_nd(column, inside)], axis=1)
    return tf.scatter_nd(indices, tf.gather_nd(weights, inside), tf.stack([tf.shape(first)[0], end - begin]))
