"""Reads the images that Pillow can open as plain RGB, and many of them with several threads."""

import contextlib
import functools
import importlib.util
import io
import math
import os
import re
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from captioning.base.cli import InputError, advise, log

# What can be captioned: a file, its content, an open file, an array of pixels or a Pillow image.
ImageSource = Path | str | bytes | BinaryIO | np.ndarray | Image.Image
Item = TypeVar("Item")
Result = TypeVar("Result")

# Pillow warns about odd metadata, which are not used, and about large images below the limit.
warnings.filterwarnings("ignore", module=r"PIL\.")

# Pillow's number of each orientation that a camera stores (EXIF tag 274), and what makes it upright.
ORIENTATION_TAG = 0x0112
TRANSPOSITIONS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
MIN_ROWS_SHARE = 0.5  # of a truncated JPEG's rows, of which more must be there
PROGRESSIVE_FRAME, START_OF_SCAN, END_OF_IMAGE = b"\xff\xc2", b"\xff\xda", b"\xff\xd9"  # markers of a JPEG
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"heif", b"mif1", b"msf1")
# What Pillow has a name for, but opens only with other programs, or is no image.
NO_IMAGES = {".pdf", ".mpg", ".mpeg", ".h5", ".hdf", ".grib", ".bufr", ".wmf", ".emf"}
HEIC_SUFFIXES = (".heic", ".heif")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_METADATA = b"acTL bKGD cHRM cICP eXIf fcTL fdAT gAMA hIST iCCP iTXt pHYs sBIT sPLT sRGB tEXt tIME zTXt".split()


# Reading.


def read_image(source: ImageSource, min_jpeg_side: int | None = None) -> Image.Image:
    """Reads an image of any format that Pillow knows as upright RGB, see `to_rgb`.

    A JPEG that is cut off is used without the rows that it lacks, if they are less than half, and that is logged.
    Damaged metadata are ignored.

    Args:
        source: a path; the content of a file, as bytes or as a file that is open in binary mode; pixels, (height,
            width) or (height, width, 1, 3 or 4), uint8 or floats from 0 to 1; or a Pillow image.
        min_jpeg_side: decodes a large JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest that leaves its shorter
            side so many pixels: 12 megapixels take a third of the time. None for all pixels. A file that is cut off
            has all of them in any case, and a Pillow image those that it has.

    Raises:
        InputError: the file does not exist, or is not an image that can be read.
    """
    source = _to_source(source)
    try:
        return to_rgb(source) if isinstance(source, Image.Image) else _read(source, min_jpeg_side)
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{_name(source)}: no such image") from None
    except Image.DecompressionBombError as error:
        megapixels = math.ceil(int(re.findall(r"\d+", str(error))[0]) / 1e6)
        limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)
        raise InputError(
            f"{_name(source)}: {megapixels:,} megapixels, expected at most {limit:,}"
            + advise(f"; if you trust it, use --max-megapixels {megapixels}")
        ) from None
    except Exception as error:  # Pillow raises many types for a damaged file, struct.error and TypeError among them
        reason = _describe_unknown(source) if isinstance(error, Image.UnidentifiedImageError) else repr(error)
        raise InputError(f"{_name(source)}: not an image that can be read ({reason})") from None


def _to_source(source: Any) -> Path | str | bytes | Image.Image:
    """Returns what was given as a path, as the content of a file, or as a Pillow image."""
    if isinstance(source, bytearray | memoryview):
        return bytes(source)
    if hasattr(source, "read"):
        if not isinstance(content := source.read(), bytes):
            raise InputError(
                f"expected a file that is open in binary mode, found one that gives {type(content).__name__}"
            )
        return content
    if isinstance(source, Path | str | bytes | Image.Image):
        return source
    if not hasattr(source, "__array__"):
        kind = type(source).__name__
        raise InputError(f"expected an image as a path, bytes, an open file, an array or a Pillow image, found {kind}")
    return _array_to_image(np.asarray(source))


def _array_to_image(pixels: np.ndarray) -> Image.Image:
    """Converts an array of pixels to an image; raises InputError if its shape, type or values are none of pixels."""
    is_image = pixels.ndim in (2, 3) and pixels.size and (pixels.ndim == 2 or pixels.shape[2] in (1, 3, 4))
    is_float = pixels.dtype.kind == "f" and is_image
    if is_float and pixels.min() >= 0 and pixels.max() <= 1:
        pixels = np.rint(255 * pixels.astype(np.float64)).astype(np.uint8)
    if not is_image or pixels.dtype != np.uint8:
        values = f" with values from {pixels.min():g} to {pixels.max():g}" if is_float else ""
        raise InputError(
            "expected pixels (height, width) or (height, width, 1, 3 or 4), uint8 or floats from 0 to 1, found "
            f"{pixels.shape} {pixels.dtype}{values}"
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def _name(file: Path | str | bytes | Image.Image) -> str:
    """Returns what a message calls an image."""
    return str(file) if isinstance(file, Path | str) else "the image"


def _to_file(file: Path | str | bytes) -> Path | str | BinaryIO:
    """Returns what Pillow opens: a path, or the content of a file as an open one."""
    return io.BytesIO(file) if isinstance(file, bytes) else file


def _open_binary(file: Path | str | bytes) -> BinaryIO:
    """Opens a file, or the content of one."""
    return io.BytesIO(file) if isinstance(file, bytes) else open(file, "rb")


def set_max_megapixels(limit: int) -> None:
    """Sets the largest image that is read, in millions of pixels. Pillow has a limit against decompression bombs."""
    Image.MAX_IMAGE_PIXELS = math.ceil(limit * 1e6 / 2)  # Pillow refuses images of more than twice as many pixels


def _read(path: Path | str | bytes, min_jpeg_side: int | None) -> Image.Image:
    """Reads an image, see `read_image`; raises what Pillow raises."""
    try:
        with _open(path) as image:
            if min_jpeg_side:
                image.draft(None, (min_jpeg_side, min_jpeg_side))  # after the check of its megapixels
            return to_rgb(_load(path, image))
    except (InputError, FileNotFoundError, Image.DecompressionBombError):
        raise
    except Exception:
        content = _strip_png(path)
        if content is None:
            raise
        with Image.open(io.BytesIO(content)) as image:
            return to_rgb(image)


def _strip_png(path: Path | str | bytes) -> bytes | None:
    """Returns a PNG without its metadata, over which Pillow may stumble; None of a file that has none."""
    with _open_binary(path) as file:
        if file.read(len(PNG_SIGNATURE)) != PNG_SIGNATURE:
            return None
        chunks, has_metadata = [], False
        while len(header := file.read(8)) == 8:
            rest = file.read(int.from_bytes(header[:4]) + 4)  # the content and its CRC
            if header[4:] in PNG_METADATA:
                has_metadata = True
            else:
                chunks += [header, rest]
    return b"".join([PNG_SIGNATURE, *chunks]) if has_metadata else None


def _open(path: Path | str | bytes) -> Image.Image:
    """Opens an image; HEIC too, if the package for it is installed."""
    try:
        return Image.open(_to_file(path))
    except Image.UnidentifiedImageError:
        if not (_is_heic(path) and _register_heic()):
            raise
        return Image.open(_to_file(path))


def _is_heic(path: Path | str | bytes | Image.Image) -> bool:
    """Tells by the first bytes whether a file is HEIC, as iPhones write it."""
    if isinstance(path, Image.Image):
        return False
    with _open_binary(path) as file:
        header = file.read(12)
    return header[4:8] == b"ftyp" and header[8:] in HEIC_BRANDS


@functools.cache
def _register_heic() -> bool:
    """Makes Pillow read HEIC; returns False if the package for it is not installed."""
    if importlib.util.find_spec("pillow_heif") is None:
        return False
    import pillow_heif

    pillow_heif.register_heif_opener()
    return True


def _describe_unknown(path: Path | str | bytes | Image.Image) -> str:
    """Says why Pillow does not know a file's format."""
    if _is_heic(path) and not _register_heic():
        return "HEIC, which needs `pip install pillow-heif`"
    return "no format that Pillow knows"


def _load(path: Path | str | bytes, image: Image.Image) -> Image.Image:
    """Decodes an image that was opened; of a JPEG that is cut off, the rows that are there, all their pixels."""
    try:
        image.load()
        return image
    except OSError:
        if image.format not in ("JPEG", "MPO"):
            raise
        if image.info.get("progressive"):
            return _load_progressive(path)
        with Image.open(_to_file(path)) as again:
            num_rows = _load_rows(again)
            if num_rows <= MIN_ROWS_SHARE * again.height:
                found = f"truncated: {num_rows} of its {again.height} rows are there"
                raise InputError(f"{_name(path)}: not an image that can be read ({found})") from None
            _log_once(f"{_name(path)}: truncated, its first {num_rows} of {again.height} rows are used")
            return again.crop((0, 0, again.width, num_rows))


def _load_progressive(path: Path | str | bytes) -> Image.Image:
    """Decodes a progressive JPEG that is cut off: after its first scan it has all rows, and lacks only details."""
    content = path if isinstance(path, bytes) else Path(path).read_bytes()
    if content.partition(PROGRESSIVE_FRAME)[2].count(START_OF_SCAN) < 2:  # a thumbnail before it has its own scan
        raise InputError(f"{_name(path)}: not an image that can be read (truncated: its first scan is not complete)")
    image = Image.open(io.BytesIO(content + END_OF_IMAGE))
    image.load()
    _log_once(f"{_name(path)}: truncated, it is used without its finest details")
    return image


def _load_rows(image: Image.Image) -> int:
    """Decodes a JPEG as far as it goes, and returns the number of rows that were decoded."""
    # What is not decoded keeps the colour that the image is filled with before.
    colour = tuple(range(1, 255, 63))[: len(image.getbands())]
    image.load_prepare()  # type: ignore[attr-defined]
    image.im = Image.new(image.mode, image.size, colour if len(colour) > 1 else colour[0]).im
    with contextlib.suppress(OSError):
        image.load()
    image.tile = []  # type: ignore[attr-defined]  # otherwise Pillow would decode again
    is_decoded = (np.asarray(image).reshape(image.height, image.width, -1) != colour).any(axis=(1, 2))
    return int(np.flatnonzero(is_decoded).max(initial=-1)) + 1


@functools.cache
def _log_once(message: str) -> None:
    """Logs a message that was not logged before: an image may be read for its features and for its plot."""
    log(message)


# Converting.


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to upright RGB, without metadata.

    The orientation that a camera stored (EXIF) is applied; all other metadata are ignored, and cannot spoil the image.
    Images of 16 bits and more, and of floats, are scaled so that their smallest and largest values become black and
    white. Transparent pixels become white.
    """
    image = _turn_upright(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would clip them to white
        image = Image.fromarray(_scale_to_bytes(np.asarray(image, np.float64)))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    image = image.convert("RGB")
    image.info = {}  # or the orientation would be applied again
    return image


def _turn_upright(image: Image.Image) -> Image.Image:
    """Applies the orientation that a camera stored, if it can be read."""
    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except Exception:  # Pillow raises many types for damaged metadata
        return image
    transposition = TRANSPOSITIONS.get(orientation) if isinstance(orientation, int) else None
    return image if transposition is None else image.transpose(transposition)


def _scale_to_bytes(values: np.ndarray) -> np.ndarray:
    """Scales values (height, width) by the range of those that are finite to uint8; what is no number becomes 0."""
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0.0, 0.0)
    values = np.nan_to_num(values, nan=low, posinf=high, neginf=low)
    return np.rint(255 * (values - low) / max(high - low, 1e-300)).clip(0, 255).astype(np.uint8)


# Files and threads.


def is_image_file(path: Path | str) -> bool:
    """Tells by its name whether a file is an image; a Mac's ._photo.jpg and Windows' Thumbs.db are none."""
    path = Path(path)
    is_hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return not is_hidden and path.suffix.lower() in _image_suffixes()


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Returns the endings of the formats that Pillow reads."""
    readable = (suffix for suffix, name in Image.registered_extensions().items() if name in Image.OPEN)
    return frozenset([*readable, *HEIC_SUFFIXES]) - NO_IMAGES


def count_cores() -> int:
    """Returns the number of CPU cores that this process may use. In a container they can be fewer than the host's."""
    if hasattr(os, "process_cpu_count"):  # Python 3.13
        return os.process_cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_threads(
    fn: Callable[[Item], Result], items: Iterable[Item], buffer_size: int, num_threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Applies a function to items with several threads, ahead of their use.

    Args:
        fn: the function; its errors are raised here.
        items: its arguments.
        buffer_size: the largest number of items that are in work or wait for their use, which bounds the memory.
        num_threads: None for one per core.

    Yields:
        Each item with its result, in the order of the items.
    """
    pool = ThreadPoolExecutor(num_threads or count_cores())
    try:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            pending.append((item, pool.submit(fn, item)))
            if len(pending) >= buffer_size:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        for item, future in pending:
            yield item, future.result()
    finally:  # does not wait: an abandoned generator can end in any thread, even in one that another thread waits for
        pool.shutdown(wait=False, cancel_futures=True)
