"""Damages files: cuts them, flips their bits, recodes text, and replaces every field of JSON. All is seeded."""

import copy
import functools
import io
import json
import math
import re
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

WRONG_VALUES = (None, True, -1, 10**30, math.nan, "text", [])


class Damage(NamedTuple):
    """A damaged file."""

    description: str
    content: bytes
    plausible: bool = False  # whether it may pass for good: a bit of a caption, or a number that could be


# Files of any kind.


def cut_and_flip(content, count, is_text=False):
    """Yields nothing, beginnings of a file, and the file with some bits flipped.

    The beginning of a text file may pass for good, since it can end with a line.
    """
    rng = np.random.default_rng(0)
    yield Damage("empty", b"")
    for _ in range(count):
        size = int(rng.integers(1, len(content) - 2))
        yield Damage(f"cut to {size} bytes", content[:size], plausible=is_text)
        flipped = bytearray(content)
        bits = rng.integers(0, 8 * len(content), rng.integers(1, 5)).tolist()
        for bit in bits:
            flipped[bit // 8] ^= 1 << bit % 8
        yield Damage(f"bits {bits} flipped", bytes(flipped), plausible=True)


# Text and JSON.


def damage_text(path, count=2, is_text=False):
    """Returns all damages of a text file: other encodings, too, and what is no text of this format."""
    content = Path(path).read_bytes()
    damages = list(cut_and_flip(content, count, is_text))
    for encoding in ("utf-16-le", "cp037"):
        damages.append(Damage(encoding, content.decode().encode(encoding)))
    damages.append(Damage("Latin-1", content + "café".encode("latin-1")))
    damages.append(Damage("brackets", b"[" * 100_000))
    damages.append(Damage("zeros", bytes(1000)))
    return damages


def field_paths(content, path=()):
    """Yields the keys that lead to every field of JSON; of a list, to its first item."""
    if isinstance(content, dict | list) and content:
        for key in content if isinstance(content, dict) else [0]:
            yield (*path, key)
            yield from field_paths(content[key], (*path, key))


def edit_json(path, values=WRONG_VALUES):
    """Yields JSON with each of its fields replaced by each wrong value, and deleted."""
    content = json.loads(Path(path).read_text())
    for *parents, last in field_paths(content):
        name = ".".join(map(str, (*parents, last)))
        for value in (*values, "deleted"):
            edited = copy.deepcopy(content)
            parent = functools.reduce(lambda inner, key: inner[key], parents, edited)
            plausible = type(value) is type(parent[last]) in (int, str)
            if value == "deleted":
                del parent[last]
                plausible = last == 0  # one row fewer
            else:
                parent[last] = value
            yield Damage(f"{name} {str(value)[:10]}", json.dumps(edited).encode(), plausible)


# Images.


def damage_images():
    """Yields damaged JPEGs and PNGs, with their names; those whose metadata alone are damaged can be read."""
    rng = np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (48, 64, 3), dtype=np.uint8))
    for name, mode, settings in (
        ("a.jpg", "RGB", {}),
        ("progressive.jpg", "RGB", {"progressive": True}),
        ("b.png", "RGB", {}),
        ("palette.png", "P", {}),
    ):
        file = io.BytesIO()
        image.convert(mode).save(file, "JPEG" if "jpg" in name else "PNG", **settings)
        content = file.getvalue()
        for number, damage in enumerate(cut_and_flip(content, 4)):
            yield f"{number}_{name}", damage.content
        for number in range(3):  # in the header, which holds the size and the mode
            flipped = bytearray(content)
            flipped[int(rng.integers(8, 40))] ^= 1 << int(rng.integers(8))
            yield f"header_{number}_{name}", bytes(flipped)
        yield from damage_jpeg(name, content) if name.endswith(".jpg") else damage_png(name, content)
    yield "text.jpg", b"no image"
    yield "page.png", b"<html>404</html>"
    yield "program.png", b"\x7fELF" + bytes(99)


def damage_jpeg(name, content):
    """Yields a JPEG whose header claims the largest size, and with metadata that are noise, with names."""
    position = re.search(b"\xff[\xc0\xc2]\x00\x11\x08", content).end()
    yield f"size_65535_{name}", content[:position] + b"\xff" * 4 + content[position + 4 :]
    noise = np.random.default_rng(0).bytes(50)
    for marker, start in ((b"\xff\xe1", b"Exif\x00\x00MM\x00*"), (b"\xff\xe2", b"MPF\x00"), (b"\xff\xed", b"8BIM")):
        segment = start + noise
        length = (len(segment) + 2).to_bytes(2)
        yield f"metadata_{marker[1]}_{name}", content[:2] + marker + length + segment + content[2:]


def damage_png(name, content):
    """Yields a PNG whose header claims other sizes, with a CRC that fits, and with metadata that are noise."""
    for size in (70_000, 2**31 - 1, 0):
        header = content[12:16] + size.to_bytes(4) * 2 + content[24:29]
        yield f"size_{size}_{name}", content[:12] + header + zlib.crc32(header).to_bytes(4) + content[33:]
    noise = np.random.default_rng(0).bytes(50)
    for kind in (b"eXIf", b"zTXt", b"iCCP", b"acTL"):
        chunk = len(noise).to_bytes(4) + kind + noise + zlib.crc32(kind + noise).to_bytes(4)
        yield f"metadata_{kind.decode()}_{name}", content[:33] + chunk + content[33:]


# Features.


def damage_features(path):
    """Yields files that are not the features of an image, some of them of the same size."""
    content = path.read_bytes()
    yield from (damage for damage in cut_and_flip(content, 3) if "flipped" not in damage.description)
    for position in range(0, 128, 32):  # in the header
        flipped = content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
        yield Damage(f"byte {position} flipped", flipped)
    features = np.load(path)
    for description, array in {
        "transposed": features.T,
        "half as many": features[:32].astype(np.float32),
        "big-endian": features.astype(">f2"),
        "pickled, as large": np.array([["p" * (len(content) - 325)]], object),
        "a number": np.array(1.0),
        "none": features[:0],
    }.items():
        file = io.BytesIO()
        np.save(file, array)
        yield Damage(description, file.getvalue())
    yield Damage("zeros", bytes(len(content)))
