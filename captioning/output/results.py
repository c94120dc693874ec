"""Where captions go: standard output as text or JSON, a plot for each image, and one plot of all images."""

import errno
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

from PIL import Image
from tqdm import tqdm

from captioning.base.cli import log
from captioning.output.captions import Caption
from captioning.output.plots import MAX_GRID_IMAGES, plot_attention, plot_caption_grid


class CaptionedImage(NamedTuple):
    """An image with its caption."""

    name: str  # its path or address, as it was given
    image: Image.Image | None  # a small copy; None if no output shows it
    caption: Caption
    references: Sequence[str] | None = None  # people's captions, of an image of the dataset


class Writer(Protocol):
    """An output of captions, which takes them as they are generated."""

    shows_images: bool  # whether it needs the images, and not only their captions

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Writes the caption of an image; `plot` is the file with its attention plot, if there is one."""


def write_plot(image: Image.Image, caption: Caption, path: Path) -> bool:
    """Plots the attention for each word into a file.

    Returns:
        False if the file cannot be written, because its name is too long or permission is denied; this is logged.

    Raises:
        OSError: the disk is full.
    """
    try:
        plot_attention(image, caption.words, caption.attention, caption.probabilities, path, caption.text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        log(f"{path}: the plot cannot be written ({error.strerror or error})", error=True)
        return False
    return True


def _print(text: str) -> None:
    """Prints to standard output, above a progress bar if there is one."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


class TextWriter:
    """Prints captions as text, one a line.

    Several captions of an image have their log p and confidence beside them. An image of the dataset is printed as in
    the tutorial, its "Real Caption" and "Prediction Caption" below each other.

    Args:
        show_names: whether each line begins with the name of the image.
    """

    shows_images = False

    def __init__(self, show_names: bool = True):
        self.show_names = show_names

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Prints the caption of an image."""
        captions = (result.caption, *result.caption.alternatives)
        if result.references is not None:
            lines = [f"reference: {text}" for text in result.references]
            lines += [f"predicted: {caption.text}" for caption in captions]
            lines += [f"attention: {plot}"] if plot else []
            _print("\n  ".join([result.name, *lines]))
            return
        prefix = f"{result.name}\t" if self.show_names else ""
        for caption in captions:
            scores = f"\t{caption.log_prob:.2f}\t{caption.confidence:.3f}" if len(captions) > 1 else ""
            _print(prefix + caption.text + scores)


class JsonWriter:
    """Prints captions as JSON, an object for each image, one a line."""

    shows_images = False

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Prints the captions of an image."""
        fields = {"image": result.name, **result.caption.to_json(), "plot": str(plot) if plot else None}
        if result.references is not None:
            fields["references"] = list(result.references)
        _print(json.dumps(fields))


class GridWriter:
    """Draws the first images, at most `MAX_GRID_IMAGES`, with their captions into one plot.

    Args:
        path: the file, whose ending is the format.
    """

    shows_images = True

    def __init__(self, path: Path):
        self.path = path
        self.images_and_captions: list[tuple[Image.Image, str]] = []

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Keeps an image for the plot."""
        if result.image and len(self.images_and_captions) < MAX_GRID_IMAGES:
            self.images_and_captions.append((result.image, result.caption.text))

    def close(self) -> None:
        """Draws the plot, if there are images."""
        if self.images_and_captions:
            plot_caption_grid(self.images_and_captions, self.path)
            log(f"grid: {self.path}")
