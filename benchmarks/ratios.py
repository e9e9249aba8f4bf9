"""Times several ways of doing the same, in turn, as ratios to the first."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence

Seconds = Mapping[str, Sequence[float]]


def interleave(ways: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each way; a busy spell of the machine hits all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()  # the first run allocates
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def to_baseline(seconds: Seconds) -> dict[str, tuple[float, float]]:
    """Ratio of the medians and of the minima to those of the first way."""
    median, least = _summary(next(iter(seconds.values())))
    summaries = {name: _summary(values) for name, values in seconds.items()}
    return {name: (m / median, s / least) for name, (m, s) in summaries.items()}


def _summary(values: Sequence[float]) -> tuple[float, float]:
    return statistics.median(values), min(values)
