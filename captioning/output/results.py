"""Where captions go: standard output, a CSV file, a page, a grid of images, and a plot for each image."""

import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from beyond.report.report import ReportWriter
from captioning.base.cli import log
from captioning.output.captions import Caption
from captioning.output.plots import MAX_GRID_IMAGES, plot_attention, plot_caption_grid
from captioning.output.results_csv import ResultsCsv


class CaptionedImage(NamedTuple):
    """An image with its caption."""

    name: str  # its path or address, as it was given
    image: Image.Image | None  # a small copy; None if no output shows it
    caption: Caption
    references: Sequence[str] | None = None  # people's captions, of an image of the dataset


def write_plot(image: Image.Image, caption: Caption, path: Path) -> bool:
    """Plots the attention for each word into a file.

    Returns:
        False if it cannot be written there, which is logged: its name is too long, or nothing may be written there.

    Raises:
        OSError: the disk is full.
    """
    try:
        words, attention = caption.words, caption.attention
        plot_attention(image, words, attention, caption.probabilities, path, caption.text, caption.gates)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        log(f"{path}: the plot cannot be written ({error.strerror or error})", error=True)
        return False
    return True


class ResultWriter:
    """Writes captions as they come, in every form that was asked for.

    Args:
        as_json: whether standard output gets a JSON object for each image, one a line, instead of text.
        show_names: whether each line of text begins with the name of the image.
        grid: the file for one plot of all images; None for none.
        table: the CSV file; nothing is printed if there is one, unless `as_json`.
        report: the page.
    """

    def __init__(
        self,
        as_json: bool = False,
        show_names: bool = True,
        grid: Path | None = None,
        table: ResultsCsv | None = None,
        report: ReportWriter | None = None,
    ):
        self.as_json, self.show_names, self.grid = as_json, show_names, grid
        self.table, self.report = table, report
        self.images_and_captions: list[tuple[Image.Image, str]] = []  # for the grid

    @property
    def shows_images(self) -> bool:
        """Whether the images themselves are needed, and not only their captions."""
        return bool(self.grid or self.report)

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Writes the caption of an image; its plot, if there is one, comes first, so that JSON can name it."""
        name, image, caption, references = result
        plot = plot if plot and image and write_plot(image, caption, plot) else None
        if self.as_json:
            fields = {"references": list(references)} if references is not None else {}
            self._print(json.dumps({"image": name, **caption.to_json(), "plot": plot and str(plot), **fields}))
        elif self.table is None:
            self._print(self._to_text(result, plot))
        if self.table:
            self.table.write(name, caption)
        if self.report and image:
            self.report.add(image, name, caption.to_json(with_attention=True), references or ())
        if self.grid and image and len(self.images_and_captions) < MAX_GRID_IMAGES:
            self.images_and_captions.append((image, caption.text))
        if plot and references is None:
            log(f"attention: {plot}")

    def _to_text(self, result: CaptionedImage, plot: Path | None) -> str:
        """Returns the lines that standard output gets: the caption, or several with log p and confidence."""
        name, _, caption, references = result
        if references is not None:  # the tutorial's "Real Caption" and "Prediction Caption"
            captions = (caption, *caption.alternatives)
            lines = [*(f"reference: {text}" for text in references), *(f"predicted: {each.text}" for each in captions)]
            lines += [f"attention: {plot}"] if plot else []
            return "\n".join([name, *(f"  {line}" for line in lines)])
        prefix = f"{name}\t" if self.show_names else ""
        if not caption.alternatives:
            return prefix + caption.text
        captions = (caption, *caption.alternatives)
        return "\n".join(f"{prefix}{each.text}\t{each.log_prob:.2f}\t{each.confidence:.3f}" for each in captions)

    @staticmethod
    def _print(text: str) -> None:
        tqdm.write(text, file=sys.stdout)  # above a progress bar, if there is one
        sys.stdout.flush()

    def write_grid(self) -> None:
        """Writes the grid, if it was asked for and there are images."""
        if self.grid and self.images_and_captions:
            plot_caption_grid(self.images_and_captions, self.grid)
            log(f"grid: {self.grid}")
