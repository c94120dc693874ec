"""What the benchmarks share: rates of several ways to do the same, measured by turns."""

import statistics
import time
from collections.abc import Callable

from common import say


def rate_of(run: Callable[[], object], count: int) -> float:
    """How many a second, where a call does so many."""
    start = time.perf_counter()
    run()
    return count / (time.perf_counter() - start)


def median_rates(ways: dict[str, Callable[[], float]], rounds: int, unit: str) -> dict[str, float]:
    """The median rate of every way; each has its turn in every round, so that what slows the machine slows all."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, rate in ways.items():
            rates[name].append(rate())
            say(f"{name}: {rates[name][-1]:.2f} {unit}/s")
    return {name: statistics.median(found) for name, found in rates.items()}
