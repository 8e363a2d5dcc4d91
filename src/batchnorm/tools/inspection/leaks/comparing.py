"""The difference of two runs at the real positions of one array."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.inspection.leaks.positions import Place, locate
from batchnorm.tools.inspection.leaks.resolution import Sizes

__all__ = ["Difference", "clear", "compare", "give_back", "tolerance_of"]

# Sums of up to a hundred thousand terms, added in another order, differ by some sqrt(1e5)·eps of
# the terms' size. A half-precision array is rounded from such a sum, and a layer may round a few
# times on its way: 8 units in the last place.
_SUMS = 1024.0
_ROUNDINGS = 8.0
_EPS = {
    "float64": _SUMS * 2.0**-52,
    "float32": _SUMS * 2.0**-23,
    "float16": _ROUNDINGS * 2.0**-10,
    "bfloat16": _ROUNDINGS * 2.0**-7,
}


class Difference(NamedTuple):
    """The largest movement of real values between two runs.

    Attributes:
        amount: largest absolute difference.
        relative: largest difference divided by the root mean square of all real values of the
            first run plus the size of the value itself; what a tolerance is compared with.
        profile: largest relative difference for each distance to the end of the sample, in
            positions of the input; NaN where there is none. Empty for arrays without positions.
        shifted: the arrays agree at their ends or middles, not where they begin.
    """

    amount: float
    relative: float
    profile: Any = np.zeros(0)
    shifted: bool = False


def tolerance_of(dtypes: set[str]) -> float:
    """The relative difference that rounding may make, in a model that has these types."""
    return max((_EPS.get(dtype, _EPS["float32"]) for dtype in dtypes), default=_EPS["float32"])


def compare(
    a: Any,
    b: Any,
    sizes: Sizes,
    tolerance: float,
    *,
    profile: bool = False,
    edges: bool = False,
) -> Difference | None:
    """The difference of two runs' arrays of one layer, or None if positions cannot be told.

    Args:
        a: values of the run with little padding.
        b: those of the run with more.
        sizes: of the two runs.
        tolerance: relative differences up to this one are rounding.
        profile: find the profile too.
        edges: compare the positions of which it is open if they are real, instead.
    """
    place = locate(a.shape, b.shape, sizes)
    if place is None:
        return None
    a, b = a.reshape(place.before), b.reshape(place.after)
    real = np.broadcast_to(place.perhaps & ~place.real if edges else place.real, a.shape)
    if not profile and np.array_equal(a, _common(b, place)):
        return Difference(0.0, 0.0)
    moved = _measure(a, _common(b, place), real)
    relative = float(np.max(moved, initial=0.0, where=real))
    if relative > tolerance and any(
        _agree(a, other, place, tolerance) for other in _aligned(b, place, sizes)
    ):
        return Difference(0.0, 0.0, shifted=True)
    with np.errstate(invalid="ignore", over="ignore"):
        apart = np.abs(a - _common(b, place))
    amount = float(np.max(np.nan_to_num(apart, nan=np.inf), initial=0.0, where=real & (moved > 0)))
    return Difference(amount, relative, _profile(moved, real, place) if profile else np.zeros(0))


def give_back(a: Any, b: Any, sizes: Sizes, *, edges: bool) -> Any:
    """A copy of `b`, the array of the run with more padding, with the real values of `a`.

    With `edges`, a coarser layer gets all values of `a`: those at positions of which it is open if
    they are real, and those at the padding that both runs have. None where positions cannot be
    told, or nothing differs.
    """
    place = locate(a.shape, b.shape, sizes)
    if place is None:
        return None
    shape = b.shape
    a, b = a.reshape(place.before), b.reshape(place.after)
    chosen = np.broadcast_to(place.real, a.shape)
    if edges and not place.exact:
        chosen = np.ones(a.shape, bool)
    common = _common(b, place)
    if np.array_equal(np.where(chosen, a, 0), np.where(chosen, common, 0), equal_nan=True):
        return None
    b = b.copy()
    np.copyto(_common(b, place), a, where=chosen)
    return b.reshape(shape)


def clear(a: Any, b: Any, sizes: Sizes) -> Any:
    """A copy of `b` with zeros wherever it is padding; None without positions."""
    place = locate(a.shape, b.shape, sizes)
    if place is None or place.before == place.after:
        return None
    cleared = np.zeros(place.after, b.dtype)
    common = _common(b.reshape(place.after), place)
    np.copyto(_common(cleared, place), common, where=np.broadcast_to(place.perhaps, place.before))
    return cleared.reshape(b.shape)


def _common(b: Any, place: Place) -> Any:
    """The leading part of the second run's array, of the first one's shape."""
    return b[tuple(slice(0, size) for size in place.before)]


def _measure(a: Any, b: Any, real: Any) -> Any:
    """Relative differences, element by element; 0 where both are the same, NaN included."""
    with np.errstate(invalid="ignore", over="ignore", divide="ignore"):
        apart = np.abs(a - b)
        count = max(1, int(real.sum()))
        finite = np.where(real & np.isfinite(a), a, 0).astype(np.float64)
        scale = np.sqrt(np.square(finite).sum() / count)
        found = apart / (scale + np.abs(a) + np.finfo(np.float32).tiny)
    same = (a == b) | (np.isnan(a) & np.isnan(b))
    return np.where(same, 0.0, np.nan_to_num(found, nan=np.inf))


def _aligned(b: Any, place: Place, sizes: Sizes) -> Iterator[Any]:
    """The second run's array cut at other places: at the end, as after a reversal, or the middle.

    Tables of relative positions grow at both ends.
    """
    pairs = list(zip(place.before, place.after, strict=True))
    exact = set(zip(sizes.before, sizes.after, strict=True))
    for divisor in (1, 2):
        for every in (True, False):
            starts = [(m - n) // divisor if every or (n, m) not in exact else 0 for n, m in pairs]
            if any(starts):
                yield b[tuple(slice(s, s + n) for s, (n, _) in zip(starts, pairs, strict=True))]


def _agree(a: Any, b: Any, place: Place, tolerance: float) -> bool:
    """True if samples without padding are the same; there must be one."""
    others = tuple(range(1, a.ndim))
    full = np.broadcast_to(place.perhaps, a.shape).all(others, keepdims=True)
    if not full.any():
        return False
    full = np.broadcast_to(full, a.shape)
    return bool(np.max(_measure(a, b, full), initial=0.0, where=full) <= tolerance)


def _profile(moved: Any, real: Any, place: Place) -> Any:
    if place.ends is None or not real.any():
        return np.zeros(0)
    # Axes without positions first, so that big arrays of distances are not needed.
    others = tuple(i for i, size in enumerate(place.ends.shape) if size == 1)
    most = np.max(moved, axis=others, keepdims=True, initial=0.0, where=real)
    seen = real.any(others, keepdims=True)
    ends = np.broadcast_to(place.ends, most.shape)[seen].astype(np.int64)
    profile = np.full(int(ends.max(initial=0)) + 1, -1.0)
    np.maximum.at(profile, ends, most[seen])
    return _fill(np.where(profile < 0, np.nan, profile))


def _fill(profile: Any) -> Any:
    """Positions of the input that a coarser layer has together get their common value."""
    known = np.flatnonzero(~np.isnan(profile))
    if len(known) < 2:
        return profile
    stride = np.median(np.diff(known))
    at = np.searchsorted(known, np.arange(len(profile)))  # never beyond: the last one is known
    near = known[at] - np.arange(len(profile)) < stride
    return np.where(near, profile[known[at]], profile)
