"""Damages files: cuts them, flips their bits, recodes text, and replaces every field of JSON. All is seeded.

A damage is a description and the content of the file.
"""

import copy
import functools
import io
import json
import math
import re
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

WRONG_VALUES = (None, -1, 10**30, math.nan, "text", [])


def cut_and_flip(content, count):
    """Yields nothing, beginnings of a file, and the file with some bits flipped."""
    rng = np.random.default_rng(0)
    yield "empty", b""
    for _ in range(count):
        size = int(rng.integers(1, len(content) - 2))
        yield f"cut to {size} bytes", content[:size]
        flipped = bytearray(content)
        bits = rng.integers(0, 8 * len(content), rng.integers(1, 5)).tolist()
        for bit in bits:
            flipped[bit // 8] ^= 1 << bit % 8
        yield f"bits {bits} flipped", bytes(flipped)


# Text and JSON.


def damage_text(path):
    """Yields all damages of a text file: other encodings, too, and what is no text of this format."""
    content = Path(path).read_bytes()
    yield from cut_and_flip(content, 2)
    for encoding in ("utf-16-le", "cp037"):
        yield encoding, content.decode("utf-8-sig", "replace").encode(encoding, "replace")
    yield "Latin-1", content + "café".encode("latin-1")
    yield "brackets", b"[" * 100_000
    yield "zeros", bytes(1000)


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
            if value == "deleted":
                del parent[last]
            else:
                parent[last] = value
            yield f"{name} {str(value)[:10]}", json.dumps(edited).encode()


# Images.


def damage_images():
    """Yields the names and contents of damaged JPEGs and PNGs; those whose metadata alone are damaged can be read."""
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
        for number, (_, damaged) in enumerate(cut_and_flip(content, 6)):
            yield f"{number}_{name}", damaged
        yield from damage_jpeg(name, content) if name.endswith(".jpg") else damage_png(name, content)
    yield "text.jpg", b"no image"
    yield "page.png", b"<html>404</html>"


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
    content, features = path.read_bytes(), np.load(path)
    yield "empty", b""
    yield "cut", content[:1000]
    yield "zeros", bytes(len(content))
    for description, array in {
        "transposed": features.T,
        "half as many": features[:32].astype(np.float32),
        "big-endian": features.astype(">f2"),
        "pickled, as large": np.array([["p" * (len(content) - 325)]], object),
        "a number": np.array(1.0),
    }.items():
        file = io.BytesIO()
        np.save(file, array)
        yield description, file.getvalue()
