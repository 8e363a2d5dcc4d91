"""Times steps in turns, whatever framework they belong to."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

_BLOCK = 0.02  # seconds; shorter steps are repeated, or the clock would be what is measured


def take_turns(
    steps: dict[str, Callable[[], object]], seconds: float, least: int
) -> dict[str, list[float]]:
    """Seconds a call, one figure for each round.

    The order is drawn anew for every round: the memory that one variant leaves behind must not
    always be the next one's.
    """
    calls = {name: _warm_up(step) for name, step in steps.items()}
    start = time.perf_counter()
    for name, step in steps.items():
        _time(step, calls[name])
    rounds = max(least, min(200, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(steps), len(steps)):
                times[name].append(_time(steps[name], calls[name]))
    finally:
        gc.enable()
    return times


def _warm_up(step: Callable[[], object]) -> int:
    """Run the step until it is warm; how often it fits into a block."""
    fastest, start = math.inf, time.perf_counter()
    for _ in range(1000):
        fastest = min(fastest, _time(step, 1))
        if time.perf_counter() - start > 2 * _BLOCK:
            break
    step()
    return max(1, round(_BLOCK / fastest))


def _time(step: Callable[[], object], calls: int) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def summarize(seen: list[float], size: int) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and the bytes that had to move over the time."""
    low, median, high = statistics.quantiles(seen, n=4, method="inclusive")
    return {
        "ms": _round(1e3 * median),
        "quartiles": [_round(1e3 * low), _round(1e3 * high)],
        "GB/s": _round(size / median / 1e9, 3),
        "rounds": len(seen),
    }


def _round(value: float, digits: int = 4) -> float:
    return float(f"{value:.{digits}g}")
