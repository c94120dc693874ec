"""Images as they come: odd metadata, many bits, cut off, huge, HEIC; and the threads that read them."""

import errno
import importlib.util
import io
import struct
import subprocess
import sys
import threading
import zlib
from pathlib import Path

import numpy as np
import pillow_heif
import pytest
from PIL import EpsImagePlugin, Image, ImageOps

from captioning.base.cli import InputError
from captioning.images import reading as images
from captioning.images.reading import (
    count_pixels,
    is_image_file,
    map_threads,
    read_image,
    read_size,
    set_max_megapixels,
    to_rgb,
)
from captioning.output.plots import thumbnail

ROOT = Path(__file__).parents[2]


def ramp(mode="RGB", size=(40, 30)):
    """A smooth image that is dark on the left and bright on the right."""
    row = np.linspace(30, 220, size[0]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, size[::-1]).copy()).convert(mode)


def lopsided():
    """An image that differs from each of its reflections and rotations."""
    image = ramp()
    image.paste("black", (0, 0, 12, 8))
    return image


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "LA", "HSV", "I", "F"])
def test_to_rgb_converts_every_mode(mode):
    pixels = np.asarray(to_rgb(ramp(mode)))
    assert (pixels.shape, pixels.dtype) == ((30, 40, 3), np.uint8)
    assert pixels[:, -10:].mean() > pixels[:, :10].mean() + 50, "left is dark and right is bright"


def test_to_rgb_makes_transparency_white():
    for alpha, expected in ((0, 255), (100, 155), (255, 0)):
        assert (np.asarray(to_rgb(Image.new("RGBA", (10, 10), (0, 0, 0, alpha)))) == expected).all()


NAN, INF = np.nan, np.inf


@pytest.mark.filterwarnings("error")  # of NumPy, about 0 / 0
@pytest.mark.parametrize(
    ("values", "expected", "dtypes"),
    [
        ([[1000, 1001], [1002, 1004]], [[0, 64], [128, 255]], (np.uint16, np.int32, np.float32)),
        ([[7, 7], [7, 7]], [[0, 0], [0, 0]], (np.uint16, np.int32, np.float32)),
        ([[NAN, -INF, INF], [-1, 0, 1]], [[0, 0, 255], [0, 128, 255]], (np.float32,)),
        ([[NAN, NAN]], [[0, 0]], (np.float32,)),
    ],
)
def test_to_rgb_scales_images_of_many_bits_by_their_range(values, expected, dtypes):
    for dtype in dtypes:
        image = Image.fromarray(np.array(values, dtype))
        np.testing.assert_array_equal(np.asarray(to_rgb(image))[..., 0], expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.float32])
@pytest.mark.parametrize("scale", [1, 16])
def test_to_rgb_scales_images_of_many_bits_without_hot_and_dead_pixels(rng, dtype, scale):
    pixels = rng.integers(0, 256, (30, 40))
    pixels[:2, :2] = (0, 255)
    expected = pixels.copy()
    pixels = 30_000 + scale * pixels
    pixels[5, 5:8], expected[5, 5:8] = 65_535, 255
    pixels[6, 5:8], expected[6, 5:8] = 0, 0
    np.testing.assert_array_equal(to_rgb(Image.fromarray(pixels.astype(dtype))).getchannel(0), expected)


@pytest.mark.parametrize("dtype", [np.uint16, np.float32])
def test_to_rgb_keeps_the_rare_value_of_a_mask(dtype):
    for rare, other in ((2, 3), (3, 2)):
        values = np.full((30, 40), other, dtype)
        values[7, 7] = rare
        expected = np.where(values == 3, 255, 0)
        np.testing.assert_array_equal(to_rgb(Image.fromarray(values)).getchannel(0), expected)


# Metadata.


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_read_image_turns_files_upright_once(tmp_path, image_format, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    lopsided().save(tmp_path / "a", image_format, exif=exif)
    upright = read_image(tmp_path / "a")
    with Image.open(tmp_path / "a") as image:
        expected = ImageOps.exif_transpose(image)
    expected = Image.fromarray(np.asarray(expected))  # without metadata
    assert upright.size == expected.size and upright.tobytes() == expected.tobytes()
    assert thumbnail(upright).tobytes() == thumbnail(expected).tobytes(), "a plot turns it again"
    assert read_size(tmp_path / "a") == expected.size


def exif_bytes(tag, kind, count, value):
    """EXIF with one tag, as a camera writes it: `value` is what the tag holds, or where."""
    entry = tag.to_bytes(2) + kind.to_bytes(2) + count.to_bytes(4) + value
    return b"Exif\x00\x00MM\x00*\x00\x00\x00\x08\x00\x01" + entry + bytes(4)


ODD_EXIF = {
    "empty": b"Exif\x00\x00",
    "no TIFF": b"Exif\x00\x00" + b"text" * 9,
    "cut": exif_bytes(0x0112, 3, 1, b"\x00\x06\x00\x00")[:20],
    "orientation 9": exif_bytes(0x0112, 3, 1, b"\x00\x09\x00\x00"),
    "orientation is text": exif_bytes(0x0112, 2, 3, b"up\x00\x00"),
    "resolution is text": exif_bytes(0x011A, 2, 3, b"72\x00\x00"),
    "1/0": exif_bytes(0x011A, 5, 1, b"\x00\x00\x00\x08"),
    "outside the file": exif_bytes(0x0112, 3, 1000, b"\xff\xff\xff\xff"),
    "negative sub-IFD": exif_bytes(0x8769, 9, 1, b"\xff\xff\xff\xff"),
    "rational maker note": exif_bytes(0x927C, 5, 1, b"\x00\x00\x00\x08"),
}


def encode(image, image_format, **settings):
    file = io.BytesIO()
    image.save(file, image_format, **settings)
    return file.getvalue()


def png_chunk(name, content):
    return len(content).to_bytes(4) + name + content + zlib.crc32(name + content).to_bytes(4)


@pytest.mark.filterwarnings("ignore:.*data:UserWarning")  # pytest undoes the project's own filter
@pytest.mark.parametrize("exif", ODD_EXIF.values(), ids=ODD_EXIF)
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "MPO"])
def test_read_image_ignores_odd_exif(tmp_path, image_format, exif):
    plain = encode(ramp(), image_format)
    (tmp_path / "plain").write_bytes(plain)
    if image_format == "PNG":
        content = plain[:33] + png_chunk(b"eXIf", exif.removeprefix(b"Exif\x00\x00")) + plain[33:]
    else:
        content = encode(ramp(), image_format, exif=exif)
    (tmp_path / "odd").write_bytes(content)
    assert read_image(tmp_path / "odd").tobytes() == read_image(tmp_path / "plain").tobytes()
    assert read_size(tmp_path / "odd") == (40, 30)


def test_read_image_prints_no_warnings(tmp_path):
    (tmp_path / "a.mpo").write_bytes(encode(ramp(), "MPO", exif=ODD_EXIF["outside the file"]))
    Image.new("1", (1500, 1000)).save(tmp_path / "large.png")  # more than half of the limit
    code = (
        "import sys\n"
        "from captioning.images.reading import read_image, read_size, set_max_megapixels\n"
        "set_max_megapixels(2)\n"
        "print([read_image(path).size for path in sys.argv[1:]])\n"
    )
    command = [sys.executable, "-W", "always", "-c", code, str(tmp_path / "a.mpo"), str(tmp_path / "large.png")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert (result.stdout, result.stderr) == ("[(40, 30), (1500, 1000)]\n", "")


# Truncated images.


@pytest.fixture(scope="module")
def noise():
    """An image that no row of another resembles."""
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 48, 3), dtype=np.uint8))


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
def test_read_image_uses_the_rows_of_a_truncated_jpeg(tmp_path, noise, mode, capsys):
    path = tmp_path / "x.jpg"
    content = encode(noise.convert(mode), "JPEG")
    path.write_bytes(content)
    whole = np.asarray(read_image(path))
    path.write_bytes(content[: len(content) * 4 // 5])
    pixels = np.asarray(read_image(path))
    num_rows = len(pixels)
    assert 200 < num_rows < 400
    # Of the last blocks one may be decoded only in part, and the row before them lacks the colours of the next.
    np.testing.assert_array_equal(pixels[:-24], whole[: num_rows - 24])
    read_image(path)
    assert capsys.readouterr().err == f"{path}: truncated, its first {num_rows} of 400 rows are used\n", "logged once"
    path.write_bytes(content[: int(0.4 * len(content))])
    with pytest.raises(InputError, match=r"x\.jpg: .*\(truncated: 1\d\d of its 400 rows are there\)"):
        read_image(path)


def test_read_image_uses_truncated_progressive_jpegs_after_their_first_scan(tmp_path, capsys):
    content, path = encode(ramp(size=(400, 300)), "JPEG", progressive=True), tmp_path / "x.jpg"
    first_scan = content.index(b"\xff\xda")
    second_scan = content.index(b"\xff\xda", first_scan + 2)
    path.write_bytes(content[: second_scan + 10])
    np.testing.assert_allclose(read_image(path), np.asarray(ramp(size=(400, 300))), atol=25)
    assert capsys.readouterr().err == f"{path}: truncated, it is used without its finest details\n"
    path.write_bytes(content[: (3 * first_scan + second_scan) // 4])
    with pytest.raises(InputError, match=r"x\.jpg: .*\(truncated: \d+ of its 300 rows are there\)"):
        read_image(path)


def test_read_image_refuses_damaged_pixels_of_a_png(tmp_path, noise):
    content = bytearray(encode(noise, "PNG"))
    content[len(content) // 2] ^= 1
    (tmp_path / "x.png").write_bytes(content)
    for source in (tmp_path / "x.png", Image.open(tmp_path / "x.png")):
        with pytest.raises(InputError, match="not an image that can be read"):
            read_image(source)


def test_read_image_refuses_other_truncated_formats(tmp_path, noise):
    for image_format in ("PNG", "GIF", "BMP", "TIFF"):
        content = encode(noise, image_format)
        (tmp_path / "x").write_bytes(content[: len(content) * 4 // 5])
        with pytest.raises(InputError, match="not an image that can be read"):
            read_image(tmp_path / "x")


# Formats.

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"


def iptc_field(record, number, content):
    return bytes([0x1C, record, number]) + len(content).to_bytes(2) + content


IPTC_FIELDS = ((60, b"\1\0"), (20, b"\0\0\0\x09"), (30, b"\0\0\0\x09"), (120, b"\5"))
IPTC = b"".join(iptc_field(3, *field) for field in IPTC_FIELDS) + iptc_field(8, 10, EPS)  # which holds the EPS


@pytest.mark.parametrize("content", [EPS, IPTC], ids=["EPS", "IPTC"])
@pytest.mark.parametrize("name", ["a.jpg", "a.eps"])
def test_read_image_starts_no_program(tmp_path, monkeypatch, content, name):
    monkeypatch.setattr(EpsImagePlugin, "Ghostscript", lambda *_: pytest.fail("Ghostscript was called"))
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=rf"{name}: .*\(not of a format that is read, such as JPEG, PNG or WebP\)"):
        read_image(tmp_path / name)


def test_read_image_refuses_jpegs_of_many_scans():
    content = encode(ramp(size=(64, 64)), "JPEG", progressive=True)
    last_scan = content[content.rindex(b"\xff\xda") : -2]
    with pytest.raises(InputError, match="the image: a JPEG with 1,010 scans, expected at most 500"):
        read_image(content[:-2] + 1000 * last_scan + content[-2:])


ANIMATIONS = {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}, "HEIF": {}, "AVIF": {}}


@pytest.mark.parametrize(("image_format", "settings"), ANIMATIONS.items(), ids=ANIMATIONS)
def test_read_image_says_that_it_uses_the_first_frame(tmp_path, image_format, settings, capsys):
    frames = [ramp(size=(64, 48)).rotate(angle) for angle in (0, 90, 180)]
    if image_format == "HEIF":
        pillow_heif.register_heif_opener()
    content = encode(frames[0], image_format, save_all=True, append_images=frames[1:], **settings)
    (tmp_path / "a").write_bytes(content)
    for _ in range(2):
        np.testing.assert_allclose(np.asarray(read_image(tmp_path / "a"), int), np.asarray(frames[0]), atol=8)
    assert capsys.readouterr().err == f"{tmp_path / 'a'}: frame 1 of 3 is used\n", "logged once"
    read_image(encode(frames[0], image_format, **settings))
    assert capsys.readouterr().err == ""


def test_colours_in_the_lower_half_of_16_bits_are_refused():
    def encode_deep(value):
        rows = b"".join(b"\0" + value.to_bytes(2, "big") * 6 for _ in range(2))  # 2x2 pixels
        chunks = (
            (b"IHDR", struct.pack(">IIBBBBB", 2, 2, 16, 2, 0, 0, 0)),
            (b"IDAT", zlib.compress(rows)),
            (b"IEND", b""),
        )
        parts = (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
        return b"\x89PNG\r\n\x1a\n" + b"".join(parts)

    assert read_image(encode_deep(40_000)).getpixel((0, 0)) == (156, 156, 156)
    with pytest.raises(InputError, match="16 bits in colour, of which Pillow reads the upper 8, and all are 0"):
        read_image(encode_deep(200))


def test_read_image_takes_two_views_for_one_photo(capsys):
    read_image(encode(ramp(), "MPO", save_all=True, append_images=[ramp()]))
    assert capsys.readouterr().err == ""


@pytest.mark.filterwarnings("ignore::UserWarning")  # pytest undoes the project's own filter
@pytest.mark.parametrize("image_format", ["GIF", "TIFF"])
def test_read_image_does_not_mind_damage_behind_the_first_frame(image_format, noise):
    content = encode(noise, image_format, save_all=True, append_images=[ramp()])
    start = content.rindex(b"\x2c\0\0\0\0") if image_format == "GIF" else len(content) - 200  # of the second frame
    for size in range(start, min(start + 100, len(content)), 5):
        np.testing.assert_array_equal(read_image(content[:size]), read_image(content))


def test_read_image_counts_the_pages_of_a_file_up_to_a_limit(monkeypatch, capsys):
    monkeypatch.setattr(images, "MAX_PAGES", 3)
    read_image(encode(ramp(), "TIFF", save_all=True, append_images=[ramp()] * 5))
    assert capsys.readouterr().err == "the image: frame 1 of at least 3 is used\n"


# Huge images.


@pytest.mark.usefixtures("all_options")
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")  # pytest undoes the project's own filter
def test_set_max_megapixels_refuses_larger_images(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # to be restored
    Image.new("1", (2000, 1000)).save(tmp_path / "two.png")
    Image.new("1", (2001, 1000)).save(tmp_path / "more.png")
    set_max_megapixels(2)
    assert read_image(tmp_path / "two.png").size == (2000, 1000)
    with pytest.raises(InputError) as error:
        read_image(tmp_path / "more.png")
    path = tmp_path / "more.png"
    assert str(error.value) == (f"{path}: 3 megapixels, expected at most 2; if you trust it, use --max-megapixels 3")
    set_max_megapixels(3)
    assert read_image(path).size == (2001, 1000)


def test_count_pixels_needs_no_pixels(noise):
    content = encode(noise, "PNG")
    assert count_pixels(content[:100]) == 400 * 48
    with pytest.raises(InputError, match="the image: not an image that can be read"):
        count_pixels(content[:10])


# HEIC.


def test_read_image_reads_heic(tmp_path):
    pillow_heif.from_pillow(ramp(size=(64, 48))).save(tmp_path / "a.heic")
    (tmp_path / "a.jpg").write_bytes((tmp_path / "a.heic").read_bytes())  # known by its content
    for name in ("a.heic", "a.jpg"):
        pixels = np.asarray(read_image(tmp_path / name))
        assert pixels.shape == (48, 64, 3) and read_size(tmp_path / name) == (64, 48)
        np.testing.assert_allclose(pixels, np.asarray(ramp(size=(64, 48))), atol=8)


@pytest.mark.parametrize("brand", [b"heic", b"mif1"])
def test_read_image_says_what_heic_needs(tmp_path, monkeypatch, brand):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftyp" + brand + bytes(100))
    with pytest.raises(InputError, match=r"a\.heic: .*\(HEIC, which needs `pip install pillow-heif`\)"):
        read_image(tmp_path / "a.heic")


def test_read_image_refuses_other_files_in_one_line(tmp_path):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "empty.png").touch()
    (tmp_path / "a.heic").write_bytes(b"\x00\x00\x00\x18ftypheic" + bytes(100))
    for name, message in (
        ("text.jpg", "not of a format that is read, such as JPEG, PNG or WebP"),
        ("empty.png", "not of a format that is read, such as JPEG, PNG or WebP"),
        ("a.heic", "not an image"),
        ("none.jpg", "no such image"),
    ):
        with pytest.raises(InputError, match=message) as error:
            read_image(tmp_path / name)
        with pytest.raises(InputError, match=message):
            read_size(tmp_path / name)
        assert str(error.value).startswith(f"{tmp_path / name}: ") and "\n" not in str(error.value)


def test_a_fault_of_the_machine_is_not_one_of_the_image(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(OSError, match="Too many open files") as error:
        read_image(io.BytesIO(b"photo"), name="a.jpg")
    assert error.value.filename == "a.jpg"


# What is not a file.


def all_forms(path):
    """The image of a file, in all the forms that can be read."""
    content = path.read_bytes()
    yield from (path, str(path), content, bytearray(content), memoryview(content), io.BytesIO(content))
    yield Image.open(path)
    yield open(path, "rb")


@pytest.mark.parametrize("name", ["rotated.jpg", "deep.png", "clear.png", "cut.jpg"])
def test_read_image_reads_the_same_from_any_form(tmp_path, noise, name, capsys):
    path = tmp_path / name
    if name == "rotated.jpg":
        exif = Image.Exif()
        exif[0x0112] = 6
        noise.save(path, exif=exif)
    elif name == "deep.png":
        Image.fromarray(np.linspace(100, 900, 1200).reshape(30, 40).astype(np.uint16)).save(path)
    elif name == "clear.png":
        noise.convert("RGBA").resize((40, 30)).save(path)
    else:
        noise.save(path)
    if name == "cut.jpg":
        content = path.read_bytes()
        path.write_bytes(content[: len(content) * 4 // 5])
    expected = np.asarray(read_image(path))
    for source in all_forms(path):
        if name == "cut.jpg" and isinstance(source, Image.Image):
            continue  # Pillow itself cannot decode it
        np.testing.assert_array_equal(np.asarray(read_image(source)), expected)
    if name == "cut.jpg":
        assert "the image: truncated" in capsys.readouterr().err


def test_read_image_takes_pixels(rng):
    pixels = rng.integers(0, 256, (4, 6, 3), np.uint8)
    alpha = np.full((4, 6, 1), 255, np.uint8)
    for array in (pixels, pixels / 255, (pixels / 255).astype(np.float32), np.concatenate([pixels, alpha], axis=2)):
        np.testing.assert_array_equal(np.asarray(read_image(array)), pixels)
    grey = pixels[..., 0]
    for array in (grey, grey[..., np.newaxis], grey / 255):
        np.testing.assert_array_equal(np.asarray(read_image(array)), np.repeat(grey[..., np.newaxis], 3, axis=2))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (b"", "the image: not an image that can be read (not of a format that is read, such as JPEG, PNG or WebP)"),
        (b"\0\0\0\x18ftypheic", "the image: not an image that can be read"),
        (
            io.BytesIO(b"text"),
            "the image: not an image that can be read (not of a format that is read, such as JPEG, PNG or WebP)",
        ),
        (7, "expected an image as a path, bytes, an open file, an array or a Pillow image, found int"),
        ("https://example.com/a.jpg", "https://example.com/a.jpg: no such image"),
        (np.zeros((0, 5, 3), np.uint8), "found (0, 5, 3) uint8"),
        (np.zeros((1, 5, 5, 3), np.uint8), "found (1, 5, 5, 3) uint8"),
        (np.zeros((5, 5, 2), np.uint8), "found (5, 5, 2) uint8"),
        (np.full((5, 5), "a"), "found (5, 5) <U1"),
        (np.linspace(0, 255, 25).reshape(5, 5), "found (5, 5) float64 with values from 0 to 255"),
    ],
    ids=lambda value: "" if isinstance(value, str) else type(value).__name__,
)
def test_read_image_refuses_other_sources_in_one_line(source, message):
    with pytest.raises(InputError) as error:
        read_image(source)
    assert message in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 200


# Files and threads.


@pytest.mark.parametrize(
    "name", ["a.jpg", "a.JPEG", "a/b.png", "a.webp", "a.heic", "a.HEIF", "a.b.tif", "a.jp2", "a.ppm"]
)
def test_is_image_file_knows_the_endings_of_images(name):
    assert is_image_file(name) and is_image_file(Path(name))


@pytest.mark.parametrize(
    "name",
    [
        *("a.txt", "a", "jpg", "._a.jpg", ".jpg", "__MACOSX/a.jpg", "Thumbs.db", "a.jpg.part"),
        *("a.pdf", "a.mpg", "a.eps", "a.ps", "a.h5", "a.ico"),
    ],
)
def test_is_image_file_refuses_other_files(name):
    assert not is_image_file(name)


def test_map_threads_keeps_order():
    first_may_end = threading.Event()

    def square(number):
        if number == 0:
            first_may_end.wait(10)
        elif number == 1:
            first_may_end.set()
        return number**2

    assert list(map_threads(square, range(20), buffer_size=8)) == [(number, number**2) for number in range(20)]


def test_map_threads_does_not_exceed_buffer():
    taken = []

    def items():
        for number in range(100):
            taken.append(number)
            yield number

    results = map_threads(str, items(), buffer_size=5)
    assert not taken, "nothing may run before the first result is asked for"
    for count in range(1, 11):
        next(results)
        assert len(taken) == count + 4
    results.close()


def test_map_threads_raises_error_of_function():
    results = map_threads(int, ["1", "x"], buffer_size=4)
    assert next(results) == ("1", 1)
    with pytest.raises(ValueError, match="'x'"):
        next(results)


def test_map_threads_does_not_wait_for_its_threads_when_it_is_closed(monkeypatch):
    monkeypatch.setattr(images, "count_cores", lambda: 2)
    may_end, finished = threading.Event(), []

    def wait(number):
        if number:
            may_end.wait(0.5)
            finished.append(number)

    results = map_threads(wait, range(100), buffer_size=10)
    next(results)
    results.close()  # also what the garbage collector does, in whichever thread it runs
    assert not finished
    may_end.set()
