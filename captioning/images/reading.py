"""Reads the images that Pillow can open as plain RGB, and many of them with several threads."""

import contextlib
import errno
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

from captioning.base.cli import InputError, advise, log_once

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
# Not of an image: too many open files, no memory, a disk or a server that fails.
MACHINE_ERRORS = (
    errno.EIO,
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOMEM,
    errno.ENOTCONN,
    errno.ETIMEDOUT,
    getattr(errno, "ESTALE", 0),
)
ON_SIDE = (5, 6, 7, 8)  # of them, those that exchange width and height
# The formats of Pillow that are opened, by the content of a file whatever its name, in the order in which they are
# tried. The others stay closed: EPS is a program that Ghostscript runs, and IPTC can hold one; BUFR, GRIB, HDF5, MPEG
# and WMF need other programs, too; the picture in an icon or a BLP can be larger than the file declares, which is what
# `count_pixels` sees; QOI is decoded in Python, in a second per megapixel. Hardly anybody keeps photos in what is left.
FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "AVIF", "JPEG2000", "PSD", "SGI", "SUN", "PCX"),
    "TGA",  # has no mark at its beginning
)
MAX_SCANS = 500  # of a progressive JPEG, which has a dozen; a file of 20 MB can have 200,000, which take an hour
START_OF_SCAN = b"\xff\xda"
MAX_PAGES = 1000  # that are counted: the time grows with their square, to minutes for a TIFF of some MB
OUTLIERS = 200  # one of so many values, at each end, may be a hot or a dead pixel
SLICE = 1 << 20  # values that are scaled at a time
MIN_ROWS_SHARE = 0.5  # of a truncated JPEG's rows, of which more must be there
END_OF_IMAGE = b"\xff\xd9"  # the last bytes of a JPEG
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"heim", b"heis", b"heif", b"mif1", b"msf1")
OTHER_SUFFIXES = (".heic", ".heif", ".mpo", ".dib")  # HEIC, a phone's JPEG with a second picture, BMP


# Reading.


def read_image(source: ImageSource, min_jpeg_side: int | None = None, name: str | None = None) -> Image.Image:
    """Reads an image of one of `FORMATS`, or HEIC, as upright RGB, see `to_rgb`.

    A JPEG that is cut off is used without the rows that it lacks, if they are less than half. Of an animation, or of a
    file with several pages, the first is used. Both are logged.

    Args:
        source: a path; the content of a file, as bytes or as a file that is open in binary mode; pixels, (height,
            width) or (height, width, 1, 3 or 4), uint8 or floats from 0 to 1; or a Pillow image.
        min_jpeg_side: decodes a large JPEG file at 1/2, 1/4 or 1/8 of its size, the smallest that leaves its shorter
            side so many pixels: 12 megapixels take a third of the time. None for all pixels. A file that is cut off
            has all of them in any case.
        name: of the image in messages; None for that of the path.

    Raises:
        InputError: the file does not exist, or is not an image that can be read.
        OSError: the machine's fault (`MACHINE_ERRORS`), which must not count as the image's.
    """
    name = name or (str(source) if isinstance(source, Path | str) else "the image")
    with _mistakes_in(name):
        file = _open_source(source)
        if isinstance(file, Image.Image):
            return to_rgb(file)
        with file, _open(file, name) as image:
            try:
                if min_jpeg_side:
                    image.draft(None, (min_jpeg_side, min_jpeg_side))  # after the check of its megapixels
                rgb = to_rgb(image)
            except OSError:
                if image.format not in ("JPEG", "MPO"):
                    raise
                return to_rgb(_read_truncated(file, name))
            _log_frames(image, name)
            return rgb


def count_pixels(content: bytes) -> int:
    """Returns how many pixels the header of an image file declares; raises InputError as `read_image` does."""
    name = "the image"
    with _mistakes_in(name), io.BytesIO(content) as file, _open(file, name) as image:
        return image.width * image.height


@contextlib.contextmanager
def _mistakes_in(name: str) -> Iterator[None]:
    """Turns whatever is raised about an image into InputError, with its name."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError:
        raise InputError(f"{name}: no such image") from None
    except Image.DecompressionBombError as error:
        megapixels = math.ceil(int(re.findall(r"\d+", str(error))[0]) / 1e6)
        limit = round(2 * (Image.MAX_IMAGE_PIXELS or 0) / 1e6)
        raise InputError(
            f"{name}: {megapixels:,} megapixels, expected at most {limit:,}"
            + advise(f"; if you trust it, use --max-megapixels {megapixels}")
        ) from None
    except Exception as error:  # Pillow raises many types for a damaged file, struct.error and TypeError among them
        if isinstance(error, OSError) and error.errno in MACHINE_ERRORS:
            error.filename = error.filename or name  # which reading an open file does not tell
            raise
        reason = str(error) if isinstance(error, ValueError) else repr(error)
        if isinstance(error, Image.UnidentifiedImageError):
            reason = "not of a format that is read, such as JPEG, PNG or WebP"
        raise InputError(f"{name}: not an image that can be read ({reason})") from None


def read_size(path: Path) -> tuple[int, int]:
    """Returns the width and height of an upright image, from its header if possible; raises InputError as above."""
    with contextlib.suppress(Exception), open(path, "rb") as file, _open(file, str(path)) as image:
        if image.format != "TIFF":  # which Pillow turns upright itself
            return image.size[::-1] if image.getexif().get(ORIENTATION_TAG) in ON_SIDE else image.size
    return read_image(path).size


def _open_source(source: Any) -> BinaryIO | Image.Image:
    """Returns what was given as an open file or as a Pillow image; raises InputError for anything else."""
    if isinstance(source, Path | str):
        return open(source, "rb")
    if isinstance(source, Image.Image):
        return source
    if isinstance(source, bytes | bytearray | memoryview):
        return io.BytesIO(source)
    if hasattr(source, "read"):
        return io.BytesIO(source.read())
    if hasattr(source, "__array__"):
        return _array_to_image(np.asarray(source))
    raise InputError(
        f"expected an image as a path, bytes, an open file, an array or a Pillow image, found {type(source).__name__}"
    )


def _array_to_image(pixels: np.ndarray) -> Image.Image:
    """Converts an array of pixels to an image; raises InputError if its shape, type or values are not those of one."""
    found = f"{pixels.shape} {pixels.dtype}"
    if pixels.dtype.kind == "f" and pixels.size:
        found += f" with values from {pixels.min():g} to {pixels.max():g}"
        if pixels.min() >= 0 and pixels.max() <= 1:
            pixels = np.rint(255 * pixels.astype(np.float64)).astype(np.uint8)
    has_shape = pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] in (1, 3, 4))
    if not has_shape or not pixels.size or pixels.dtype != np.uint8:
        raise InputError(
            "expected pixels (height, width) or (height, width, 1, 3 or 4), uint8 or floats from 0 to 1, found " + found
        )
    return Image.fromarray(pixels[..., 0] if pixels.shape[2:] == (1,) else pixels)


def set_max_megapixels(limit: int) -> None:
    """Sets the largest image that is read, in millions of pixels. Pillow has a limit against decompression bombs."""
    Image.MAX_IMAGE_PIXELS = math.ceil(limit * 1e6 / 2)  # Pillow refuses images of more than twice as many pixels


@functools.cache
def _formats() -> tuple[str, ...]:
    """Returns those of `FORMATS` that this Pillow has; AVIF came late."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _open(file: BinaryIO, name: str) -> Image.Image:
    """Opens an image with Pillow; HEIC, as iPhones write it, too, if the package for it is installed."""
    try:
        image: Image.Image = Image.open(file, formats=_formats())
    except Image.UnidentifiedImageError:
        file.seek(4)
        if file.read(4) != b"ftyp" or file.read(4) not in HEIC_BRANDS:
            raise
    else:
        if image.info.get("progressive"):
            file.seek(0)
            if (scans := file.read().count(START_OF_SCAN)) > MAX_SCANS:
                raise InputError(f"{name}: a JPEG with {scans:,} scans, expected at most {MAX_SCANS}")
        return image
    if importlib.util.find_spec("pillow_heif") is None:
        raise InputError(f"{name}: not an image that can be read (HEIC, which needs `pip install pillow-heif`)")
    import pillow_heif

    pillow_heif.register_heif_opener()
    return Image.open(file, formats=["HEIF"])


def _read_truncated(file: BinaryIO, name: str) -> Image.Image:
    """Reads a JPEG that is cut off: the rows that are there.

    A progressive JPEG has all rows after its first scan, and lacks only details.
    """
    file.seek(0)
    image = Image.open(io.BytesIO(file.read() + END_OF_IMAGE), formats=["JPEG"])  # the decoder makes the rest grey
    pixels = np.asarray(image).reshape(image.height, image.width, -1)
    is_decoded = (pixels[:, -8:] != pixels[-1, -1]).any(axis=(1, 2))  # of each row: its last block is not grey
    num_rows = int(np.flatnonzero(is_decoded).max(initial=-1)) + 1
    if num_rows <= MIN_ROWS_SHARE * image.height:
        found = f"truncated: {num_rows} of its {image.height} rows are there"
        raise InputError(f"{name}: not an image that can be read ({found})")
    used = f"its first {num_rows} of {image.height} rows are used"
    if num_rows == image.height:
        used = "it is used without its finest details"
    log_once(f"{name}: truncated, {used}")
    return image.crop((0, 0, image.width, num_rows))


def _log_frames(image: Image.Image, name: str) -> None:
    """Logs which frame of an animation, or page of a file, was read, if there are others."""
    number = image.tell() + 1  # HEIC says which of its images is the main one
    count = _count_frames(image)
    if count > 1:
        at_least = "at least " if count == MAX_PAGES else ""
        log_once(f"{name}: frame {number} of {at_least}{count:,} is used")


def _count_frames(image: Image.Image) -> int:
    """Returns the number of frames or pages, of a TIFF at most `MAX_PAGES`; 1 if the others are damaged."""
    count = 1
    with contextlib.suppress(Exception):  # EOFError at the end, and the many types of damaged files
        if image.format == "TIFF":
            while count < MAX_PAGES:
                image.seek(count)
                count += 1
        elif image.format not in ("MPO", "PSD"):  # a photo with a preview or of two views; one picture in layers
            count = getattr(image, "n_frames", 1)
    return count


# Converting.


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to RGB, upright as its camera was held (EXIF), without metadata.

    Images of 16 bits and more, and of floats, are scaled from black to white, see `_find_range`. Transparent pixels
    become white.
    """
    is_deep = any("16" in str(tile) for tile in getattr(image, "tile", ())) and image.mode.startswith("RGB")
    image.load()  # before the EXIF is read: errors there are ignored, and Pillow turns a TIFF upright while it loads
    if is_deep and not np.asarray(image)[..., :3].any():
        raise ValueError("16 bits in colour, of which Pillow reads the upper 8, and all are 0; save it with 8 bits")
    image = _turn_upright(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would clip them to white
        image = Image.fromarray(_scale_to_bytes(np.asarray(image)))
    if image.has_transparency_data:
        image = image if image.mode == "RGBA" else image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image)
        return white
    image = image.convert("RGB")  # a copy
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
    """Scales values (height, width) from their range, see `_find_range`, to uint8; what is no number becomes 0."""
    low, high = _find_range(values[np.isfinite(values)])
    flat = values.reshape(-1)
    scaled = np.empty(flat.shape, np.uint8)
    for start in range(0, len(flat), SLICE):  # as float64 the whole would take four times the memory of the image
        part = np.nan_to_num(flat[start : start + SLICE].astype(np.float64), nan=low, posinf=high, neginf=low)
        scaled[start : start + SLICE] = np.rint(255 * (part - low) / max(high - low, 1e-300)).clip(0, 255)
    return scaled.reshape(values.shape)


def _find_range(values: np.ndarray) -> tuple[float, float]:
    """Returns the values that become black and white: the smallest and the largest without hot and dead pixels.

    Those are the outermost values, one of `OUTLIERS` at each end, that are farther from the others than these are
    from one another. An image that is otherwise of one value has none. Changes the order of `values`, (n,).
    """
    if not values.size:
        return 0.0, 0.0
    skip = len(values) // OUTLIERS
    values.partition((skip, len(values) - 1 - skip))
    low, high = float(values[skip]), float(values[-1 - skip])
    reach = high - low or math.inf
    smallest, largest = values[: skip + 1].astype(np.float64), values[len(values) - 1 - skip :].astype(np.float64)
    return float(smallest[smallest >= low - reach].min()), float(largest[largest <= high + reach].max())


# Files and threads.


def is_image_file(path: Path | str) -> bool:
    """Tells by its name whether a file is an image; a Mac's ._photo.jpg and Windows' Thumbs.db are none."""
    path = Path(path)
    is_hidden = path.name.startswith(".") or "__MACOSX" in path.parts
    return not is_hidden and path.suffix.lower() in _image_suffixes()


@functools.cache
def _image_suffixes() -> frozenset[str]:
    """Returns the endings of the formats that are read."""
    readable = (suffix for suffix, name in Image.registered_extensions().items() if name in _formats())
    return frozenset([*readable, *OTHER_SUFFIXES])


def count_cores() -> int:
    """Returns the number of CPU cores that this process may use. In a container they can be fewer than the host's."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_threads(
    fn: Callable[[Item], Result], items: Iterable[Item], buffer_size: int, num_threads: int | None = None
) -> Iterator[tuple[Item, Result]]:
    """Applies a function to items with several threads, one per core by default, ahead of their use.

    At most `buffer_size` items are in work or wait for their use, which bounds the memory. Errors are raised here.

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
