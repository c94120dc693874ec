"""Downloads and archives: whole, checked, and never outside their folder."""

import hashlib
import http.client
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib
from pathlib import Path

from common import InputError, atomic_write, progress_bar


def download(url: str, path: Path, size: int | None = None, md5: str | None = None, quiet: bool = False) -> Path:
    """Downloads to `path` unless it is there; the file appears only when it is whole.

    Raises:
        InputError: the download failed, or size or MD5 are not those expected. Names the address and the folder.
    """
    if path.exists():
        return path
    by_hand = f"run the same command again, or download {url} yourself and put it into {path.parent}/ as {path.name}"
    digest, received = hashlib.md5(usedforsecurity=False), 0
    try:
        with urllib.request.urlopen(url, timeout=60) as response, atomic_write(path, "wb") as file:
            total = size or int(response.headers.get("Content-Length") or 0) or None
            with progress_bar(total=total, unit="B", unit_scale=True, desc=path.name, disable=quiet) as bar:
                while block := response.read(1 << 20):
                    file.write(block)
                    digest.update(block)
                    received += len(block)
                    bar.update(len(block))
            if total and received != total:
                raise InputError(f"{path.name}: expected {total:,} bytes, received {received:,}; {by_hand}")
            if md5 and digest.hexdigest() != md5:
                raise InputError(f"{path.name}: expected MD5 {md5}, found {digest.hexdigest()}; {by_hand}")
    except (urllib.error.URLError, http.client.HTTPException, TimeoutError, ConnectionError) as error:
        raise InputError(
            f"{path.name} cannot be downloaded from {url} ({getattr(error, 'reason', error)}); {by_hand}"
        ) from None
    return path


def unpack(archive: Path, folder: Path, suffixes: tuple[str, ...]) -> None:
    """Unpacks an archive's files with these endings into `folder`, skipping what is there.

    Raises:
        InputError: it is no zip, is damaged, or a name in it leads out of the folder.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            members = [m for m in content.infolist() if m.filename.endswith(suffixes) and "__MACOSX" not in m.filename]
            for member in progress_bar(members, desc=f"unpacking {archive.name}", unit="file"):
                target = folder / member.filename
                if not target.resolve().is_relative_to(folder.resolve()):
                    raise InputError(f"{archive}: {member.filename!r} would be written outside {folder}; not unpacked")
                if not (target.exists() and target.stat().st_size == member.file_size):
                    with content.open(member) as source, atomic_write(target, "wb") as file:
                        shutil.copyfileobj(source, file, 1 << 20)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
        raise InputError(f"{archive}: damaged ({error}); delete it and run the same command again") from None
