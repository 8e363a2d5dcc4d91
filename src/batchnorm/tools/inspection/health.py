"""The verdict on a batch normalization, from its state and from its inputs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.inspection.findings import LEVELS, Finding, Level
from batchnorm.tools.inspection.quantities import Observed, Quantities, Vector
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import format_number, plural

__all__ = ["judge"]

# Significant bits of the half types: a value rounds by up to 2^-bits of itself.
_HALF_BITS = {"float16": 11, "bfloat16": 8}


class _Case(NamedTuple):
    """The facts that the checks look at."""

    state: BatchNormState
    quantities: Quantities
    observed: Observed | None
    limits: Thresholds


def judge(
    state: BatchNormState,
    quantities: Quantities,
    observed: Observed | None = None,
    limits: Thresholds | None = None,
) -> tuple[Finding, ...]:
    """The findings on a layer, the worst first.

    Args:
        state: the layer's.
        quantities: of that state and `observed`, from `quantities.derive`.
        observed: the layer's inputs, summed up; None if nothing was run.
        limits: limits beyond which a number becomes a finding; None for the defaults.
    """
    case = _Case(state, quantities, observed, limits or Thresholds())
    found = [finding for check in _CHECKS for finding in check(case)]
    return tuple(sorted(found, key=lambda finding: LEVELS.index(finding.level)))


def _check_finite(case: _Case) -> Iterator[Finding]:
    names = {"mean": "mean", "var": "variance", "gamma": "gamma", "beta": "beta"}
    bad: dict[str, NDArray[np.bool_]] = {}
    for field, title in names.items():
        array = getattr(case.state, field)
        if array is not None and not np.isfinite(array).all():
            bad[title] = ~np.isfinite(np.asarray(array).reshape(-1))
    if bad:
        which = np.any(list(bad.values()), axis=0)
        message = f"NaN or inf in {' and '.join(bad)} of {_count(which)}"
        yield Finding("non-finite", "error", message, _indices(which))


def _check_negative(case: _Case) -> Iterator[Finding]:
    var = case.state.var
    if var is None:
        return
    which = np.isfinite(var) & (var < 0)
    if which.any():
        message = f"{_count(which)} below 0, least {_figure(np.min(var[which]))}"
        yield Finding("negative-variance", "error", message, _indices(which))


def _check_trained(case: _Case) -> Iterator[Finding]:
    if _is_untouched(case.state):
        steps = case.state.counted
        after = "" if steps is None else f" after {steps} updates"
        yield Finding("never-trained", "error", f"mean 0 and variance 1 everywhere{after}")


def _check_kept(case: _Case) -> Iterator[Finding]:
    if case.state.mean is None or case.state.var is None:
        yield Finding("no-statistics", "note", "the layer keeps no running statistics")


def _check_alive(case: _Case) -> Iterator[Finding]:
    signal, var, mean = case.quantities.signal, case.state.var, case.state.mean
    if signal is None or var is None or mean is None:
        return
    with np.errstate(all="ignore"):
        constant = var <= (2.0**-23 * np.abs(mean.astype(np.float64))) ** 2
        which = np.isfinite(var) & (var >= 0) & ((signal <= case.limits.dead) | constant)
    if which.any():
        level: Level = "error" if which.all() else "warning"
        message = f"{_count(which)} with variance {_range(var[which])}, eps {_figure(_eps(case))}"
        yield Finding("dead-channels", level, message, _indices(which))


def _check_gain(case: _Case) -> Iterator[Finding]:
    yield from _check_above(case.quantities.gain, case.limits.gain, "exploding-gain", "gain", "")


def _check_offset(case: _Case) -> Iterator[Finding]:
    unit = " standard deviations"
    yield from _check_above(
        case.quantities.offset, case.limits.offset, "large-offset", "mean", unit
    )


def _check_above(
    values: Vector | None, limit: float, code: str, what: str, unit: str
) -> Iterator[Finding]:
    if values is None:
        return
    which = np.isfinite(values) & (values > limit)
    if which.any():
        message = f"{what} of {_count(which)} up to {_figure(np.max(values[which]))}{unit}"
        yield Finding(code, "warning", message, _indices(which))


def _check_stored(case: _Case) -> Iterator[Finding]:
    bits = _HALF_BITS.get(case.state.stored or "")
    if bits is None:
        return
    message = f"stored in {case.state.stored}"
    if case.state.decay is not None and case.state.decay < 1:
        # An update of weight w stops once w·|batch − running| is below half a unit in the last
        # place, which is up to 2^-bits of the value.
        stuck = 2.0**-bits / (1.0 - case.state.decay)
        message += f": updates of weight {1 - case.state.decay:.2g} stop within {stuck:.1%}"
    yield Finding("half-statistics", "warning", message)


def _check_drift(case: _Case) -> Iterator[Finding]:
    """Running statistics against those of the real rows, or of all rows where these fit."""
    drift, seen = case.quantities.drift, case.observed
    if drift is None or seen is None or _is_untouched(case.state):
        return
    distance = drift.distance
    noise = case.limits.sampling * np.sqrt(1.5 / np.maximum(seen.real.count, 1.0))
    which = np.isfinite(distance) & (distance > case.limits.drift_warning + noise)
    if not which.any():
        return
    counted = case.quantities.drift_padded
    if counted is not None and seen.padded:
        real, everything = (float(np.nanmedian(d[which])) for d in (distance, counted.distance))
        if everything < real / 2:
            message = (
                f"{_count(which)}: {_figure(everything)} standard deviations from the statistics "
                f"of all rows, {_figure(real)} from those of real rows"
            )
            yield Finding("padding-counted", "error", message, _indices(which))
            return
    worst = float(np.max(distance[which]))
    level: Level = "warning"
    if np.any(which & (distance > case.limits.drift_error + noise)):
        level = "error"
    message = f"{_count(which)} moved by up to {_figure(worst)} standard deviations"
    yield Finding("drift", level, message, _indices(which))


def _check_input(case: _Case) -> Iterator[Finding]:
    seen = case.observed
    if seen is not None and seen.skipped:
        message = f"NaN or inf at real rows in {seen.skipped} of {plural(seen.calls, 'call')}"
        yield Finding("non-finite-input", "error", message)


def _check_padding(case: _Case) -> Iterator[Finding]:
    drift, counted = case.quantities.drift, case.quantities.drift_padded
    if drift is None or counted is None or case.observed is None or not case.observed.padded:
        return
    share, moved = case.observed.padded, counted.distance
    if np.isfinite(moved).any():
        message = (
            f"{share:.0%} of the rows are padding; counted, they would be "
            f"{_figure(np.nanmax(moved))} standard deviations away"
        )
        yield Finding("padding", "note", message)


_CHECKS: tuple[Callable[[_Case], Iterator[Finding]], ...] = (
    _check_finite,
    _check_negative,
    _check_trained,
    _check_kept,
    _check_input,
    _check_drift,
    _check_alive,
    _check_gain,
    _check_offset,
    _check_stored,
    _check_padding,
)


def _is_untouched(state: BatchNormState) -> bool:
    """True if the statistics are those of a new layer."""
    if state.mean is None or state.var is None or not state.mean.size:
        return False
    return bool(np.all(state.mean == 0) and np.all(state.var == 1))


def _eps(case: _Case) -> float:
    return case.limits.eps if case.state.eps is None else case.state.eps


def _indices(which: Any) -> tuple[int, ...]:
    return tuple(int(i) for i in np.flatnonzero(which))


def _count(which: Any) -> str:
    found, total = int(np.sum(which)), int(np.size(which))
    if total == 1:
        return "the only channel"
    return f"all {total} channels" if found == total else f"{found} of {total} channels"


def _range(values: Any) -> str:
    low, high = float(np.min(values)), float(np.max(values))
    return _figure(low) if low == high else f"{_figure(low)} to {_figure(high)}"


def _figure(value: Any) -> str:
    return format_number(float(value), 2)
