"""Plots: the attention for each word, many images with their captions, and the loss of a training.

    figure = plot_attention(image, words, attention)             # a notebook shows it
    plot_attention(image, words, attention, path="plot.svg")     # it is also written: .png, .svg or .pdf

Sizes and positions are in inches, from the left and from the top. pyplot is not used: there is no window system, and
no figure to close.
"""

import functools
import io
import math
import re
import unicodedata
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import RendererBase
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.ticker import MaxNLocator
from PIL import Image

from captioning.base.cli import log
from captioning.base.files import atomic_write
from captioning.base.text import split_characters
from captioning.images.reading import to_rgb

FORMATS = ("png", "svg", "pdf")
TARGET_ASPECT = 16 / 9  # width / height that a figure should come near to: that of a slide
DPI = 110  # of .png
MAX_SIDE_PX = 480  # the longer side of an image in a plot
MAX_ASPECT = 5  # an image that is longer than so many times its other side is squeezed to that
MAX_GRID_IMAGES = 60
DIM_FACTOR = 0.25  # what remains of the brightness where the attention is 0
LIT_FACTOR = 0.95  # what remains of it where the attention is largest
GLOW_OFFSET = 60  # what is added to the pixels there, so that it is visible in a dark image too
NO_WORDS = "(no words)"  # the title of an empty caption
POINTS_PER_INCH = 72
MISSING = (None, "")  # in history.csv, the score of an epoch that has none
NO_SCORES = ("train_loss", "train_seconds")  # of the columns of history.csv that begin with train_
# Matplotlib draws every character with the first of these fonts that has it. Its own comes first; the others are those
# of Linux, macOS and Windows for scripts that it lacks.
FONT_FAMILIES = (
    "DejaVu Sans",
    "Noto Sans CJK JP",
    "Noto Sans Thai",
    "Noto Sans Devanagari",
    "Noto Emoji",
    "Arial Unicode MS",
    "Hiragino Sans",
    "Microsoft YaHei",
    "Malgun Gothic",
)


@functools.cache
def font_families() -> list[str]:
    """Returns those of `FONT_FAMILIES` that are installed."""
    installed = fontManager.get_font_names()
    return [family for family in FONT_FAMILIES if family in installed]


class NotebookFigure(Figure):
    """A figure that a notebook shows as the last value of a cell, with or without %matplotlib."""

    has_logged_missing_glyph = False  # in this process, of any figure

    def _repr_png_(self) -> bytes:
        file = io.BytesIO()
        self.savefig(file, format="png")
        return file.getvalue()

    def add_image(self, pixels: np.ndarray, left: float, top: float, width: float, height: float) -> None:
        """Draws pixels (height, width, 3) with their upper left corner at (left, top)."""
        figure_width, figure_height = self.get_size_inches()
        bounds = (left / figure_width, 1 - (top + height) / figure_height, width / figure_width, height / figure_height)
        axes = self.add_axes(bounds)
        axes.set_axis_off()
        axes.imshow(pixels, aspect="auto", interpolation="antialiased")

    def add_text(self, left: float, top: float, text: str, points: float, **settings: Any) -> None:
        """Writes centred text below (left, top), with a font size in points; `settings` are Matplotlib's."""
        figure_width, figure_height = self.get_size_inches()
        self.text(
            left / figure_width,
            1 - top / figure_height,
            text,
            fontsize=points,
            family=font_families(),
            parse_math=False,  # a "$" in a caption would begin a formula
            **{"ha": "center", "va": "top"} | settings,
        )

    def draw(self, renderer: RendererBase) -> None:
        """Draws the figure, in any format; a missing font is logged once, of which Matplotlib warns for each glyph."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            super().draw(renderer)
        for warning in caught:
            glyph = re.match(r"Glyph (\d+) .*missing from", str(warning.message))
            if glyph is None:
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
            elif not NotebookFigure.has_logged_missing_glyph:
                NotebookFigure.has_logged_missing_glyph = True
                log(
                    f"plots: no installed font has {chr(int(glyph[1]))!r}, which is drawn as a box; install Noto Sans "
                    "CJK, Noto Sans Thai, Noto Emoji or another of FONT_FAMILIES in captioning/output/plots.py"
                )

    def save(self, path: Path | str) -> None:
        """Writes the figure in the format that the path ends in."""
        with atomic_write(path, "wb") as file:
            self.savefig(file, format=Path(path).suffix[1:].lower())


def is_plot(path: Path) -> bool:
    """Tells whether Matplotlib wrote a file, which has its name in all formats."""
    return b"atplotlib" in path.read_bytes()


def best_grid(num_cells: int, aspect: float) -> tuple[int, int]:
    """Returns the rows and columns for cells of this width / height whose shape is nearest to `TARGET_ASPECT`."""

    def distance(rows: int) -> float:
        columns = math.ceil(num_cells / rows)
        return abs(math.log(columns / rows * aspect / TARGET_ASPECT))

    rows = min(range(1, num_cells + 1), key=distance)
    return rows, math.ceil(num_cells / rows)


def thumbnail(image: Image.Image) -> Image.Image:
    """Returns an image as plots show it: upright, in RGB, at most `MAX_SIDE_PX` large, and never only a line."""
    image = to_rgb(image)
    aspect = min(MAX_ASPECT, max(1 / MAX_ASPECT, image.width / image.height))
    size = round(MAX_SIDE_PX * min(1, aspect)), round(MAX_SIDE_PX * min(1, 1 / aspect))
    return image.resize(size, Image.Resampling.BICUBIC)


def count_cells(text: str) -> int:
    """Estimates the width of text in Latin letters: wide characters, such as Chinese ones, count twice, marks not."""
    visible = [char for char in text if unicodedata.category(char) not in ("Mn", "Me", "Cf")]
    return len(visible) + sum(unicodedata.east_asian_width(char) in "WF" for char in visible)


def _cut_text(text: str, max_cells: int) -> str:
    while count_cells(text) > max_cells:
        text = text[:-1]
    return text


def wrap_text(text: str, width: float, points: float, max_lines: int = 9) -> list[str]:
    """Breaks text into lines of a width, which is estimated: at spaces, and between characters written without."""
    max_cells = max(8, int(width * POINTS_PER_INCH / (0.55 * points)))  # a letter's width is about 0.55 of its height
    lines: list[str] = []
    for word in text.split():
        separator = " "
        for part in split_characters(word):
            if lines and count_cells(lines[-1] + separator + part) <= max_cells:
                lines[-1] += separator + part
            else:
                while count_cells(part) > max_cells:  # too long for any line
                    lines.append(_cut_text(part, max_cells))
                    part = part[len(lines[-1]) :]
                lines.append(part)
            separator = ""
    if len(lines) > max_lines:
        lines = [*lines[: max_lines - 1], _cut_text(lines[max_lines - 1], max_cells - 2).rstrip() + " …"]
    return lines


# The attention plot.


def upsample_attention(attention_weights: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Enlarges the weights (L,) of a square grid smoothly to an image of size (width, height): (height, width)."""
    side = math.isqrt(len(attention_weights))
    grid = Image.fromarray(attention_weights.reshape(side, side).astype(np.float32))
    return np.asarray(grid.resize(size, Image.Resampling.BICUBIC)).clip(0)


def overlay_attention(image: Image.Image, attention_weights: np.ndarray) -> np.ndarray:
    """Lights an image where the attention weights (L,) are large: (height, width, 3) uint8.

    The location with the largest weight has full brightness, whatever the weight is.
    """
    light = upsample_attention(attention_weights, image.size)[..., np.newaxis]  # (height, width, 1)
    light = light / max(light.max(), 1e-9)
    brightness = DIM_FACTOR + (LIT_FACTOR - DIM_FACTOR) * light
    pixels = np.asarray(image, np.float32) * brightness + GLOW_OFFSET * light  # (height, width, 3)
    return pixels.clip(0, 255).astype(np.uint8)


def plot_attention(
    image: Image.Image,
    words: Sequence[str],
    attention: np.ndarray,
    probabilities: Sequence[float] | None = None,
    path: Path | str | None = None,
    text: str | None = None,
) -> NotebookFigure:
    """Plots an image, and for each word the image lit where the model attended to.

    Args:
        image: any image that Pillow can open.
        words: the T words of its caption.
        attention: (T, L), the attention weights of each word.
        probabilities: of each word, for its title.
        path: the file to write, .png, .svg or .pdf.
        text: the caption, where it is not its words with spaces between them.
    """
    image = thumbnail(image)
    aspect = image.width / image.height
    width, height = 2.3 * aspect**0.5, 2.3 / aspect**0.5  # of an image; all shapes have the same area
    gap, title_height = 0.12, 0.5
    cell_width, cell_height = max(width, 1.3) + gap, height + title_height
    rows, columns = best_grid(len(words) + 1, cell_width / cell_height)
    figure_width = max(3.6, columns * cell_width + gap)
    caption = wrap_text(text or " ".join(words) or NO_WORDS, figure_width - 0.2, 15)
    caption_height = 0.15 + 0.28 * len(caption)
    figure = NotebookFigure(figsize=(figure_width, caption_height + rows * cell_height + gap), dpi=DPI)
    figure.add_text(figure_width / 2, 0.1, "\n".join(caption), 15)

    titles = [""]  # the image itself has none
    for index, word in enumerate(words):
        lines = wrap_text(word, cell_width - gap, 11, max_lines=1)
        if probabilities is not None:
            lines.append(format_percent(probabilities[index]))
        titles.append("\n".join(lines))
    panels = [np.asarray(image), *(overlay_attention(image, weights) for weights in attention)]
    first_center = (figure_width - (columns - 1) * cell_width) / 2
    for index, (title, pixels) in enumerate(zip(titles, panels, strict=True)):
        row, column = divmod(index, columns)
        center = first_center + column * cell_width
        top = caption_height + row * cell_height + title_height
        figure.add_image(pixels, center - width / 2, top, width, height)
        if title:
            figure.add_text(center, top - 0.04, title, 11, va="bottom")
    if path:
        figure.save(path)
    return figure


def format_percent(probability: float) -> str:
    """Formats a probability: `73 %`."""
    return f"{100 * probability:.0f} %" if probability >= 0.005 else "< 1 %"


# Many images at once.


def plot_caption_grid(
    images_and_captions: Sequence[tuple[Image.Image, str]], path: Path | str | None = None
) -> NotebookFigure:
    """Plots images, as `thumbnail` makes them, in a grid with their captions below."""
    max_width, max_height, gap, line_height = 2.6, 2.0, 0.2, 0.17  # the first two are of an image
    captions = [wrap_text(text or NO_WORDS, max_width, 10, max_lines=6) for _, text in images_and_captions]
    text_height = 0.12 + line_height * max(map(len, captions))
    cell_width, cell_height = max_width + gap, max_height + text_height + gap
    rows, columns = best_grid(len(captions), cell_width / cell_height)
    figure = NotebookFigure(figsize=(columns * cell_width + gap, rows * cell_height + gap), dpi=DPI)
    for index, ((image, _), lines) in enumerate(zip(images_and_captions, captions, strict=True)):
        row, column = divmod(index, columns)
        left, top = gap + column * cell_width, gap + row * cell_height
        scale = min(max_width / image.width, max_height / image.height)
        width, height = image.width * scale, image.height * scale
        # Centred, and at the bottom of its cell, next to its caption.
        figure.add_image(np.asarray(image), left + (max_width - width) / 2, top + max_height - height, width, height)
        figure.add_text(left + max_width / 2, top + max_height + 0.07, "\n".join(lines), 10)
    if path:
        figure.save(path)
    return figure


# The loss plot.


def plot_history(
    rows: Sequence[dict[str, Any]], best_epoch: int, best_by: str, path: Path | str | None = None
) -> NotebookFigure:
    """Plots training and validation loss and the scores by epoch, and marks the best epoch.

    Another column of the training, `train_*`, is taken for a score and plotted beside CIDEr.

    Args:
        rows: the rows of history.csv, one for each epoch. An epoch without CIDEr has None or an empty field.
        best_epoch: the epoch whose weights are kept. If it has no row, or its row no value, it is not marked.
        best_by: the column by which it is the best, `cider` or `val_loss`.
        path: the file to write, .png, .svg or .pdf.
    """
    epochs = [int(row["epoch"]) for row in rows]
    figure = NotebookFigure(figsize=(7.5, 4.5), dpi=DPI, layout="constrained")
    losses = figure.subplots()
    for name, label in (("train_loss", "training loss"), ("val_loss", "validation loss")):
        if name in rows[0]:
            losses.plot(epochs, _column(rows, name), marker="o", markersize=3.5, label=label)
    losses.set(xlabel="epoch", ylabel="loss (nats per word)", ylim=(0, None))
    losses.xaxis.set_major_locator(MaxNLocator(integer=True))
    losses.grid(alpha=0.25)
    scores = _plot_scores(losses, rows)

    title = f"best: epoch {best_epoch}"
    best = next((row for row in rows if int(row["epoch"]) == best_epoch), None)
    if best and best[best_by] not in MISSING:
        if best_by == "cider":
            title += f", with CIDEr {float(best['cider']):.1f}, BLEU-4 {float(best['bleu4']):.1f}"
        else:
            title += f", with a validation loss of {float(best['val_loss']):.2f}"
        axes = scores if best_by == "cider" else losses
        label = f"best epoch: {best_epoch}"
        axes.plot([best_epoch], [float(best[best_by])], "*", color="tab:red", markersize=14, label=label)
        losses.axvline(best_epoch, color="grey", linestyle=":", linewidth=1)
    losses.set_title(title, fontsize=11, pad=26)
    handles = [handle for axes in figure.axes for handle in axes.get_legend_handles_labels()[0]]
    losses.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=4, frameon=False, fontsize=9)
    if path:
        figure.save(path)
    return figure


def _plot_scores(losses: Axes, rows: Sequence[dict[str, Any]]) -> Axes:
    """Plots CIDEr and the scores of the training on axes of their own; without any, returns those of the losses."""
    train_scores = [name for name in rows[0] if name.startswith("train_") and name not in NO_SCORES]
    labels = {"cider": "CIDEr"} | {name: name.replace("train_", "training ") for name in train_scores}
    scores = np.array([_column(rows, name) for name in labels])
    if np.isnan(scores).all():
        return losses
    axes = losses.twinx()
    epochs = [int(row["epoch"]) for row in rows]
    styles = (("tab:green", "s"), ("tab:olive", "^"), ("tab:brown", "v"))
    for values, label, (color, marker) in zip(scores, labels.values(), styles, strict=False):
        axes.plot(epochs, values, color=color, marker=marker, markersize=3.5, label=label)
    axes.set_ylabel("CIDEr of captions of validation images", color="tab:green")
    axes.tick_params(axis="y", colors="tab:green")
    axes.set_ylim(0, 1.08 * max(np.nanmax(scores), 1e-3))
    return axes


def _column(rows: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [math.nan if row[name] in MISSING else float(row[name]) for row in rows]
