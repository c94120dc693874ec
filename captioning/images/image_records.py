"""Tells image files apart by their content: those of a cache that have changed, and copies of the same image.

A cache remembers which image file its features were computed from, so that a changed image gets new ones.

images.jsonl in the cache's folder has a line for every image: its path, the size and the modification time of its
file, the SHA-256 of its content, and the CRC-32 of the file of its features. Lines are only appended, so that several
processes can share a cache; the last line of an image counts.
"""

import hashlib
import json
import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from captioning.base.cli import log, name_in_errors, progress_bar
from captioning.base.files import file_sha256
from captioning.images.reading import map_threads

RECORDS_FILE = "images.jsonl"
NUM_PENDING = 64  # images that are hashed ahead
NUM_FIRST_BYTES = 4096  # of a file, which are compared before all of it is read
NUM_SHOWN = 1000  # images, of which so many take long enough for a progress bar


class ImageRecord(NamedTuple):
    """An image file, as it was when its features were computed."""

    num_bytes: int
    mtime_ns: int
    sha256: str
    features_crc32: int | None = None  # not known of features that version 1.0 wrote


class ImageRecords:
    """The records of a cache.

    Args:
        folder: the cache's folder.
        image_dir: the folder of the images.
        name: of the file of records.
    """

    def __init__(self, folder: Path, image_dir: Path, name: str = RECORDS_FILE):
        self.path = folder / name
        self.image_dir = image_dir
        self._noted: dict[str, ImageRecord] = {}
        self._records: dict[str, ImageRecord] = {}
        for line in self.path.read_bytes().split(b"\n") if self.path.is_file() else ():
            try:
                image_path, *record = json.loads(line)
                self._records[image_path] = ImageRecord(*record)
            except (ValueError, TypeError):  # empty, cut off or damaged: as if it were not there
                continue

    def find_changed(self, image_paths: Iterable[str]) -> list[str]:
        """Returns the images whose file is not the one that was recorded; one that is gone has not changed.

        A file that only has another time is read, and is not changed if its content is the same: it may have been
        copied, or downloaded again.
        """
        changed, unsure = [], []
        for image_path in image_paths:
            try:
                stat = os.stat(self.image_dir / image_path)
            except (OSError, ValueError):  # the latter of a name with a NUL
                continue
            record = self._records.get(image_path)
            if record is None or record.num_bytes != stat.st_size:
                changed.append(image_path)
            elif record.mtime_ns != stat.st_mtime_ns:
                unsure.append(image_path)
        return changed + self._compare(unsure)

    def _compare(self, image_paths: list[str]) -> list[str]:
        """Returns the images whose content is not the one that was recorded, and records the others as they are now."""
        changed, same = [], {}
        is_quick = len(image_paths) < NUM_SHOWN
        with progress_bar(total=len(image_paths), desc="comparing", unit="image", disable=is_quick) as progress:
            for image_path, now in map_threads(self._describe, image_paths, NUM_PENDING):
                progress.update()
                if now and now.sha256 == self._records[image_path].sha256:
                    same[image_path] = now._replace(features_crc32=self.checksum(image_path))
                else:
                    changed.append(image_path)
        try:
            self._append(same)
        except OSError as error:  # a cache may be read by those who may not write to it
            log(f"{self.path} cannot be written ({error.strerror}): the images will be compared again")
        return changed

    def note(self, image_path: str) -> bool:
        """Notes an image's file as it is before it is read, so that what replaces it meanwhile is found next time.

        Returns False if it cannot be read.
        """
        if record := self._describe(image_path):
            self._noted[image_path] = record
        return record is not None

    def add(self, image_path: str, features_crc32: int | None = None) -> None:
        """Records the file of an image that was noted, after its features have been written.

        One that could not be read when it was to be noted has no record, as if it had changed.
        """
        noted = self._noted.pop(image_path, None)
        record = noted and noted._replace(features_crc32=features_crc32)
        if record and record != self._records.get(image_path):
            self._append({image_path: record})

    def checksum(self, image_path: str) -> int | None:
        """Returns the CRC-32 of the file of an image's features as it was written; None if it is not known."""
        record = self._records.get(image_path)
        return record and record.features_crc32

    def _describe(self, image_path: str) -> ImageRecord | None:
        """Describes an image's file as it is now; returns None if it cannot be read."""
        try:
            stat = os.stat(self.image_dir / image_path)
            return ImageRecord(stat.st_size, stat.st_mtime_ns, file_sha256(self.image_dir / image_path))
        except (OSError, ValueError):
            return None

    def _append(self, records: dict[str, ImageRecord]) -> None:
        """Appends records to the file, each after a line end: the last line may have been cut off."""
        if lines := "".join(f"\n{json.dumps([image_path, *record])}" for image_path, record in records.items()):
            # One write, which other processes cannot come between.
            with name_in_errors(self.path), open(self.path, "ab", buffering=0) as file:
                file.write(lines.encode())
            self._records.update(records)


def find_copies(image_dir: Path, image_paths: Iterable[str]) -> list[list[str]]:
    """Finds images whose files have the same content; files that cannot be read, or are empty, are like no other.

    Returns:
        The images of each content that several have, in the order of `image_paths`.
    """
    groups = [list(image_paths)]
    # Few files have the size of another one, and few of those begin alike: of 80,000 images hardly one is read in full.
    for describe in (_file_size, _hash_beginning, file_sha256):
        alike: defaultdict[tuple[int, Any], list[str]] = defaultdict(list)
        for number, group in enumerate(groups):
            for image_path in group:
                try:
                    alike[number, describe(image_dir / image_path)].append(image_path)
                except (OSError, ValueError):
                    continue
        groups = [group for group in alike.values() if len(group) > 1]
    return groups


def _file_size(path: Path) -> int:
    """Returns the bytes of a file; raises ValueError if it has none."""
    if not (size := path.stat().st_size):
        raise ValueError("empty")
    return size


def _hash_beginning(path: Path) -> bytes:
    """Returns a hash of the first bytes of a file."""
    with open(path, "rb") as file:
        return hashlib.sha256(file.read(NUM_FIRST_BYTES)).digest()
