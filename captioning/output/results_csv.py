"""A CSV file of captions that grows while images are captioned; an interrupted command resumes it."""

import csv
import io
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from captioning.base.cli import InputError
from captioning.base.files import file_sha256, read_json, try_lock, write_json
from captioning.config.settings import DecodeConfig
from captioning.output.results import CaptionedImage
from captioning.runs.run_folder import best_checkpoint

COLUMNS = ("image", "rank", "caption", "confidence", "log_prob", "finished")
ERRORS = "surrogateescape"  # a name on the disk need not be Unicode


class ResultsCsv:
    """A table with a row for every caption: the image, the rank among its captions, the text and how sure it is.

    `<file>.settings.json` records which weights and which search made the captions, so that others are never mixed
    with them.

    Args:
        path: the file; the rows that are in it already are kept.
        run: the run folder whose weights make the captions.
        config: how captions are searched for.

    Attributes:
        done: the images that were in the file already.

    Raises:
        InputError: the file was made with other settings or by another program, or another process writes into it.
    """

    shows_images = False

    def __init__(self, path: Path, run: Path, config: DecodeConfig):
        self.path = path
        weights_sha256 = file_sha256(f"{best_checkpoint(run)}.index")  # the index holds a checksum of every weight
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+")
        try:
            if not try_lock(self._file):
                raise InputError(f"--csv {path}: another process writes into it; choose another file")
            self.done = self._resume({"weights_sha256": weights_sha256, **config.to_json()})
        except BaseException:
            self._file.close()
            raise

    def write(self, result: CaptionedImage, plot: Path | None = None) -> None:
        """Adds the captions of an image, all at once."""
        rows = []
        for rank, caption in enumerate((result.caption, *result.caption.alternatives), start=1):
            confidence, log_prob = f"{caption.confidence:.4f}", f"{caption.log_prob:.3f}"
            rows.append((result.name, rank, caption.text, confidence, log_prob, str(caption.finished).lower()))
        self._write(rows)

    def close(self) -> None:
        """Closes the file. All rows are on the disk already."""
        self._file.close()

    def _write(self, rows: Iterable[Iterable[Any]]) -> None:
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(rows)
        self._file.write(text.getvalue().encode(errors=ERRORS))
        self._file.flush()

    def _resume(self, settings: dict[str, Any]) -> set[str]:
        """Checks the rows of the file, cuts off an unfinished end, and returns the images before it."""
        settings_path = self.path.with_name(f"{self.path.name}.settings.json")
        self._file.seek(0)
        content = self._file.read()
        lines = content.splitlines(keepends=True)
        if ",".join(COLUMNS).encode().startswith(content):  # it is new, or stopped before its first line was complete
            self._file.truncate(0)
            write_json(settings_path, settings)
            self._write([COLUMNS])
            return set()
        if not content.endswith(b"\n"):
            lines.pop()  # the command was stopped in the middle of a line
        images, ends = self._read_images(lines)
        if not settings_path.exists() or (saved := read_json(settings_path)) != settings:
            found = "by another program" if not settings_path.exists() else f"with other settings ({saved})"
            raise InputError(f"--csv {self.path}: was made {found}, expected {settings}; choose another file")
        last = next((len(list(rows)) for _, rows in itertools.groupby(reversed(images))), 0)
        if last < settings["captions"]:  # not all were written, or a small vocabulary has no more: captioned again
            images = images[: len(images) - last]
        self._file.truncate(sum(map(len, lines[: ends[len(images)]])))
        return set(images)

    def _read_images(self, lines: list[bytes]) -> tuple[list[str], list[int]]:
        """Returns the image of each row below the header, and the number of lines up to the end of every row."""
        reader = csv.reader(line.decode(errors=ERRORS) for line in lines)
        rows, ends = [], []
        try:
            for row in reader:
                rows.append(row)
                ends.append(reader.line_num)
        except csv.Error:
            rows = []
        if len(rows) > 1 and len(rows[-1]) < len(COLUMNS):  # it was cut off inside a name with a line break
            rows.pop()
        # Spreadsheet programs write a byte order mark.
        header = [name.lstrip("\ufeff") for name in rows[0]] if rows else []
        if tuple(header) != COLUMNS or any(len(row) != len(COLUMNS) for row in rows):
            expected = ",".join(COLUMNS)
            raise InputError(f"--csv {self.path}: expected the columns {expected}; choose another file")
        return [row[0] for row in rows[1:]], ends
