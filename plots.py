"""Pictures for people: where the model looked, many pictures with their captions, and how a training went.

    figure = plot_attention(picture, caption)             # shows itself in a notebook
    plot_attention(picture, caption, "attention.svg")     # and is written: .png, .svg or .pdf

They are laid out here in inches, and drawn without pyplot: no window system, and nothing to close.
"""

import io
import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import features
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from common import atomic_write
from search import Caption

FORMATS = ("png", "svg", "pdf")
SLIDE = 16 / 9  # width / height; panels are arranged to come near it
DPI = 110  # of .png
PIXELS = 480  # the longer side of a picture as it is drawn
LONGEST = 5  # a picture more than so many times as wide as high, or as high as wide, is drawn as if it were just that
GRID_PICTURES = 60  # on one overview
SHADE, GLOW = 0.25, 60  # what is left of the brightness where nobody looked; what is added where all looked


class Plot(Figure):
    """A figure that a notebook shows as the last value of a cell, with or without %matplotlib."""

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def panel(self, left: float, top: float, width: float, height: float) -> Axes:
        """Axes without ticks at so many inches from the left and the top."""
        across, down = self.get_size_inches()
        axes = self.add_axes((left / across, 1 - (top + height) / down, width / across, height / down))
        axes.set_axis_off()
        return axes

    def write(self, left: float, top: float, text: str, points: float, **kind: Any) -> None:
        """Writes text whose upper middle is so many inches from the left and the top."""
        across, down = self.get_size_inches()
        # A "$" is a dollar, not the start of a formula.
        place: dict[str, Any] = {"ha": "center", "va": "top", "parse_math": False} | kind
        self.text(left / across, 1 - top / down, text, fontsize=points, **place)

    def save(self, path: Path | str) -> None:
        """Writes the figure in the format of the path's ending."""
        with atomic_write(path, "wb") as file:
            self.savefig(file, format=Path(path).suffix[1:].lower())


def grid_of(count: int, aspect: float) -> tuple[int, int]:
    """Rows and columns for so many cells of this width / height, near the shape of a slide."""
    grids = [(rows, math.ceil(count / rows)) for rows in range(1, count + 1)]
    return min(grids, key=lambda grid: abs(math.log(grid[1] / grid[0] * aspect / SLIDE)))


def size_of(picture: Image.Image) -> tuple[int, int]:
    """Width and height in pixels to draw a picture with: large enough to be smooth, and never a mere line."""
    aspect = min(LONGEST, max(1 / LONGEST, picture.width / picture.height))
    return round(PIXELS * min(1, aspect)), round(PIXELS * min(1, 1 / aspect))


def shortened(text: str, inches: float, points: float) -> str:
    """Text cut to a width, as far as that can be told without drawing it."""
    most = max(1, int(inches * 72 / (0.6 * points)))  # a character is about 0.6 times as wide as its font is high
    return text if len(text) <= most else text[: most - 1] + "…"


def wrapped(text: str, inches: float, points: float, most: int = 9) -> list[str]:
    """Text in lines of a width, as far as that can be told without drawing it."""
    return textwrap.wrap(text, max(8, int(inches * 72 / (0.55 * points))), max_lines=most, placeholder=" …")


# The attention plot.


def enlarge(weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The weights of 64 locations, smoothly enlarged over a picture of size (width, height): (height, width)."""
    side = math.isqrt(len(weights))
    grid = Image.fromarray(weights.reshape(side, side).astype(np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC)).clip(0)


def lit(picture: Image.Image, weights: np.ndarray) -> np.ndarray:
    """A picture lit where the weights are, the largest of them full: (height, width, 3) uint8.

    Something is added to the light, so that it shows in a dark picture too.
    """
    light = enlarge(weights, picture.size)[..., np.newaxis]  # (height, width, 1)
    light = light / max(light.max(), 1e-9)
    pixels = np.asarray(picture, np.float32) * (SHADE + (0.95 - SHADE) * light) + GLOW * light
    return pixels.clip(0, 255).astype(np.uint8)


def plot_attention(picture: Image.Image, caption: Caption, path: Path | str | None = None) -> Plot:
    """The picture, and for every word the picture lit where the model looked, titled with the word's probability.

    Each panel is scaled to its own brightest location. Written to `path` if there is one, as .png, .svg or .pdf.
    """
    picture = features.upright_rgb(picture)
    picture = picture.resize(size_of(picture), Image.Resampling.BICUBIC)
    aspect = picture.width / picture.height
    width, height = 2.3 * aspect**0.5, 2.3 / aspect**0.5  # inches; the same area for all shapes
    cell, title, gap = max(width, 1.3), 0.48, 0.12
    panels = len(caption.words) + 1
    rows, columns = grid_of(panels, (cell + gap) / (height + title))
    across = max(3.6, columns * (cell + gap) + gap)
    lines = wrapped(caption.text or "(no words)", across - 0.2, 15)
    top = 0.15 + 0.28 * len(lines)
    figure = Plot(figsize=(across, top + rows * (height + title) + gap), dpi=DPI)
    figure.write(across / 2, 0.1, "\n".join(lines), 15)
    side = (across - columns * (cell + gap) + gap) / 2  # inches left of the first column
    shown = [np.asarray(picture), *(lit(picture, weights) for weights in caption.attention)]
    for number, pixels in enumerate(shown):
        row, column = divmod(number, columns)
        left, down = side + column * (cell + gap), top + row * (height + title)
        axes = figure.panel(left + (cell - width) / 2, down + title, width, height)
        axes.imshow(pixels, aspect="auto", interpolation="antialiased")
        if number:
            word, probability = caption.words[number - 1], caption.probabilities[number - 1]
            points = max(8.0, min(13.0, cell * 72 / (0.6 * len(word))))
            figure.write(left + cell / 2, down + title - 0.2, shortened(word, cell, points), points, va="bottom")
            percent = f"{100 * probability:.0f} %" if probability >= 0.005 else "< 1 %"
            figure.write(left + cell / 2, down + title - 0.04, percent, 8.5, va="bottom", color="dimgrey")
    if path:
        figure.save(path)
    return figure


# Many pictures at once.


def plot_overview(pictures: Sequence[tuple[Image.Image, str]], path: Path | str | None = None) -> Plot:
    """Pictures, as `thumbnail` makes them, with their captions below. Written to `path` if there is one."""
    width, height, gap, line = 2.6, 2.0, 0.2, 0.17  # inches
    captions = [wrapped(text or "(no words)", width, 10, most=6) for _, text in pictures]
    text = 0.12 + line * max(map(len, captions))
    rows, columns = grid_of(len(pictures), (width + gap) / (height + text + gap))
    figure = Plot(figsize=(columns * (width + gap) + gap, rows * (height + text + gap) + gap), dpi=DPI)
    for number, ((picture, _), lines) in enumerate(zip(pictures, captions, strict=True)):
        row, column = divmod(number, columns)
        left, down = gap + column * (width + gap), gap + row * (height + text + gap)
        scale = min(width / picture.width, height / picture.height)
        across, high = picture.width * scale, picture.height * scale
        axes = figure.panel(left + (width - across) / 2, down + height - high, across, high)
        axes.imshow(np.asarray(picture), aspect="auto", interpolation="antialiased")
        figure.write(left + width / 2, down + height + 0.07, "\n".join(lines), 10)
    if path:
        figure.save(path)
    return figure


def thumbnail(picture: Image.Image) -> Image.Image:
    """A picture for the overview: upright, in RGB, and small enough that many can be kept."""
    picture = features.upright_rgb(picture)
    return picture.resize(size_of(picture), Image.Resampling.BICUBIC)


# The loss plot.


def plot_history(rows: Sequence[dict[str, Any]], path: Path | str | None = None) -> Plot:
    """Training and validation loss and CIDEr by epoch, the best epoch marked. Written to `path` if there is one."""
    epochs = [int(row["epoch"]) for row in rows]
    values = lambda name: [float(row[name]) for row in rows]
    figure = Plot(figsize=(7.5, 4.5), dpi=DPI, layout="constrained")
    losses = figure.subplots()
    losses.plot(epochs, values("train_loss"), marker="o", markersize=3.5, label="training loss")
    losses.plot(epochs, values("val_loss"), marker="o", markersize=3.5, label="validation loss")
    losses.set(xlabel="epoch", ylabel="loss (nats per word)", ylim=(0, None))
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.grid(alpha=0.25)
    scores = losses.twinx()
    scores.plot(epochs, values("cider"), color="tab:green", marker="s", markersize=3.5, label="CIDEr")
    scores.set_ylabel("CIDEr of captions of validation pictures", color="tab:green")
    scores.tick_params(axis="y", colors="tab:green")
    best = max(rows, key=lambda row: float(row["cider"]))
    epoch, cider, bleu = int(best["epoch"]), float(best["cider"]), float(best["bleu4"])
    losses.axvline(epoch, color="grey", linestyle=":", linewidth=1)
    label = f"best epoch: {epoch}"
    scores.plot([epoch], [cider], "*", color="tab:red", markersize=14, linestyle="none", label=label)
    scores.set_ylim(0, 1.08 * max(cider, 1e-3))
    losses.set_title(f"best: epoch {epoch}, with CIDEr {cider:.1f}, BLEU-4 {bleu:.1f}", fontsize=11, pad=26)
    found = [handle for axes in (losses, scores) for handle in axes.get_legend_handles_labels()[0]]
    losses.legend(handles=found, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=9)
    if path:
        figure.save(path)
    return figure
