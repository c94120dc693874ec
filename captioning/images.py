"""Converts the images that Pillow can open to plain RGB, and reads many images with several threads."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

import numpy as np
from PIL import Image, ImageOps

Item = TypeVar("Item")
Result = TypeVar("Result")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts any image to upright RGB.

    The orientation that a camera stored (EXIF) is applied. Images of 16 bits and more are scaled so that their
    brightest pixel becomes white. Transparent pixels become white.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith(("I", "F")):  # 16 bits and more: Pillow would clip them to white
        values = np.asarray(image, np.float32)
        values = 255 * values / max(values.max(), 1e-6)
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        background = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(background, image)
    return image.convert("RGB")


def count_cores() -> int:
    """Returns the number of CPU cores that this process may use. In a container they can be fewer than the host's."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def map_threads(fn: Callable[[Item], Result], items: Iterable[Item], buffer_size: int) -> Iterator[tuple[Item, Result]]:
    """Applies a function to items with one thread per core, ahead of their use.

    Args:
        fn: the function; its errors are raised here.
        items: its arguments.
        buffer_size: the largest number of items that are in work or wait for their use, which bounds the memory.

    Yields:
        Each item with its result, in the order of the items.
    """
    with ThreadPoolExecutor(count_cores()) as pool:
        pending: deque[tuple[Item, Future[Result]]] = deque()
        for item in items:
            pending.append((item, pool.submit(fn, item)))
            if len(pending) >= buffer_size:
                oldest, future = pending.popleft()
                yield oldest, future.result()
        for item, future in pending:
            yield item, future.result()
