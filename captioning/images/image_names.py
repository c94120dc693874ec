"""Finds the files that annotations mean, whose names people write in many ways."""

import functools
import os
import re
import sys
import unicodedata
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath

from captioning.base.cli import log
from captioning.images.reading import is_image_file

# File systems that open a.jpg as A.JPG, too: a name is taken as the folder has it, so that other systems find it.
IGNORES_CASE = sys.platform in ("win32", "darwin")


def clean_name(name: str) -> str:
    r"""Returns a name as a path that leads into the image folder, whatever was written.

    `.\photos\a.jpg`, `/photos/a.jpg`, `C:\photos\a.jpg` and `../photos/a.jpg` all become `photos/a.jpg`.
    """
    parts = re.sub(r"^\s*[A-Za-z]:[\\/]", "", name.strip()).replace("\\", "/").split("/")
    return "/".join(part for part in parts if part not in ("", ".", ".."))


def parse_names(source: str, text: str, is_name: Callable[[str], bool] = os.path.exists) -> list[str]:
    """Returns the names in a list, one a line: without quotes around them, comments after them, and lines of comments.

    A line that is a name as it is stays so. `source` is where the list comes from, for the log.
    """
    lines = [line.strip() for line in re.split("[\r\n]+", text) if line.strip()]
    names = []
    for line in lines:
        if is_name(line):
            names.append(line)
        elif match := re.fullmatch(r"""(["']?)([^#].*?)\1(\s+#.*)?""", line):
            names.append(match[2])
    if num_comments := len(lines) - len(names):
        log(f"{source}: {num_comments:,} lines that begin with # are left out")
    return names


def name_key(name: str) -> str:
    """Returns what names that differ only in case and in Unicode form have in common; macOS decomposes umlauts."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def folders_agree(name: str, other: str) -> bool:
    """Tells whether the folders of one name are the last folders of the other, as of `x/a.jpg` and `y/x/a.jpg`."""
    folders = sorted((f"/{name_key(path)}".rpartition("/")[0] for path in (name, other)), key=len)
    return folders[1].endswith(folders[0])


def walk_files(folder: Path) -> list[str]:
    """Returns the paths of all files inside a folder, sorted; linked folders are followed, each only once."""
    paths: list[str] = []
    seen = {os.path.realpath(folder)}
    for root, folders, names in os.walk(folder, followlinks=True):
        folder_paths = {name: os.path.join(root, name) for name in sorted(folders)}
        folders.clear()
        for name in sorted(folder_paths, key=lambda name: os.path.islink(folder_paths[name])):  # links last
            if (real := os.path.realpath(folder_paths[name])) not in seen:
                seen.add(real)
                folders.append(name)
        inside = Path(os.path.relpath(root, folder)).as_posix()
        paths += [name if inside == "." else f"{inside}/{name}" for name in names]
    return sorted(paths)


class NameIndex:
    """Finds images among known paths, with forward slashes, by names that need not be exact."""

    def __init__(self, paths: Iterable[str]):
        self._paths = set()
        # By their path and by their name alone, each with and without its ending.
        self._by_path: defaultdict[str, list[str]] = defaultdict(list)
        self._by_name: defaultdict[str, list[str]] = defaultdict(list)
        for path in paths:
            self._paths.add(path)
            for known_as in {path, str(PurePosixPath(path).with_suffix(""))}:
                self._by_path[name_key(known_as)].append(path)
                self._by_name[name_key(known_as.rpartition("/")[2])].append(path)

    def find(self, name: str) -> str | None:
        """Returns the one path that a name of `clean_name` means; None if there is none, or several.

        The name may differ in case and Unicode form, have further folders in front, lack folders, or lack its ending.
        """
        if name in self._paths:
            return name
        shorter = _without_folders(name)
        for index, candidates in ((self._by_path, shorter), (self._by_name, shorter[-1:])):
            for candidate in candidates:
                matches = [path for path in index.get(name_key(candidate), []) if folders_agree(name, path)]
                if len(matches) == 1:
                    return matches[0]
        return None


def _without_folders(name: str) -> list[str]:
    """Returns a name, and the name without its first folder, without its first two, and so on."""
    parts = name.split("/")
    return ["/".join(parts[i:]) for i in range(len(parts))]


def find_clash(paths: dict[str, str]) -> tuple[str, str] | None:
    """Finds two names of one file that seem to mean two images, as `train/a.jpg` and `val/a.jpg` do.

    Args:
        paths: the file of each name.

    Returns:
        The two names, or None. The folders of one must be the last folders of the other.
    """
    names_of: defaultdict[str, dict[str, str]] = defaultdict(dict)  # by file, then by folder
    for name, path in paths.items():
        if clash := next((other for other in names_of[path].values() if not folders_agree(name, other)), None):
            return clash, name
        names_of[path].setdefault(name_key(name).rpartition("/")[0], name)
    return None


def find_images(folder: Path, names: Iterable[str]) -> tuple[dict[str, str], list[str]]:
    """Finds the files of images; the folder is searched only if a file does not have the name itself.

    Returns:
        The path inside the folder for every name; and the names for which there is no file, or not one only, which
        stay as they are.
    """

    @functools.cache
    def index() -> NameIndex:
        return NameIndex(filter(is_image_file, walk_files(folder)))

    @functools.cache
    def names_in(folder: Path) -> frozenset[str]:
        return frozenset(os.listdir(folder))

    def is_file(name: str) -> bool:
        try:
            if not (folder / name).is_file():
                return False
            parts = name.split("/") if IGNORES_CASE else []
            return all(part in names_in(folder.joinpath(*parts[:i])) for i, part in enumerate(parts))
        except (OSError, ValueError):  # the name is too long, or contains a NUL
            return False

    paths, missing = {}, []
    for name in names:
        found = next(filter(is_file, _without_folders(name)), None) or index().find(name)
        if found is None:
            missing.append(name)
        paths[name] = found or name
    return paths, missing
