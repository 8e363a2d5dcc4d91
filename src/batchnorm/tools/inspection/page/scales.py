"""Scales from numbers to places in a picture."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

__all__ = ["Scale", "fit", "flatten"]

_WIDE = 30.0  # greatest over least: above it, a linear scale would squeeze half of the values


@dataclass(frozen=True)
class Scale:
    """A linear or logarithmic map from [low, high] to [start, stop]; values beyond are clipped.

    Args:
        low, high: of the values.
        log: the map is logarithmic; low is positive then.
        start, stop: the places of low and high.
    """

    low: float
    high: float
    log: bool = False
    start: float = 0.0
    stop: float = 1.0

    def onto(self, start: float, stop: float) -> Scale:
        """The same scale with other places for its ends."""
        return replace(self, start=start, stop=stop)

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, value = (self._bend(v) for v in (self.low, self.high, value))
        share = min(1.0, max(0.0, (value - low) / (high - low)))
        return self.start + share * (self.stop - self.start)

    def bins(self, values: Any, count: int) -> list[int]:
        """The number of values in each of `count` equal parts; those beyond count at the ends."""
        low, high = self._bend(self.low), self._bend(self.high)
        found = flatten([values])
        if self.log:
            found = np.log10(np.maximum(found, self.low))
        shares = np.clip((found - low) / (high - low), 0.0, 1.0)
        return np.histogram(shares, bins=count, range=(0.0, 1.0))[0].tolist()

    def ticks(self, most: int = 5) -> list[float]:
        """Round numbers within the range, at most about `most`."""
        if self.log:
            first, last = math.ceil(math.log10(self.low) - 1e-9), math.floor(math.log10(self.high))
            powers = range(first, last + 1)
            every = max(1, math.ceil(len(powers) / most))
            if len(powers) > 1:
                return [10.0**p for p in powers if p % every == 0]
        step = _round_step((self.high - self.low) / max(1, most - 1))
        begin = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(begin, math.floor(self.high / step + 1e-9) + 1)]

    def _bend(self, value: float) -> float:
        return math.log10(max(value, self.low)) if self.log else value


def fit(*arrays: Any, least: float | None = None, log: bool | None = None) -> Scale | None:
    """A scale that shows every finite value, or None if there is none.

    Args:
        arrays: the values.
        least: on a logarithmic scale, smaller values are drawn there.
        log: use a logarithmic scale; None uses one if the greatest value is more than 30 times
            the least, and both are positive.
    """
    values = flatten(arrays)
    if not values.size:
        return None
    if log is None:
        log = bool(np.min(values) > 0 and np.max(values) > _WIDE * np.min(values))
    if log:
        positive = values[values > (least or 0.0)]
        low = float(np.min(positive)) if positive.size else least or 1.0
        high = float(np.max(positive)) if positive.size else low
        low = max(low, high * 1e-12)
        return Scale(low / 1.5, high * 1.5, log=True)
    low, high = float(np.min(values)), float(np.max(values))
    margin = 0.02 * (high - low) or 0.5 * abs(high) or 0.5
    return Scale(low - margin, high + margin)


def flatten(arrays: Iterable[Any]) -> Any:
    """The finite values of all arrays, in one of rank 1."""
    values = np.concatenate([np.zeros(0), *(np.asarray(a, np.float64).reshape(-1) for a in arrays)])
    return values[np.isfinite(values)]


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return next(power * f for f in (1.0, 2.0, 2.5, 5.0, 10.0) if power * f >= step * (1 - 1e-9))
