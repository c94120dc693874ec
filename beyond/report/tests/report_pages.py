"""Captions whose words light known places, the page of them, and how it looks."""

import contextlib
import io

import numpy as np
from helpers.browser import open_page
from PIL import Image

from beyond.report.report import ReportWriter

HOSTILE = "</script><img src=x onerror=alert(1)> \"'<b>&amp;"
SIZE = WIDTH, HEIGHT = 240, 160
GREY = Image.new("RGB", SIZE, (120, 120, 120))
BORDER = 8  # pixels, with the rounded corners
STILL = {"reduced_motion": "reduce"}  # the light comes at once


def one_hot(location, size=64):
    return [float(index == location) for index in range(size)]


def make_result(text="a red dog", words=None, locations=(0, 7, 56, 63, 27), **fields):
    """Makes a caption whose words light the corners, from the upper left to the lower right, and the middle."""
    probabilities = (0.98, 0.5, 0.02, 0.0001, 0.7)
    words = [
        {"word": word, "probability": probabilities[index % 5], "attention": one_hot(locations[index % 5])}
        for index, word in enumerate(text.split() if words is None else words)
    ]
    return {"caption": text, "confidence": 0.42, "log_prob": -3.1, "finished": True, "words": words, **fields}


def write_page(path, *entries):
    with ReportWriter(path, "Captions", "run small, greedy search") as page:
        for entry in entries:
            page.add(**{"image": GREY, "name": "photo.jpg", "result": make_result(), **entry})
    return path.as_uri()


@contextlib.contextmanager
def open_report(browser, url, **options):
    """Opens a page that `write_page` wrote, as `open_page` does, and waits for its figures."""
    with open_page(browser, url, **options) as page:
        if options.get("java_script_enabled", True):
            page.locator(".caption-viewer").first.wait_for()
        yield page


def pixels_of(page):
    """Returns the first image as it looks without its border, in grey: (HEIGHT - 2 * BORDER, WIDTH - 2 * BORDER)."""
    screenshot = page.locator(".cv-image").first.screenshot()
    pixels = np.asarray(Image.open(io.BytesIO(screenshot)).convert("L"), np.float32)
    return pixels[BORDER : HEIGHT - BORDER, BORDER : WIDTH - BORDER]


def brightest(pixels):
    """Returns the centre of the brightest pixels as shares of the whole image's height and width."""
    rows, columns = np.nonzero(pixels >= pixels.max() - 1)
    return (rows.mean() + BORDER) / HEIGHT, (columns.mean() + BORDER) / WIDTH


def quarters(pixels):
    """Returns the brightness of the quarters: upper left, upper right, lower left, lower right."""
    (top, bottom) = np.array_split(pixels, 2)
    return [half.mean() for row in (top, bottom) for half in np.array_split(row, 2, axis=1)]


def lit_words(page):
    return page.locator(".cv-lit").all_inner_texts()
