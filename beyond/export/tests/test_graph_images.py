"""Images read in the graph have the pixels that Pillow gives, bit for bit, or are refused."""

import io
import struct

import numpy as np
import PIL
import pytest
from PIL import Image

from beyond.export import graph_images, pillow_resize
from beyond.export.graph_images import decode_upright
from beyond.export.pillow_resize import pillow_takes_rows_first, resize_like_pillow
from captioning.base.quiet_tensorflow import tf
from captioning.images.reading import read_image

pytestmark = pytest.mark.slow

decode = tf.function(decode_upright, input_signature=[tf.TensorSpec([], tf.string)])


MIN_JPEG_SIDE = 20
decode_scaled = tf.function(
    lambda content: decode_upright(content, MIN_JPEG_SIDE), input_signature=[tf.TensorSpec([], tf.string)]
)


@tf.function(input_signature=[tf.TensorSpec([None, None, 3], tf.uint8)])
def resize(image):
    return resize_like_pillow(image, 299, pillow_takes_rows_first())


def encode(image, image_format, **options):
    """Returns the content of an image file."""
    file = io.BytesIO()
    image.save(file, image_format, **options)
    return file.getvalue()


def draw(mode="RGB", size=(61, 43)):
    """Returns an image of gradients and noise, with every alpha there is."""
    rng = np.random.default_rng(0)
    x, y = np.meshgrid(np.arange(size[0]), np.arange(size[1]))
    noise = rng.integers(0, 40, x.shape)
    channels = [3 * x % 256, 5 * y % 256, (x * y + noise) % 256, np.clip(8 * x - 100, 0, 255)]
    return Image.fromarray(np.stack(channels, axis=2).astype(np.uint8)).convert(mode)


def exif(orientation):
    values = Image.Exif()
    values[0x010F] = "a maker whose name is not in the table"
    values[0x0112] = orientation
    return values


# Decoding.

EQUAL = {
    **{f"JPEG {s}": encode(draw(), "JPEG", subsampling=s, quality=60) for s in ("4:4:4", "4:2:2", "4:2:0")},
    "JPEG progressive": encode(draw(), "JPEG", progressive=True),
    "JPEG gray": encode(draw("L"), "JPEG"),
    "JPEG of RGB": encode(draw(), "JPEG", keep_rgb=True),
    "JPEG of one pixel": encode(draw(size=(1, 1)), "JPEG"),
    "JPEG and bytes after it": encode(draw(), "JPEG") + b"more",
    **{f"JPEG turned {o}": encode(draw(), "JPEG", exif=exif(o)) for o in range(10)},
    **{f"PNG turned {o}": encode(draw(), "PNG", exif=exif(o)) for o in (1, 3, 6, 7)},
    "PNG": encode(draw(), "PNG"),
    "PNG gray": encode(draw("L"), "PNG"),
    "PNG of a palette": encode(draw().quantize(200), "PNG"),
    "PNG with alpha": encode(draw("RGBA"), "PNG"),
    "PNG gray with alpha": encode(draw("LA"), "PNG"),
    "PNG of a palette with alpha": encode(draw().quantize(200), "PNG", transparency=bytes(range(200))),
    "PNG of a palette with a transparent colour": encode(draw().quantize(200), "PNG", transparency=3),
    "PNG gray with a transparent colour": encode(draw("L"), "PNG", transparency=57),
    "PNG with a transparent colour": encode(draw(), "PNG", transparency=draw().getpixel((5, 5))),
    "GIF": encode(draw(), "GIF"),
    "GIF interlaced": encode(draw(), "GIF", interlace=1),
    "GIF gray with a comment": encode(draw("L"), "GIF", comment=b"x" * 700),
    "GIF animated": encode(draw("P"), "GIF", save_all=True, append_images=[Image.new("P", (61, 43), 3)]),
    "BMP": encode(draw(), "BMP"),
}
UNHANDLED = {
    "JPEG of 12 bits": encode(draw("L"), "JPEG").replace(b"\xff\xc0\x00\x0b\x08", b"\xff\xc0\x00\x0b\x0c"),
    "JPEG in CMYK": encode(draw("CMYK"), "JPEG"),
    "PNG of 16 bits": encode(Image.fromarray(np.arange(99, dtype=np.uint16).reshape(9, 11) * 600), "PNG"),
    "PNG of 1 bit": encode(draw("1"), "PNG"),
    "PNG of 4 bits": encode(draw().quantize(12), "PNG", bits=4),
    "GIF with a transparent colour": encode(draw().quantize(20), "GIF", transparency=3),
    "BMP gray": encode(draw("L"), "BMP"),
    "BMP of 32 bits": encode(draw("RGBA"), "BMP"),
    "BMP of 1 bit": encode(draw("1"), "BMP"),
    "BMP": b"BM",
    "GIF": b"GIF89a",
    "PNG": b"\x89PNG\r\n\x1a\n",
    "JPEG": b"\xff\xd8\xff",
}
UNKNOWN = {
    "WebP": encode(draw(), "WEBP"),
    "TIFF": encode(draw(), "TIFF"),
    "PPM": encode(draw(), "PPM"),
    "text": b"text",
    "nothing": b"",
}


@pytest.mark.parametrize("name", EQUAL)
def test_decode_upright_equals_pillow(name):
    np.testing.assert_array_equal(decode(EQUAL[name]), np.asarray(read_image(EQUAL[name])))


@pytest.mark.parametrize("name", EQUAL)
def test_decode_upright_scales_as_pillow_does(name):
    expected = np.asarray(read_image(EQUAL[name], MIN_JPEG_SIDE))
    is_large_jpeg = name.startswith("JPEG") and "pixel" not in name
    assert (min(expected.shape[:2]) == 22) == is_large_jpeg, "43 pixels are halved"
    np.testing.assert_array_equal(decode_scaled(EQUAL[name]), expected)


@pytest.mark.parametrize("size", [(39, 99), (40, 99), (79, 99), (80, 99), (99, 81), (159, 299), (160, 299), (400, 170)])
def test_decode_upright_scales_by_the_shorter_side(size):
    for options in ({"subsampling": 2}, {"subsampling": 0, "exif": exif(6)}, {"progressive": True}):
        content = encode(draw(size=size), "JPEG", **options)
        np.testing.assert_array_equal(decode_scaled(content), np.asarray(read_image(content, MIN_JPEG_SIDE)))


@pytest.mark.parametrize("name", UNHANDLED)
def test_decode_upright_refuses_what_would_be_another_picture(name):
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"expected (8 bits a channel|an image of 1 pixel)"):
        decode(UNHANDLED[name])


@pytest.mark.parametrize("name", UNKNOWN)
def test_decode_upright_refuses_other_formats(name):
    with pytest.raises(tf.errors.InvalidArgumentError, match="expected the content of a JPEG, PNG, GIF or BMP file"):
        decode(UNKNOWN[name])


@pytest.mark.parametrize("name", ["JPEG 4:2:0", "PNG", "GIF", "BMP"])
def test_decode_upright_refuses_files_that_are_cut(name):
    for share in (0.3, 0.6, 0.9):
        with pytest.raises(tf.errors.InvalidArgumentError):
            decode(EQUAL[name][: int(share * len(EQUAL[name]))])


def test_decode_upright_refuses_a_gif_whose_first_frame_is_a_part():
    content = bytearray(EQUAL["GIF"])
    content[6:8] = struct.pack("<H", 99)  # the width of the canvas
    with pytest.raises(tf.errors.InvalidArgumentError, match="partial GIF"):
        decode(bytes(content))


def test_decode_upright_refuses_claims_of_huge_sizes():
    png = bytearray(EQUAL["PNG"])
    png[16:24] = struct.pack(">II", 60_000, 60_000)
    jpeg = EQUAL["JPEG 4:4:4"]
    frame = jpeg.index(b"\xff\xc0") + 5
    jpeg = jpeg[:frame] + struct.pack(">HH", 65_000, 65_000) + jpeg[frame + 4 :]
    bmp = bytearray(EQUAL["BMP"])
    bmp[18:26] = struct.pack("<ii", 2**30, -(2**30))
    gif = bytearray(EQUAL["GIF"])
    gif[6:10] = struct.pack("<HH", 65_000, 65_000)
    gif = bytes(gif).replace(
        b"," + struct.pack("<HHHH", 0, 0, 61, 43), b"," + struct.pack("<HHHH", 0, 0, 65_000, 65_000)
    )
    for content in (bytes(png), jpeg, bytes(bmp), gif):
        with pytest.raises(tf.errors.InvalidArgumentError, match="expected an image of 1 pixel to 179 megapixels"):
            decode(content)


def test_decode_upright_takes_a_bmp_from_the_top():
    content = bytearray(EQUAL["BMP"])
    content[22:26] = struct.pack("<i", -43)
    np.testing.assert_array_equal(decode(bytes(content)), np.asarray(read_image(bytes(content))))
    np.testing.assert_array_equal(decode(bytes(content)), np.asarray(draw())[::-1])


# EXIF as programs write it, and damaged.


def tiff(order, kind, value, count=1, tag=0x0112, magic=42):
    """Returns EXIF data with one entry."""
    packed = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I", 8: "h2x", 9: "i"}[kind], value)
    head = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", magic, 8, 1)
    return head + struct.pack(order + "HHI", tag, kind, count) + packed + bytes(4)


@pytest.mark.parametrize("order", "<>")
def test_orientation_is_read_as_pillow_reads_it(order):
    good = tiff(order, 3, 6)
    other = tiff(order, 3, 6, tag=0x0111)
    two = struct.pack(order + "H", 2)
    several = good[:8] + two + good[10:22] + tiff(order, 3, 3)[10:]  # the first one counts, since Pillow 13
    cases = [tiff(order, kind, 6) for kind in (1, 3, 4, 8, 9)]
    cases += [several] * (int(PIL.__version__.split(".")[0]) >= 13)
    cases += [other, tiff(order, 3, 6, count=2), tiff(order, 3, 300), tiff(order, 3, 6, magic=99)]
    cases += [good[:cut] for cut in (0, 1, 3, 9, 12, 21, 22)] + [b"no TIFF at all"]
    for data in cases:
        content = encode(draw(), "JPEG", exif=b"Exif\0\0" + data)
        np.testing.assert_array_equal(decode(content), np.asarray(read_image(content)), err_msg=repr(data))


def test_orientation_is_found_behind_other_segments():
    content = EQUAL["JPEG turned 6"]
    segment = b"\xff\xe1" + struct.pack(">H", 40) + b"http://ns.adobe.com/xap/1.0/\0" + bytes(9)
    padded = content[:2] + segment + b"\xff\xff" + segment + b"\xff\xff" + content[3:]
    np.testing.assert_array_equal(decode(padded), np.asarray(read_image(padded)))
    assert decode(padded).shape == (61, 43, 3)


def test_orientation_of_exif_in_two_segments():
    content, data = EQUAL["JPEG gray"], tiff(">", 3, 6)
    segments = [b"Exif\0\0" + data[:15], b"Exif\0\0" + data[15:]]
    content = content[:2] + b"".join(b"\xff\xe1" + struct.pack(">H", len(s) + 2) + s for s in segments) + content[2:]
    np.testing.assert_array_equal(decode(content), np.asarray(read_image(content)))
    assert decode(content).shape == (61, 43, 3)


def test_orientation_of_a_png_behind_its_pixels():
    content = EQUAL["PNG turned 6"]
    start = content.index(b"eXIf") - 4
    end = start + 12 + int.from_bytes(content[start : start + 4])
    moved = content[:start] + content[end:-12] + content[start:end] + content[-12:]
    np.testing.assert_array_equal(decode(moved), np.asarray(read_image(moved)))
    assert decode(moved).shape == (61, 43, 3)


# Resizing.


@pytest.mark.parametrize(
    ("width", "height"),
    [
        *[(1, 1), (1, 500), (500, 1), (299, 299), (300, 298), (3, 2), (597, 599), (1200, 37), (20, 299), (299, 20)],
        *[(400, 501), (400, 502), (361, 423), (361, 424), (20, 300), (700, 1500), (900, 700)],  # the order changes
    ],
)
def test_resize_like_pillow_is_exact(width, height, rng):
    for image in (
        rng.integers(0, 256, (height, width, 3), dtype=np.uint8),
        255 * rng.integers(0, 2, (height, width, 3), dtype=np.uint8),
    ):
        expected = np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resize(image), expected)


@pytest.mark.parametrize("size", [224, 5])
def test_resize_like_pillow_is_exact_for_cnns_of_other_sizes(size, rng):
    image = rng.integers(0, 256, (30, 400, 3), np.uint8)
    expected = np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))
    np.testing.assert_array_equal(resize_like_pillow(tf.constant(image), size, pillow_takes_rows_first()), expected)


def test_resize_like_pillow_is_exact_for_many_sizes(rng):
    for _ in range(25):
        height, width = rng.integers(1, 900, 2)
        image = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        expected = np.asarray(Image.fromarray(image).resize((299, 299), Image.Resampling.BILINEAR))
        np.testing.assert_array_equal(resize(image), expected, err_msg=f"{width}x{height}")


def test_pillow_takes_rows_first_is_found_by_trying(monkeypatch, capsys):
    class Resized:
        """Stands for an image of another version of Pillow."""

        rows_first = False

        def __init__(self, array):
            self.image = tf.constant(array)

        def resize(self, size, resample):
            return resize_like_pillow(self.image, size[0], self.rows_first)

    monkeypatch.setattr(pillow_resize.Image, "fromarray", Resized)
    find = pillow_takes_rows_first.__wrapped__  # without its memory
    assert find() is False
    Resized.rows_first = True
    assert find() is True and capsys.readouterr().err == ""
    monkeypatch.setattr(Resized, "resize", lambda *_: np.zeros((26, 26, 3), np.uint8))
    assert find() is False
    assert "resizes in a way that is not known here" in capsys.readouterr().err


def test_read_pixels_are_those_of_features():
    import features

    large = encode(draw(size=(2000, 1500)), "JPEG")
    for content, min_jpeg_side in [(EQUAL["JPEG turned 6"], None), (EQUAL["PNG with alpha"], 598), (large, 598)]:
        pixels = graph_images.read_pixels(tf.constant(content), 299, pillow_takes_rows_first(), min_jpeg_side)
        np.testing.assert_array_equal(pixels, features.load_image(content, min_jpeg_side))
