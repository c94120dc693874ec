"""Reads image files in the graph as `reading` reads them with Pillow, for models without this project.

JPEG, PNG, GIF and BMP give the same pixels, bit for bit. What would give others is an error of the graph, not another
picture: JPEG in CMYK, PNG that is not of 8 bits, GIF whose first frame is transparent or covers only a part, BMP that
is not of 24 bits, and every other format. WebP is one of these: TensorFlow 2.21 ends with a segmentation fault after it
has decoded an animated one.
"""

import functools

from beyond.export.image_headers import (
    Header,
    read_bmp_header,
    read_gif_header,
    read_jpeg_header,
    read_png_header,
)
from beyond.export.pillow_resize import resize_like_pillow
from captioning.base.quiet_tensorflow import tf
from captioning.config.settings import MAX_MEGAPIXELS

PNG, GIF, BMP, JPEG = b"\x89PNG\r\n\x1a\n", b"GIF8", b"BM", b"\xff\xd8\xff"
UNKNOWN = "expected the content of a JPEG, PNG, GIF or BMP file"
UNHANDLED = "expected 8 bits a channel, no CMYK, no transparent or partial GIF, BMP of 24 bits"


def read_pixels(content: tf.Tensor, size: int, rows_first: bool, min_jpeg_side: int | None = None) -> tf.Tensor:
    """Reads an image file as the pixels that the CNN takes.

    Args:
        content: a scalar string.
        size: pixels of a side.
        rows_first: see `beyond.export.pillow_resize.pillow_takes_rows_first`.
        min_jpeg_side: see `captioning.images.reading.read_image`.

    Returns:
        (size, size, 3) uint8.

    Raises:
        tf.errors.InvalidArgumentError: it is not an image that is handled, or is damaged.
    """
    return resize_like_pillow(decode_upright(content, min_jpeg_side), size, rows_first)


def _starts_with(text: tf.Tensor, start: bytes) -> tf.Tensor:
    """Tells whether a string, which is not shorter, starts with some bytes."""
    return tf.strings.substr(text, 0, len(start)) == start


def decode_upright(content: tf.Tensor, min_jpeg_side: int | None = None) -> tf.Tensor:
    """Decodes an image file as upright RGB, (height, width, 3) uint8; see `read_pixels`."""
    padded = tf.strings.join([content, " " * len(PNG)])
    if _starts_with(padded, JPEG):
        header = read_jpeg_header(content)
        content = _check(content, header)
        image = turn_upright(_decode_jpeg(content, header, min_jpeg_side), header.orientation)
    elif _starts_with(padded, PNG):
        header = read_png_header(content)
        content = _check(content, header)
        image = turn_upright(composite_on_white(tf.io.decode_png(content, channels=4)), header.orientation)
    elif _starts_with(padded, GIF):
        content = _check(content, read_gif_header(content))
        image = tf.io.decode_gif(content)[0]
    elif _starts_with(padded, BMP):
        content = _check(content, read_bmp_header(content))
        image = tf.io.decode_bmp(content, channels=3)
    else:
        tf.debugging.Assert(False, [UNKNOWN])
        image = tf.zeros([1, 1, 3], tf.uint8)
    return tf.ensure_shape(image, [None, None, 3])


def _check(content: tf.Tensor, header: Header) -> tf.Tensor:
    """Returns the content; an error in the graph if it is not handled, is empty, or is too large for the memory.

    What decodes takes what is returned here: otherwise TensorFlow would decode at the same time as it checks.
    """
    num_pixels = header.height * header.width
    too_large = f"expected an image of 1 pixel to {MAX_MEGAPIXELS} megapixels"
    checks = [
        tf.debugging.Assert(header.is_handled, [UNHANDLED]),
        tf.debugging.Assert((num_pixels > 0) & (num_pixels <= MAX_MEGAPIXELS * 10**6), [too_large]),
    ]
    with tf.control_dependencies(checks):
        return tf.identity(content)


def _decode_jpeg(content: tf.Tensor, header: Header, min_jpeg_side: int | None) -> tf.Tensor:
    """Decodes a JPEG as Pillow's libjpeg does by default, a large one at 1/2, 1/4 or 1/8 of its size."""

    def decode(ratio: int) -> tf.Tensor:
        return tf.io.decode_jpeg(
            content, channels=3, ratio=ratio, fancy_upscaling=True, dct_method="INTEGER_ACCURATE"
        )  # (height, width, 3)

    if min_jpeg_side is None:
        return decode(1)
    fits = tf.minimum(header.height, header.width) // min_jpeg_side  # how often the least side fits into the shorter
    index = tf.reduce_sum(tf.cast(fits >= [2, 4, 8], tf.int32))
    return tf.switch_case(index, [functools.partial(decode, ratio) for ratio in (1, 2, 4, 8)])


def composite_on_white(image: tf.Tensor) -> tf.Tensor:
    """Makes transparent pixels white as Pillow's alpha_composite does: (height, width, 4) to (height, width, 3)."""
    values = tf.cast(image, tf.int64)
    colour, alpha = values[..., :3], values[..., 3:]
    weight = alpha * 128  # with 7 bits more, of at most 255 * 128
    total = colour * weight + 255 * (255 * 128 - weight) + 128 * 128
    divided = (total // 256 + total) // 256  # by 255, rounded
    return tf.cast(divided // 128, tf.uint8)


def turn_upright(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Turns and mirrors an image (height, width, 3) as EXIF's orientation says, a scalar from 1 to 8."""

    def is_any(*orientations: int) -> tf.Tensor:
        return tf.reduce_any(orientation == tf.constant(orientations, orientation.dtype))

    if is_any(5, 6, 7, 8):
        image = tf.transpose(image, [1, 0, 2])
    if is_any(2, 3, 6, 7):
        image = tf.reverse(image, [1])
    if is_any(3, 4, 7, 8):
        image = tf.reverse(image, [0])
    return image
