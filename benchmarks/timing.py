"""What the benchmarks share: options, and rates of several variants of the same work, measured alternately."""

import argparse
import statistics
import time
from collections.abc import Callable, Mapping

from captioning.base.cli import int_at_least, log


def add_counts(parser: argparse.ArgumentParser, counts: Mapping[str, tuple[int, str]]) -> None:
    """Adds options that are whole numbers of at least 1: by name, the default and the help."""
    for name, (default, text) in counts.items():
        text += " (default: %(default)s)"
        parser.add_argument(f"--{name}", type=int_at_least(1), metavar="N", default=default, help=text)


def items_per_second(run: Callable[[], object], num_items: int) -> float:
    """Calls a function that processes `num_items` items, and returns its rate."""
    start = time.perf_counter()
    run()
    return num_items / (time.perf_counter() - start)


def interleaved_median_rates(variants: Mapping[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, float]:
    """Measures variants alternately, so that what slows the machine for a while slows all of them.

    Args:
        variants: by name, a function that does the work once and returns its rate, in items per second.
        rounds: how often each variant is measured.
        unit: what the items are, for the messages.

    Returns:
        The median rate of each variant.
    """
    rates: dict[str, list[float]] = {name: [] for name in variants}
    for _ in range(rounds):
        for name, measure in variants.items():
            rates[name].append(measure())
            log(f"{name}: {rates[name][-1]:.2f} {unit}/s")
    return {name: statistics.median(values) for name, values in rates.items()}
