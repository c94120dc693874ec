"""Remembers which image file the features in a cache were computed from, so that a changed image gets new ones.

images.jsonl in the cache's folder has a line for every image: its path, the size and the modification time of its
file, and the SHA-256 of its content. Lines are only appended, so that several processes can share a cache; the last
line of an image counts.
"""

import json
import os
from pathlib import Path
from typing import NamedTuple

from captioning.base.cli import log, progress_bar
from captioning.base.files import file_sha256
from captioning.images.reading import map_threads

RECORDS_FILE = "images.jsonl"
NUM_PENDING = 64  # images that are hashed ahead
NUM_SHOWN = 1000  # images, of which so many take long enough for a progress bar


class ImageRecord(NamedTuple):
    """An image file, as it was when its features were computed."""

    num_bytes: int
    mtime_ns: int
    sha256: str


class ImageRecords:
    """The records of a cache.

    Args:
        folder: the cache's folder.
        image_dir: the folder of the images.
    """

    def __init__(self, folder: Path, image_dir: Path):
        self.path, self.image_dir = folder / RECORDS_FILE, image_dir
        content = self.path.read_bytes() if self.path.is_file() else b""
        self._line_start = b"\n" if content and not content.endswith(b"\n") else b""  # after a line that was cut off
        self._noted: dict[str, ImageRecord] = {}
        self._records: dict[str, ImageRecord] = {}
        for line in content.split(b"\n"):
            try:
                image_path, num_bytes, mtime_ns, sha256 = json.loads(line)
                self._records[str(image_path)] = ImageRecord(int(num_bytes), int(mtime_ns), str(sha256))
            except (ValueError, TypeError, OverflowError, RecursionError):  # damaged: as if it were not there
                continue

    def find_changed(self, feature_paths: dict[str, Path]) -> list[str]:
        """Returns the images whose file has changed since their features were computed.

        A file that only has another time is read, and is not changed if its content is the same: it may have been
        copied, or downloaded again. An image without a record, in a cache of an earlier version, has changed if it is
        newer than its features. A file that is gone has not changed.

        Args:
            feature_paths: the images, each with the file of its features, which exists.
        """
        changed, unsure = set(), []
        for image_path, feature_path in feature_paths.items():
            try:
                stat = os.stat(os.path.join(self.image_dir, image_path))
            except (OSError, ValueError):
                continue
            record = self._records.get(image_path)
            if record is None and stat.st_mtime_ns > os.stat(feature_path).st_mtime_ns:
                changed.add(image_path)
            elif record is None or (record.num_bytes, record.mtime_ns) != (stat.st_size, stat.st_mtime_ns):
                unsure.append(image_path)
        changed.update(self._compare(unsure))
        return [image_path for image_path in feature_paths if image_path in changed]

    def _compare(self, image_paths: list[str]) -> list[str]:
        """Returns the images whose content is not the one that was recorded, if any, and records the others as now."""
        changed, may_write = [], True
        is_quick = len(image_paths) < NUM_SHOWN
        with progress_bar(total=len(image_paths), desc="comparing", unit="image", disable=is_quick) as progress:
            for image_path, now in map_threads(self._describe, image_paths, NUM_PENDING):
                progress.update()
                record = self._records.get(image_path)
                if now is None or (record is not None and record.sha256 != now.sha256):
                    changed.append(image_path)
                    continue
                try:
                    if may_write:
                        self._append(image_path, now)
                except OSError as error:  # a cache may be read by those who may not write to it
                    may_write = False
                    log(f"{self.path} cannot be written ({error.strerror}): the images will be compared again")
        return changed

    def note(self, image_path: str) -> None:
        """Notes an image's file as it is before it is read, so that what replaces it meanwhile is found next time."""
        if record := self._describe(image_path):
            self._noted[image_path] = record

    def add(self, image_path: str) -> None:
        """Records the file of an image that was noted, after its features have been written."""
        record = self._noted.pop(image_path, None)
        if record and record != self._records.get(image_path):
            self._append(image_path, record)

    def _describe(self, image_path: str) -> ImageRecord | None:
        """Describes an image's file as it is now; returns None if it cannot be read."""
        try:
            stat = os.stat(self.image_dir / image_path)
            return ImageRecord(stat.st_size, stat.st_mtime_ns, file_sha256(self.image_dir / image_path))
        except (OSError, ValueError):  # the latter of a name with a NUL
            return None

    def _append(self, image_path: str, record: ImageRecord) -> None:
        """Appends a record to the file."""
        line = self._line_start + json.dumps([image_path, *record]).encode() + b"\n"
        with open(self.path, "ab", buffering=0) as file:  # one write, which other processes cannot come between
            file.write(line)
        self._line_start = b""
        self._records[image_path] = record
