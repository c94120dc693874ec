"""The images of a command line: files, folders, http(s) addresses, and lists of them."""

import hashlib
import os
import re
import sys
import tempfile
import urllib.parse
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from urllib.request import url2pathname

from PIL import Image

from captioning.base.cli import InputError, log
from captioning.base.downloads import download, redact_url
from captioning.base.text import is_utf16
from captioning.images.image_names import parse_names, walk_files
from captioning.images.reading import is_image_file, read_image

MAX_IMAGE_BYTES = 50_000_000  # of a downloaded image
MAX_NAME_LENGTH = 80  # of a downloaded file; what servers call images can be longer than a file's name may be
PLOT_ENDING = "_attention"  # of the names of attention plots, which are no images to caption


def is_url(image: str) -> bool:
    """Tells whether an image is given by its address instead of its path."""
    return "://" in image


def shown_name(image: str) -> str:
    """Returns the name of an image in outputs: of an address, a hash takes the place of what may hold a secret key."""
    if not is_url(image) or (shown := redact_url(image)) == image:
        return image
    return f"{shown}#{hashlib.sha256(image.encode(errors='surrogateescape')).hexdigest()[:16]}"


def _name_in(url: str) -> str:
    """Returns the last part of an address, as the name of a file; empty if there is none."""
    try:
        return PurePosixPath(urllib.parse.urlsplit(url).path).name
    except ValueError:  # it is no address
        return ""


def download_image(url: str, folder: Path) -> Path:
    """Downloads an image into a folder; raises InputError, see `captioning.base.downloads.download`."""
    name = _name_in(url)[-MAX_NAME_LENGTH:]
    path = folder / (name if name.strip(".") else "image")
    return download(url, path, quiet=True, max_bytes=MAX_IMAGE_BYTES, is_temporary=True)


def open_image(image: str, min_jpeg_side: int | None = None) -> Image.Image:
    """Reads the image of a path or an address, see `download_image` and `captioning.images.reading.read_image`."""
    if not is_url(image):
        return read_image(image, min_jpeg_side)
    with tempfile.TemporaryDirectory() as folder:
        return read_image(download_image(image, Path(folder)), min_jpeg_side, shown_name(image))


def read_list(path: str) -> list[str]:
    """Reads a list: a path or an address on each line; `-` is standard input. Raises InputError if it is not one.

    A name may have quotes around it and a comment after it; lines that begin with # are comments. NUL separates names
    that `find -print0` wrote, which are taken as they are.
    """
    expected = f"--from {path}: expected a text file with an image on each line"
    try:
        content = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{expected} ({error})") from None
    # A name on the disk need not be Unicode; a list that `find` wrote has it as it is.
    text = content.decode(*(("utf-16", "replace") if is_utf16(content) else ("utf-8-sig", "surrogateescape")))
    if re.search("[\x01-\x08\x0e-\x1a\x1c-\x1f]|\0.\0", text):  # the latter in UTF-16 that does not say so
        raise InputError(f"{expected}, found a binary file")
    in_nul = "\0" in text
    images = [name for name in text.split("\0") if name] if in_nul else parse_names(f"--from {path}", text)
    if not images:
        raise InputError(f"{expected}, found none")
    return images


def find_images(args: Sequence[str], image_list: str | None) -> list[str]:
    """Returns the images of the command line and of its list, each once."""
    images = expand_image_args(args)
    if image_list:  # one that is missing does not keep the others from their captions
        images += expand_image_args(read_list(image_list), missing_ok=True)
        if not images:
            raise InputError(f"--from {image_list}: there are no images in its folders")
    first_of: dict[str, str] = {}
    for image in images:
        first_of.setdefault(image_key(image), image)
    if num_repeated := len(images) - len(first_of):
        log(f"{num_repeated:,} images are given more than once, and captioned once")
    return list(first_of.values())


def image_key(image: str) -> str:
    """Returns what the names of an image have in common: `./photos/a.jpg` and its absolute path are one file."""
    return image if is_url(image) else os.path.abspath(image)


def expand_image_args(args: Sequence[str], missing_ok: bool = False) -> list[str]:
    """Replaces the folders among files and addresses by the images in them and below, except the plots of this project.

    Raises:
        InputError: a file or folder does not exist, or a folder has no images, unless `missing_ok`.
    """
    images: list[str] = []
    for arg in args:
        if uri := re.fullmatch(r"file:(?://(?:localhost)?)?(/.*)", arg, re.IGNORECASE):
            arg = url2pathname(uri[1])
        if not is_url(arg) and os.path.isdir(arg):  # which a name that is too long is not; Path.is_dir would raise
            images_in_folder = _walk_images(arg)
            if not images_in_folder:
                problem = f"{arg}: expected a folder with images, found none in it"
                if not missing_ok:
                    raise InputError(problem)
                log(problem, error=True)
            images += images_in_folder
        elif missing_ok or is_url(arg) or os.path.isfile(arg):
            images.append(arg)
        else:
            raise InputError(f"{arg}: no such image")
    return images


def _walk_images(folder: str) -> list[str]:
    """Returns the images in a folder and below, in the order of their names, without plots and hidden folders."""
    paths = [path for path in walk_files(Path(folder)) if is_image_file(path)]
    paths = [path for path in paths if not any(part[0] == "." for part in path.split("/"))]
    images = [path for path in paths if not path.endswith(f"{PLOT_ENDING}.png")]
    if num_plots := len(paths) - len(images):
        log(f"{folder}: {num_plots:,} files named ..{PLOT_ENDING}.png are taken for plots, and left out")
    return [os.path.join(folder, path) for path in images]


def plot_paths(images: Iterable[str], folder: Path, image_format: str) -> dict[str, Path]:
    """Returns the file for each image's plot: `dog_attention.png`, and `dog_2_attention.png` for another dog.jpg.

    A name depends on the whole list, so that a command which is run again gives an image the name it had before.
    """
    paths: dict[str, Path] = {}
    counts: Counter[str] = Counter()
    taken: set[str] = set()
    for image in images:
        stem = Path(_name_in(image) if is_url(image) else image).stem
        stem = name = stem if stem.strip(".") else "image"
        while (key := name.lower()) in taken:  # some file systems do not tell capitals apart
            counts[stem] += 1
            name = f"{stem}_{counts[stem] + 1}"
        taken.add(key)
        paths[image] = folder / f"{name}{PLOT_ENDING}.{image_format}"
    return paths
