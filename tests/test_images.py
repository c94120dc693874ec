import os
import threading

import numpy as np
import pytest
from PIL import Image

from captioning.images import count_cores, map_threads, to_rgb


def ramp(mode="RGB", size=(40, 30)):
    """A smooth image that is dark on the left and bright on the right."""
    row = np.linspace(30, 220, size[0]).astype(np.uint8)
    return Image.fromarray(np.broadcast_to(row, size[::-1]).copy()).convert(mode)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK", "P", "1", "LA", "RGBA", "HSV", "I", "F"])
def test_to_rgb_converts_every_mode(mode):
    pixels = np.asarray(to_rgb(ramp(mode)))
    assert (pixels.shape, pixels.dtype) == ((30, 40, 3), np.uint8)
    assert pixels[:, -10:].mean() > pixels[:, :10].mean() + 50, "left is dark and right is bright"


def test_to_rgb_makes_transparency_white():
    assert (np.asarray(to_rgb(Image.new("RGBA", (10, 10), (0, 0, 0, 0)))) == 255).all()


def test_to_rgb_keeps_contrast_of_16_bit_images():
    values = np.linspace(0, 65535, 100).astype(np.uint16).reshape(10, 10)
    pixels = np.asarray(to_rgb(Image.fromarray(values)))
    assert pixels.min() == 0 and 120 < pixels.mean() < 135 and pixels.max() == 255


def test_to_rgb_converts_black_16_bit_image():
    assert (np.asarray(to_rgb(Image.fromarray(np.zeros((4, 4), np.uint16)))) == 0).all()


def test_to_rgb_applies_exif_orientation():
    image = ramp()
    image.getexif()[0x0112] = 3  # taken upside down
    pixels = np.asarray(to_rgb(image))
    assert pixels[:, :10].mean() > pixels[:, -10:].mean() + 50


def test_count_cores_counts_only_usable_cores(monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 64)  # of the host
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {3, 5}, raising=False)
    assert count_cores() == 2
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS and Windows
    assert count_cores() == 64
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert count_cores() == 1


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
