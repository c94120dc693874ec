"""Where the server listens, what it allows, and how a request says which captions it wants.

This module needs neither Werkzeug nor waitress, so that `--help` works without them.
"""

import dataclasses
import re
from collections.abc import Iterable
from typing import Any

from captioning.base.cli import InputError
from captioning.config.options import Settings, option, value_type
from captioning.config.settings import DecodeConfig

FIELDS = {field.name: field for field in dataclasses.fields(DecodeConfig)}
# The largest values that a request may ask for: each takes time and memory that others wait for.
LIMITS = {"beam_size": 20, "captions": 20, "max_words": 100, "min_words": 100}
SAMPLE_ONLY = ("temperature", "top_p", "decode_seed")  # what only captions of random words have
BOOLEANS = {"true": True, "1": True, "false": False, "0": False}


@dataclasses.dataclass(frozen=True)
class ServerConfig(Settings):
    """Where the server listens, and what a client may ask of it."""

    host: str = option(
        "127.0.0.1",
        "address to listen on; any other than the default lets other machines in, such as 0.0.0.0",
        metavar="ADDRESS",
    )
    port: int = option(8000, "port to listen on; 0: one that is free", bounds="[0, 65535]")
    trusted_hosts: str | None = option(
        None,
        "names under which a proxy shows the page, such as hub.example.com; .example.com trusts all names below it",
        metavar="HOST,...",
    )
    max_mb: int = option(20, "largest request, in millions of bytes", bounds="[1, 1000]")
    max_requests: int = option(8, "maximum number of concurrent requests; others get 503", bounds="[1, 1000]")
    max_megapixels: int = option(
        50,  # phones take photos of 12 to 50
        "largest image, and all that are read at the same time, in millions of pixels of 8 to 25 bytes",
        bounds="[1, inf)",
    )
    timeout: int = option(
        30, "seconds after which a slow connection is closed, and a request is given up", bounds="[1, 3600]"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in self.trusted_names:
            if not re.fullmatch(r"\.?[a-z0-9-]+(\.[a-z0-9-]+)*", name):
                raise InputError(f"--trusted-hosts: expected names such as hub.example.com, found {name[:60]!r}")

    @property
    def trusted_names(self) -> tuple[str, ...]:
        """The names of `trusted_hosts`, in lower case."""
        return tuple(name.strip().lower() for name in self.trusted_hosts.split(",")) if self.trusted_hosts else ()

    @property
    def max_bytes(self) -> int:
        """The largest body of a request, in bytes."""
        return self.max_mb * 1_000_000

    @property
    def is_local(self) -> bool:
        """Whether only this machine can reach the server."""
        return self.host in ("localhost", "127.0.0.1", "::1")


def parse_decoding(pairs: Iterable[tuple[str, str]], defaults: DecodeConfig) -> DecodeConfig:
    """Makes the settings of a search from the parameters of a request.

    Args:
        pairs: the names and values; the names are those of the fields of `DecodeConfig`.
        defaults: the values of those that are not given. A request that changes between searching for the best words
            and drawing random ones takes DecodeConfig's own values for what only the other way has.

    Raises:
        InputError: a parameter is unknown, is given twice, is not what DecodeConfig allows, or exceeds `LIMITS`; or
            captions are to be chosen in another way than the server was started for, which may take minutes.
    """
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name not in FIELDS:
            raise InputError(f"{name[:60]!r} is no parameter; expected {', '.join(FIELDS)}")
        if name in given:
            raise InputError(f"{name}: expected one value, found two")
        given[name] = _parse_value(name, text.strip())
        if name in LIMITS and isinstance(given[name], int):
            of_server = defaults.num_beams if name == "beam_size" else getattr(defaults, name)
            limit = max(LIMITS[name], of_server or 0)  # what the page sends unless its sliders are moved
            if given[name] > limit:
                raise InputError(f"{name}: expected at most {limit} of this server, found {text}")
    sample = given.get("sample", defaults.sample and "beam_size" not in given)
    base = defaults.to_json()
    if sample != defaults.sample:
        base |= {name: FIELDS[name].default for name in ("beam_size", "choose", *SAMPLE_ONLY)}
    config = DecodeConfig(**base | given | {"sample": sample})
    if config.choose not in ("probability", defaults.choose):
        raise InputError(f"choose: this server was started without --choose {config.choose}; expected probability")
    return config


def _parse_value(name: str, text: str) -> Any:
    """Converts a value to the type of its parameter; returns the text if it is none, which DecodeConfig refuses."""
    kind = value_type(FIELDS[name])
    try:
        return BOOLEANS[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        return text
