"""Remembers which image file the features in a cache were computed from, so that a changed image gets new ones.

images.jsonl in the cache's folder has a line for every image: its path, the size and the modification time of its
file, and the SHA-256 of its content. Lines are only appended, so that several processes can share a cache; the last
line of an image counts.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from captioning.files import file_sha256

RECORDS_FILE = "images.jsonl"


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
        self._records: dict[str, ImageRecord] = {}
        try:
            lines = self.path.read_bytes().split(b"\n")
        except FileNotFoundError:
            lines = []
        for line in lines:
            try:
                image_path, num_bytes, mtime_ns, sha256 = json.loads(line)
                self._records[str(image_path)] = ImageRecord(int(num_bytes), int(mtime_ns), str(sha256))
            except (ValueError, TypeError):  # damaged, or not written to its end: as if it were not there
                continue

    def find_changed(self, feature_paths: dict[str, Path]) -> list[str]:
        """Returns the images whose file has changed since their features were computed.

        A file that only has another time is read, and is not changed if its content is the same: it may have been
        copied, or downloaded again. An image without a record, in a cache of an earlier version, has changed if it is
        newer than its features. A file that is gone has not changed.

        Args:
            feature_paths: the images, each with the file of its features, which exists.
        """
        changed = []
        for image_path, feature_path in feature_paths.items():
            try:
                stat = os.stat(self.image_dir / image_path)
            except (OSError, ValueError):
                continue
            record = self._records.get(image_path)
            if record is not None and (record.num_bytes, record.mtime_ns) == (stat.st_size, stat.st_mtime_ns):
                continue
            if record is None:
                is_same = stat.st_mtime_ns <= os.stat(feature_path).st_mtime_ns
            else:
                is_same = record.num_bytes == stat.st_size and record.sha256 == file_sha256(self.image_dir / image_path)
            if is_same:
                self.add([image_path])
            else:
                changed.append(image_path)
        return changed

    def add(self, image_paths: Iterable[str]) -> None:
        """Records the files of images as they are now."""
        lines = []
        for image_path in image_paths:
            path = self.image_dir / image_path
            stat = os.stat(path)
            record = ImageRecord(stat.st_size, stat.st_mtime_ns, file_sha256(path))
            if self._records.get(image_path) != record:
                self._records[image_path] = record
                lines.append(json.dumps([image_path, *record]) + "\n")
        if not lines:
            return
        with open(self.path, "ab", buffering=0) as file:  # one write, which other processes cannot come between
            file.write("".join(lines).encode())
