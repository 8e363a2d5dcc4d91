"""Times of steps that take turns, whatever framework they belong to."""

from __future__ import annotations

import gc
import math
import random
import statistics
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Clock", "Step", "round_to", "summarize", "take_turns", "time_calls"]

Step = Callable[[], object]
Clock = Callable[[Step, int], float]  # of a step and a number of calls: seconds a call
_BLOCK = 0.02  # seconds; shorter steps are repeated, so that the clock's own time is small


def time_calls(step: Step, calls: int) -> float:
    """Seconds a call, by the wall clock."""
    start = time.perf_counter()
    for _ in range(calls):
        step()
    return (time.perf_counter() - start) / calls


def take_turns(
    steps: dict[str, Step], seconds: float, least: int, clock: Clock = time_calls
) -> dict[str, list[float]]:
    """Seconds a call, one figure for each round.

    The order is drawn anew for every round: the memory that one variant leaves behind must not
    always be the next one's.

    Args:
        steps: by name.
        seconds: time to take turns, about.
        least: least number of rounds, however long they take.
        clock: measures calls of a step.
    """
    calls = {name: _warm_up(step, clock) for name, step in steps.items()}
    start = time.perf_counter()
    for name, step in steps.items():
        clock(step, calls[name])
    rounds = max(least, min(200, int(seconds / (time.perf_counter() - start))))
    times: dict[str, list[float]] = {name: [] for name in steps}
    order = random.Random(0)
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            for name in order.sample(list(steps), len(steps)):
                times[name].append(clock(steps[name], calls[name]))
    finally:
        gc.enable()
    return times


def _warm_up(step: Step, clock: Clock) -> int:
    """Run the step until it is warm; return the number of calls that fill a block."""
    fastest, start = math.inf, time.perf_counter()
    for _ in range(1000):
        fastest = min(fastest, clock(step, 1))
        if time.perf_counter() - start > 2 * _BLOCK:
            break
    step()
    return max(1, round(_BLOCK / fastest))


def summarize(seen: list[float], size: int) -> dict[str, Any]:
    """Median and quartiles in milliseconds, and the bytes that had to move over the time."""
    low, median, high = statistics.quantiles(seen, n=4, method="inclusive")
    return {
        "ms": round_to(1e3 * median, 4),
        "quartiles": [round_to(1e3 * low, 4), round_to(1e3 * high, 4)],
        "GB/s": round_to(size / median / 1e9, 3),
        "rounds": len(seen),
    }


def round_to(value: float, digits: int) -> float:
    """The value with this number of significant digits."""
    return float(f"{value:.{digits}g}")
