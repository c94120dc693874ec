"""Where captions go: standard output as text or JSON, a CSV table, a plot for each image, and one plot of all."""

import csv
import errno
import io
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from PIL import Image

from captioning.base.cli import InputError, log, name_in_errors, print_results
from captioning.base.files import atomic_write, file_sha256, read_json, try_lock, write_json
from captioning.config.settings import DecodeConfig
from captioning.images.image_args import image_key, is_url
from captioning.images.image_records import ImageRecords
from captioning.output.captions import Caption
from captioning.output.plots import MAX_GRID_IMAGES, plot_attention, plot_caption_grid
from captioning.runs.run_folder import best_checkpoint

COLUMNS = ("image", "rank", "caption", "confidence", "log_prob", "finished")  # of the CSV table
ERRORS = "surrogateescape"  # a name on the disk need not be Unicode


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
        False if the file cannot be written there, which is logged; a full disk is an OSError.
    """
    try:
        plot_attention(image, caption.words, caption.attention, caption.probabilities, path, caption.text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        log(f"{path}: the plot cannot be written ({error.strerror or error})", error=True)
        return False
    return True


class TextWriter:
    """Prints captions as text, one a line.

    Several captions of an image have their log p and confidence beside them, and their consensus if that chose. An
    image of the dataset is printed as in the tutorial, its "Real Caption" and "Prediction Caption" below each other.

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
            print_results(result.name, *(f"  {line}" for line in lines), sep="\n")
            return
        for caption in captions:
            name = [result.name] if self.show_names else []
            scores = [f"{caption.log_prob:.2f}", f"{caption.confidence:.3f}"]
            scores += [] if caption.consensus is None else [f"{caption.consensus:.1f}"]
            print_results(*name, caption.text, *(scores if len(captions) > 1 else ()), sep="\t")


class JsonWriter:
    """Prints captions as JSON, an object for each image, one a line."""

    shows_images = False

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Prints the captions of an image."""
        fields = {"image": result.name, **result.caption.to_json(), "plot": str(plot) if plot else None}
        if result.references is not None:
            fields["references"] = list(result.references)
        print_results(json.dumps(fields))


class GridWriter:
    """Draws the first images, at most `MAX_GRID_IMAGES`, with their captions into one plot."""

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


class CsvWriter:
    """A CSV table that grows while images are captioned, with a row for every caption; an interrupted command resumes.

    `<file>.settings.json` records which weights and which search made the captions, so that others are never mixed
    with them; `<file>.images.jsonl`, of which files they are, so that an image that was replaced is captioned again.

    Args:
        path: the file; the rows that are in it already are kept.
        run: the run folder whose weights make the captions.
        config: how captions are searched for.
        images: the images of the command.

    Attributes:
        done: the images that were in the file already, by `image_key`.

    Raises:
        InputError: the file was made with other settings or by another program, or another process writes into it.
    """

    shows_images = False

    def __init__(self, path: Path, run: Path, config: DecodeConfig, images: Iterable[str]):
        self.path = path
        self._keys = set(map(image_key, images))
        self._records = ImageRecords(path.parent, Path(), f"{path.name}.images.jsonl")
        weights_sha256 = file_sha256(f"{best_checkpoint(run)}.index")  # the index holds a checksum of every weight
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = self._open()
        try:
            self.done = self._resume({"weights_sha256": weights_sha256, **config.to_json()})
        except BaseException:
            self._file.close()
            raise

    def note(self, image: str) -> None:
        """Notes the file of an image before it is read: if it is replaced meanwhile, its caption is the old one's."""
        if not is_url(image):
            self._records.note(image)

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Adds the captions of an image, all at once."""
        rows = []
        for rank, caption in enumerate((result.caption, *result.caption.alternatives), start=1):
            confidence, log_prob = f"{caption.confidence:.4f}", f"{caption.log_prob:.3f}"
            rows.append((result.name, rank, caption.text, confidence, log_prob, str(caption.finished).lower()))
        with name_in_errors(self.path):
            self._records.add(result.name)
            self._file.write(_csv_bytes(rows))
            self._file.flush()

    def close(self) -> None:
        """Closes the file. All rows are on the disk already."""
        self._file.close()

    def _open(self) -> IO[bytes]:
        """Opens the file and locks it."""
        if self.path.exists() and not self.path.is_file():  # a device could be read without an end
            raise InputError(f"--csv {self.path}: expected a file, found a folder or a device")
        file = open(self.path, "ab+")
        if not try_lock(file):
            file.close()
            raise InputError(f"--csv {self.path}: another process writes into it; choose another file")
        return file

    def _resume(self, settings: dict[str, Any]) -> set[str]:
        """Checks the rows of the file, cuts off an unfinished end, and returns the images before it."""
        settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self._file.seek(0)
        content = self._file.read()
        header = _csv_bytes([COLUMNS])
        if header.startswith(content):  # it is new, or the command was stopped before the first line was complete
            self._file.truncate(0)
            write_json(settings_path, settings)
            self._file.write(header)
            self._file.flush()
            return set()
        refusal = InputError(
            f"--csv {self.path}: expected a table that this command began, with the columns {','.join(COLUMNS)}; "
            "choose another file"
        )
        if not content.startswith(header):
            raise refusal
        saved = read_json(settings_path) if settings_path.exists() else None
        # Settings that an earlier version did not have yet are those of today's defaults.
        if not isinstance(saved, dict) or DecodeConfig().to_json() | saved != settings:
            found = "by another program" if saved is None else f"with other settings ({saved})"
            raise InputError(f"--csv {self.path}: was made {found}, expected {settings}; choose another file")
        whole_lines = content[len(header) : content.rfind(b"\n") + 1]  # it may have stopped in the middle of a line
        try:
            rows = list(csv.reader(io.StringIO(whole_lines.decode(errors=ERRORS), newline="")))
        except csv.Error:
            raise refusal from None
        if rows and len(rows[-1]) < len(COLUMNS):  # or inside a name with a line break
            rows.pop()
        if any(len(row) != len(COLUMNS) for row in rows) or not content.startswith(header + _csv_bytes(rows)):
            raise refusal
        num_last = sum(row[0] == rows[-1][0] for row in rows[-settings["captions"] :])
        if num_last < settings["captions"]:  # not all were written, or a small vocabulary has no more: captioned again
            rows = rows[: len(rows) - num_last]
        names = dict.fromkeys(row[0] for row in rows)
        files = [name for name in names if image_key(name) in self._keys and not is_url(name)]
        if changed := set(self._records.find_changed(files)):
            reason = "have changed, or their files are not recorded"
            log(f"{self.path}: {len(changed):,} images {reason}; captioned again, the first: {min(changed)!r}")
            rows = [row for row in rows if row[0] not in changed]
            self._file.close()  # Windows replaces no open file
            with atomic_write(self.path, "wb") as file:
                file.write(header + _csv_bytes(rows))
            self._file = self._open()
        self._file.truncate(len(header + _csv_bytes(rows)))
        return {image_key(row[0]) for row in rows}


def _csv_bytes(rows: Iterable[Iterable[Any]]) -> bytes:
    text = io.StringIO()
    for row in map(list, rows):  # a reader takes a bare \r for the end of a row, which the writer does not quote
        needs_quotes = any("\r" in str(cell) for cell in row)
        options: dict[str, Any] = {"quoting": csv.QUOTE_ALL} if needs_quotes else {}
        csv.writer(text, lineterminator="\n", **options).writerow(row)
    return text.getvalue().encode(errors=ERRORS)
