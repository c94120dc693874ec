"""A setting, which is a field of a dataclass: its option on the command line, its checks, and its place in JSON.

`option` declares a field with its default, its help text and its bounds. From it come the option of the command line
(`add_options`), the checks of its value (`Settings`), and those of what a file holds (`from_json`).
"""

import argparse
import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Self

from captioning.base.cli import InputError


def option(
    default: Any,
    help: str,
    *,
    bounds: str = "(-inf, inf)",
    choices: tuple[str, ...] | None = None,
    metavar: str | None = None,
    words: Mapping[str, Any] | None = None,
    may_change: bool = False,
    is_path: bool = False,
) -> Any:
    """Declares a setting as a dataclass field.

    Args:
        default: its value if none is given.
        help: what it does, for `--help`.
        bounds: the interval of its values, see `Bounds`.
        choices: the allowed values of a text.
        metavar: what `--help` calls the value.
        words: words of the command line that stand for a value, such as `all`.
        may_change: whether a run may be resumed with another value.
        is_path: whether it names a file or a folder; it may change, since what it holds is compared instead.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "bounds": Bounds(bounds),
            "choices": choices,
            "metavar": metavar,
            "words": words or {},
            "may_change": may_change or is_path,
            "is_path": is_path,
        },
    )


def path_option(help: str, metavar: str) -> Any:
    """Declares a setting that names a file or a folder, by default none."""
    return option(None, help, metavar=metavar, is_path=True)


class Bounds:
    """An interval of numbers, written as in mathematics: `[0, 1)` is from 0 to below 1."""

    def __init__(self, text: str):
        low, high = text[1:-1].split(",")
        self.low, self.high = float(low), float(high)
        self.has_low, self.has_high = text[0] == "[", text[-1] == "]"

    def __contains__(self, value: float) -> bool:
        is_above = value >= self.low if self.has_low else value > self.low
        is_below = value <= self.high if self.has_high else value < self.high
        return is_above and is_below

    def __str__(self) -> str:
        low = f"{'of at least' if self.has_low else 'above'} {self.low:g}" if math.isfinite(self.low) else ""
        high = f"{'of at most' if self.has_high else 'below'} {self.high:g}" if math.isfinite(self.high) else ""
        return " and ".join(filter(None, (low, high)))


class Settings:
    """Checks the values of the dataclasses below when they are made, from a command line, a file or code alike."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):  # type: ignore[arg-type]  # every subclass is a dataclass
            value = getattr(self, field.name)
            if not is_valid(field, value):
                raise InputError(f"{field.name}: expected {describe(field)}, found {str(value)[:60]!r}")

    def to_json(self) -> dict[str, Any]:
        """Returns the values by name."""
        return dataclasses.asdict(self)  # type: ignore[call-overload]

    @classmethod
    def from_json(cls, values: Any) -> Self:
        """Makes the settings from what `to_json` returned; one that was added later has its default.

        Raises:
            InputError: a value is unknown, or not what its field allows.
        """
        names = [field.name for field in dataclasses.fields(cls)]  # type: ignore[arg-type]
        if not isinstance(values, dict):
            raise InputError(f"expected {', '.join(names)}, found {str(values)[:60]!r}")
        if unknown := [name for name in values if name not in names]:
            raise InputError(f"{unknown[0]} is not a setting")
        return cls(**values)

    @classmethod
    def from_args(cls, args: argparse.Namespace) -> Self:
        """Makes the settings from a parsed command line that has the options of `add_options`."""
        return cls(**{field.name: getattr(args, field.name) for field in dataclasses.fields(cls)})  # type: ignore[arg-type]


def value_type(field: dataclasses.Field) -> type:
    """Returns a field's type: int, float, bool or str, also where None is allowed."""
    if isinstance(field.type, types.UnionType):
        return next(kind for kind in typing.get_args(field.type) if kind is not types.NoneType)
    return typing.cast(type, field.type)


def is_valid(field: dataclasses.Field, value: Any) -> bool:
    """Tells whether a field may have a value: one of its type (a float may be whole), within its bounds."""
    if value is None:
        return isinstance(field.type, types.UnionType)
    kind = value_type(field)
    if isinstance(value, bool) != (kind is bool) or not isinstance(value, int | float if kind is float else kind):
        return False
    if field.metadata["choices"] is not None and value not in field.metadata["choices"]:
        return False
    return kind not in (int, float) or value in field.metadata["bounds"]


def describe(field: dataclasses.Field) -> str:
    """Describes which values a field may have: `a whole number of at least 1`."""
    kind = value_type(field)
    if field.metadata["choices"]:
        return " or ".join(field.metadata["choices"])
    if kind in (bool, str):
        return "true or false" if kind is bool else "text"
    words = "".join(f", or {word}" for word in field.metadata["words"])
    noun = "a whole number" if kind is int else "a number"
    return f"{noun} {field.metadata['bounds']}".strip() + words


# The command line.


def add_options(
    parser: argparse._ActionsContainer,
    settings: type[Settings],
    defaults: Mapping[str, Any] | None = None,
    only: tuple[str, ...] | None = None,
    skip: tuple[str, ...] = (),
    unlisted: tuple[str, ...] = (),
) -> None:
    """Adds an option for every field of a settings class.

    Args:
        parser: a parser, or a group of one.
        settings: the class.
        defaults: values, by field, that take the place of the fields' own defaults.
        only: the fields to add; None for all.
        skip: fields to leave out.
        unlisted: fields whose options `--help` does not list.
    """
    for field in dataclasses.fields(settings):  # type: ignore[arg-type]
        if field.name in skip or (only is not None and field.name not in only):
            continue
        default = (defaults or {}).get(field.name, field.default)
        text, kind = field.metadata["help"], value_type(field)
        if default is not None and kind is not bool:
            text += " (default: %(default)s)"
        text = argparse.SUPPRESS if field.name in unlisted else text
        keywords: dict[str, Any] = {"dest": field.name, "default": default, "help": text}
        if kind is bool:
            keywords["action"] = argparse.BooleanOptionalAction if default else "store_true"
        elif field.metadata["choices"]:
            keywords["choices"] = field.metadata["choices"]
        else:
            letter = {int: "N", float: "X"}.get(kind, "TEXT")
            keywords |= {"type": _parser_of(field), "metavar": field.metadata["metavar"] or letter}
        parser.add_argument(f"--{field.name.replace('_', '-')}", **keywords)


def _parser_of(field: dataclasses.Field) -> typing.Callable[[str], Any]:
    """Returns an argparse type that reads a field's value and names what is allowed."""

    def parse(text: str) -> Any:
        if text in field.metadata["words"]:
            return field.metadata["words"][text]
        try:
            value = value_type(field)(text)
        except ValueError:
            value = math.nan
        if not is_valid(field, value) or value in field.metadata["words"].values():
            raise argparse.ArgumentTypeError(f"expected {describe(field)}, found {text!r}")
        return value

    return parse
