"""Captions in the form of `Caption.to_json`, whose words light known locations, and pages of them."""

import contextlib
import io

import numpy as np
from helpers.browser import open_page
from PIL import Image

from beyond.report.report import open_report
from captioning.output.captions import Caption

HOSTILE = "</script><!--<img src=x onerror=alert(1)> \"'<b>&amp; \u2028 </figure>"
SIZE = WIDTH, HEIGHT = 240, 160
GREY = Image.new("RGB", SIZE, (120, 120, 120))
BORDER = 8  # pixels, with the rounded corners
STILL = {"reduced_motion": "reduce"}  # the light comes at once
CORNERS = (0, 7, 56, 63, 27)  # of a grid of 8 x 8: upper left, upper right, lower left, lower right, middle
PROBABILITIES = (0.98, 0.5, 0.02, 0.0001, 0.7)


def one_hot(location, size=64):
    return [float(index == location) for index in range(size)]


def make_result(text="a red dog", words=None, **fields):
    """Makes a caption; its first words light the corners, then the middle."""
    words = [
        {"word": word, "probability": PROBABILITIES[index % 5], "attention": one_hot(CORNERS[index % 5])}
        for index, word in enumerate(text.split() if words is None else words)
    ]
    return {"caption": text, "confidence": 0.42, "log_prob": -3.1, "finished": True, "words": words, **fields}


def make_caption(text="a dog", **fields):
    words = tuple(text.split())
    return Caption(text, words, (0.5,) * len(words), np.full((len(words), 64), 1 / 64), 1.0, **fields)


def write_page(path, *entries, subtitle="run small, greedy search"):
    """Writes a page; an entry has arguments of `ReportWriter.add` that are not the default."""
    with open_report(path, subtitle) as page:
        for entry in entries:
            page.add(**{"image": GREY, "name": "photo.jpg", "result": make_result(), **entry})
    return path.as_uri()


@contextlib.contextmanager
def open_entries(browser, folder, *entries, **options):
    """Writes a page, opens it as `open_page` does, and waits for its figures."""
    with open_page(browser, write_page(folder / "a.html", *entries), **options) as page:
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


def lit_words(page):
    return page.locator(".cv-lit").all_inner_texts()
