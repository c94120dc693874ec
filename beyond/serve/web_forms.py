"""What a request to caption holds: the image, and how its caption is searched for.

The parameters are those of `DecodeConfig`, by name, in the query of the address or as parts of a form.
"""

import dataclasses
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from typing import Any

from captioning.base.cli import InputError
from captioning.config.options import value_type
from captioning.config.settings import DecodeConfig

FIELDS = {field.name: field for field in dataclasses.fields(DecodeConfig)}
# The largest values that a request may ask for: each takes time and memory that others wait for.
LIMITS = {"beam_size": 20, "captions": 20, "max_words": 100, "min_words": 100}
SAMPLE_ONLY = ("temperature", "top_p", "decode_seed")  # what only captions of random words have
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}
IMAGE_PART = "image"  # the part of a form that holds the image
MAX_PARTS = 1 + len(FIELDS)
MAX_HEADER_BYTES = 4096  # of a part
MAX_VALUE_BYTES = 100  # of a parameter


def parse_query(query: str) -> list[tuple[str, str]]:
    """Parses the query of an address, `a=1&b=2`, as names and values.

    Raises:
        InputError: it is not of this form, or has more values than there are parameters.
    """
    if not query:
        return []
    try:
        return urllib.parse.parse_qsl(query, True, True, errors="replace", max_num_fields=len(FIELDS))
    except ValueError:
        raise InputError(
            f"expected parameters such as beam_size=5&captions=3 after the ?, found {query[:60]!r}"
        ) from None


def header_parameter(value: str, name: str) -> str:
    """Returns a parameter of a header, such as b of `multipart/form-data; boundary="b"`; empty without it.

    Python's parser of mail headers raises several types of errors for damaged ones.
    """
    pairs = re.findall(r';\s*([\w*-]+)\s*=\s*("(?:[^"\\]|\\.)*"|[^;\s]*)', value)
    found = next((text for key, text in pairs if key.lower() == name), "")
    return re.sub(r"\\(.)", r"\1", found[1:-1]) if found.startswith('"') else found


def parse_multipart(boundary: str, body: bytes) -> list[tuple[str, bytes]]:
    r"""Splits a multipart/form-data body into its parts.

    The body is `--boundary`, headers, an empty line, content and `\r\n` for each part, and `--boundary--`.

    Args:
        boundary: what stands between the parts, from the header Content-Type.
        body: the whole body.

    Returns:
        The name and the content of each part.

    Raises:
        InputError: it is not of this form, or has too many parts.
    """
    delimiter = b"\r\n--" + boundary.encode("utf-8", "replace")
    _, *parts = (b"\r\n" + body).split(delimiter, MAX_PARTS + 2)
    if not boundary or not parts:
        raise InputError("expected a form whose parts have the boundary of its Content-Type, found none")
    end = next((index for index, part in enumerate(parts) if part.startswith(b"--")), None)
    if end is None:
        found = f"more than {MAX_PARTS} parts" if len(parts) > MAX_PARTS else "none: it is cut off"
        raise InputError(f"expected a form of at most {MAX_PARTS} parts and its end, found {found}")
    return [_parse_part(part) for part in parts[:end]]


def _parse_part(part: bytes) -> tuple[str, bytes]:
    """Returns the name and the content of a part of a form; raises InputError if it has none."""
    header, separator, content = part.partition(b"\r\n\r\n")
    padding, _, header = header.partition(b"\r\n")
    if not separator or padding.strip(b" \t") or len(header) > MAX_HEADER_BYTES:
        raise InputError(
            f"expected each part of the form to begin with headers of at most {MAX_HEADER_BYTES} bytes and an empty "
            "line, found another"
        )
    disposition = re.search(r"(?im)^content-disposition:(.*(?:\n[ \t].*)*)", header.decode("utf-8", "replace"))
    name = header_parameter(disposition[1], "name") if disposition else ""
    if not name:
        raise InputError('expected a name in each part of the form, such as name="image", found none')
    return name, content


def parse_form(boundary: str, body: bytes) -> tuple[bytes, list[tuple[str, str]]]:
    """Parses a multipart/form-data body.

    Returns:
        The content of its image; and the names and values of its other parts.

    Raises:
        InputError: see `parse_multipart`; or it has no image, or two.
    """
    parts = parse_multipart(boundary, body)
    images = [content for name, content in parts if name == IMAGE_PART]
    if len(images) != 1:
        raise InputError(f"expected one part with the name {IMAGE_PART} in the form, found {len(images)}")
    values = [(name, content) for name, content in parts if name != IMAGE_PART]
    if long := [name for name, content in values if len(content) > MAX_VALUE_BYTES]:
        raise InputError(
            f"{long[0][:60]}: expected at most {MAX_VALUE_BYTES} bytes; the image is the part {IMAGE_PART}"
        )
    return images[0], [(name, content.decode("utf-8", "replace").strip()) for name, content in values]


def parse_decoding(pairs: Iterable[tuple[str, str]], defaults: DecodeConfig) -> DecodeConfig:
    """Makes the settings of a search from the parameters of a request.

    Args:
        pairs: the names and values.
        defaults: the values of those that are not given. A request that changes between searching for the best words
            and drawing random ones takes DecodeConfig's own values for what only the other way has.

    Raises:
        InputError: a parameter is unknown, is given twice, is not what DecodeConfig allows, or exceeds `LIMITS`.
    """
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name not in FIELDS:
            raise InputError(f"{name[:60]!r} is no parameter; expected {', '.join(FIELDS)}")
        if name in given:
            raise InputError(f"{name}: expected one value, found two")
        given[name] = _parse_value(name, text)
    sample = given.get("sample", defaults.sample and "beam_size" not in given)
    base = defaults.to_json()
    if sample != defaults.sample:
        base |= {name: FIELDS[name].default for name in ("beam_size", *SAMPLE_ONLY)}
    config = DecodeConfig(**base | given | {"sample": sample})
    _check_limits(given)
    return config


def _parse_value(name: str, text: str) -> Any:
    """Converts a value to the type of its parameter; returns the text if it is none, which DecodeConfig refuses."""
    kind = value_type(FIELDS[name])
    if kind is bool:
        return BOOLEANS.get(text.lower(), text)
    try:
        return kind(text)
    except ValueError:
        return text


def _check_limits(given: Mapping[str, Any]) -> None:
    """Raises InputError if a request asks for more than `LIMITS`."""
    for name, limit in LIMITS.items():
        if given.get(name, 0) > limit:
            raise InputError(f"{name}: expected at most {limit} of this server, found {given[name]}")
