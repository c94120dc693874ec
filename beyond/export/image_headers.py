"""What the header of an image file says, read in the graph: its size, its kind of pixels, and which side is up.

TensorFlow decodes pixels, but ignores the orientation that a camera stored (EXIF) and converts some kinds of pixels
otherwise than Pillow. All functions take the content of a file, a scalar string, and work in eager mode, too.
"""

from typing import NamedTuple

from captioning.base.quiet_tensorflow import tf
from captioning.images.reading import ORIENTATION_TAG

INTEGER_TYPES = (3, 4, 8, 9)  # of TIFF: short, long, and both with a sign


class Header(NamedTuple):
    """What matters of a header; all scalars."""

    height: tf.Tensor  # int64, pixels, before the image is turned upright
    width: tf.Tensor  # int64
    orientation: tf.Tensor  # int64, as EXIF numbers them: 1 is upright; 1 if there is none
    is_handled: tf.Tensor  # bool, whether TensorFlow decodes such pixels as Pillow does


def _to_bytes(content: tf.Tensor) -> tf.Tensor:
    """Returns the bytes of a string, (n,) uint8."""
    return tf.io.decode_raw(content, tf.uint8)


def _number(data: tf.Tensor, start: tf.Tensor | int, num_bytes: int, little: tf.Tensor | bool = False) -> tf.Tensor:
    """Returns the number that some bytes of (n,) are, int64; bytes behind the end are 0. The first is the highest."""
    digits = tf.cast(data[start : start + num_bytes], tf.int64)
    digits = tf.pad(digits, [[0, num_bytes - tf.shape(digits)[0]]])
    digits = tf.where(little, digits[::-1], digits)
    return tf.reduce_sum(digits * 256 ** tf.range(num_bytes - 1, -1, -1, dtype=tf.int64))


# EXIF, which is a TIFF file without an image.


def tiff_orientation(tiff: tf.Tensor) -> tf.Tensor:
    """Returns the orientation that EXIF data hold, from 1 to 8, int64; 1 if there is none, or they are damaged."""
    data = _to_bytes(tiff)
    little = tf.strings.substr(tf.strings.join([tiff, "  "]), 0, 2) == "II"
    is_tiff = (little | (_number(data, 0, 2) == 0x4D4D)) & (_number(data, 2, 2, little) == 42)  # MM
    start = _number(data, 4, 4, little)
    table = data[start + 2 : start + 2 + 12 * _number(data, start, 2, little)]
    entries = tf.cast(tf.reshape(table[: tf.size(table) // 12 * 12], [-1, 12]), tf.int64)  # tag, type, count, value
    entries = tf.where(little, tf.gather(entries, [1, 0, 3, 2, 7, 6, 5, 4, 9, 8, 11, 10], axis=1), entries)
    tag, kind = 256 * entries[:, 0] + entries[:, 1], 256 * entries[:, 2] + entries[:, 3]
    is_integer = tf.reduce_any(kind[:, tf.newaxis] == tf.constant(INTEGER_TYPES, tf.int64), axis=1)
    is_short = (kind == 3) | (kind == 8)
    # Two short numbers have room, too, of which the first one counts; more would stand elsewhere.
    is_here = tf.reduce_all(entries[:, 4:7] == 0, axis=1) & ((entries[:, 7] == 1) | (is_short & (entries[:, 7] == 2)))
    first, second = 256 * entries[:, 8] + entries[:, 9], 256 * entries[:, 10] + entries[:, 11]
    long = tf.where(little, 65536 * second + first, 65536 * first + second)
    value = tf.where(is_short, first, long)
    found = value[(tag == ORIENTATION_TAG) & is_integer & is_here]
    orientation = tf.concat([found, [tf.constant(1, tf.int64)]], axis=0)[0]  # of several the first one counts
    return tf.where(is_tiff & (orientation >= 1) & (orientation <= 8), orientation, tf.constant(1, tf.int64))


# The formats.


def read_jpeg_header(content: tf.Tensor) -> Header:
    """Reads the segments of a JPEG before its pixels."""
    data = _to_bytes(content)
    position, size = tf.constant(2, tf.int64), tf.cast(tf.size(data), tf.int64)
    height, width, depth, channels = (tf.constant(0, tf.int64) for _ in range(4))
    exif = tf.constant("")
    in_header = tf.constant(True)
    while in_header & (position < size):
        first, marker = _number(data, position, 1), _number(data, position + 1, 1)
        length = _number(data, position + 2, 2)
        has_length = (first == 0xFF) & (marker > 0x01) & (marker < 0xFF) & ~((marker >= 0xD0) & (marker <= 0xD8))
        is_frame = has_length & (marker >= 0xC0) & (marker <= 0xCF) & (marker % 4 != 0) | (
            has_length & (marker == 0xC0)
        )
        if is_frame:
            depth, channels = _number(data, position + 4, 1), _number(data, position + 9, 1)
            height, width = _number(data, position + 5, 2), _number(data, position + 7, 2)
        if has_length & (marker == 0xE1) & (length >= 8) & (position + 2 + length <= size):
            segment = tf.strings.substr(content, position + 4, length - 2)
            if tf.strings.substr(segment, 0, 6) == "Exif\0\0":
                exif += tf.strings.substr(segment, 6, -1)  # long data are in several segments
        in_header = ~(has_length & ((marker == 0xDA) | (marker == 0xD9)))  # the pixels begin, or the file ends
        if has_length:
            position += 2 + length
        elif (first != 0xFF) | (marker == 0xFF):  # anything between segments, and padding
            position += 1
        else:
            position += 2
    return Header(height, width, tiff_orientation(exif), (depth == 8) & ((channels == 1) | (channels == 3)))


def read_png_header(content: tf.Tensor) -> Header:
    """Reads the first chunk of a PNG, and that of EXIF."""
    data = _to_bytes(content)
    position, size = tf.constant(8, tf.int64), tf.cast(tf.size(data), tf.int64)
    exif = tf.constant("")
    while position + 8 <= size:
        length = _number(data, position, 4)
        if (_number(data, position + 4, 4) == 0x65584966) & (position + 8 + length <= size):  # eXIf
            exif = tf.strings.substr(content, position + 8, length)
        position += 12 + length
    depth = _number(data, 24, 1)
    return Header(_number(data, 20, 4), _number(data, 16, 4), tiff_orientation(exif), depth == 8)


def read_gif_header(content: tf.Tensor) -> Header:
    """Reads the blocks before the first frame of a GIF; one that is transparent, or covers a part, is not handled."""
    data = _to_bytes(content)
    size = tf.cast(tf.size(data), tf.int64)
    width, height, flags = _number(data, 6, 2, True), _number(data, 8, 2, True), _number(data, 10, 1)
    position = 13 + tf.where(flags >= 128, 3 * 2 ** (flags % 8 + 1), tf.constant(0, tf.int64))
    is_opaque = tf.constant(True)
    while (_number(data, position, 1) == 0x21) & (position < size):  # an extension
        if _number(data, position + 1, 1) == 0xF9:
            is_opaque = _number(data, position + 3, 1) % 2 == 0
        position += 2
        while (_number(data, position, 1) > 0) & (position < size):
            position += 1 + _number(data, position, 1)
        position += 1
    has_frame = _number(data, position, 1) == 0x2C
    is_whole = (_number(data, position + 5, 2, True) == width) & (_number(data, position + 7, 2, True) == height)
    return Header(height, width, tf.constant(1, tf.int64), is_opaque & has_frame & is_whole)


def read_bmp_header(content: tf.Tensor) -> Header:
    """Reads the header of a BMP; only those of 24 bits that are not compressed are handled."""
    data = _to_bytes(content)
    size, depth, compression = _number(data, 14, 4, True), _number(data, 28, 2, True), _number(data, 30, 4, True)
    width, height = _number(data, 18, 4, True), _number(data, 22, 4, True)
    height = tf.where(height >= 2**31, 2**32 - height, height)  # negative: the first row is at the top
    return Header(height, width, tf.constant(1, tf.int64), (size >= 40) & (depth == 24) & (compression == 0))
