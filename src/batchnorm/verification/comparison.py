"""Comparing a path's results with the oracle's, within bounds derived from the case."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import NamedTuple

import numpy as np

from batchnorm.verification import oracle, tolerances
from batchnorm.verification.cases import Case, Data, Result, make_data


class MismatchError(AssertionError):
    """A result of a path that is not the oracle's; raised, so that `python -O` keeps it."""


class Path(NamedTuple):
    """A way through the code, and the error it may make where x is float32.

    `rounding`: by type, the allowed error in half units in the last place, where it is not one.
    """

    run: Callable[[Case, Data], Result]
    unbiased: bool  # the variance it stores (S10)
    float32: float
    rounding: Mapping[str, float] = MappingProxyType({})


def check(path: Path, case: Case) -> float:
    """Run a case on a path; the largest error, as a part of what is allowed.

    Raises:
        MismatchError: a result is further from the oracle's than that.
    """
    return compare(path, case, *prepare(case, path.unbiased))


def prepare(case: Case, unbiased: bool) -> tuple[Data, Result]:
    """The arrays of a case, and the oracle's results."""
    data = make_data(case)
    return data, oracle.expect(case, data, unbiased=unbiased)


def compare(path: Path, case: Case, data: Data, expected: Result) -> float:
    """`check` where arrays and the oracle's results are known."""
    found = path.run(case, data)
    tol = path.float32
    if tol == tolerances.NAIVE:
        tol = tolerances.naive(data.x[data.real], case.eps)
    elif case.dtype == "float64":
        tol = tolerances.FLOAT64
    bounds = _bounds(case, data, expected, tol, path.rounding.get(case.dtype, 1.0))
    worst = [
        _compare(name, getattr(found, name), getattr(expected, name), getattr(bounds, name))
        for name in ("y", "dx", "dgamma", "dbeta", "dresidual")
    ]
    for name, bound in bounds.state._asdict().items():
        if name == "batches" and found.state.batches is None:
            continue  # a front end without the cumulative average does not count
        worst.append(
            _compare(name, getattr(found.state, name), getattr(expected.state, name), bound)
        )
    return max(worst)


def _bounds(case: Case, data: Data, expected: Result, tol: float, roundings: float) -> Result:
    """The allowed error of each result: `tol` relative to the terms of its sum."""
    gamma, beta, rstd, std = _scales(case, data)
    weight = _along(case, gamma)
    with np.errstate(invalid="ignore"):
        size = 1.0 + np.abs(expected.y) + np.abs(_along(case, beta))
    if case.adjusted:
        size = size + np.abs(data.s) * (1 + weight) + np.abs(data.t) * (1 + weight)

    def half(values: np.ndarray) -> np.ndarray:
        return roundings * tolerances.output_rounding(case.dtype, values)

    dy = np.nan_to_num(np.abs(data.dy)) * data.real
    if case.adjusted and case.mode == "train":
        dy = dy * (1.0 + np.abs(data.s))
    largest = dy.max(initial=0.0)
    rows = tuple(a for a in range(len(case.shape)) if a not in case.axes)
    z = np.nan_to_num(np.abs(size / np.maximum(weight, 0.1)))
    renormed = 1.0 if case.renorm is None else 4.0  # r, of the size of stddev ratios
    dx = tol * renormed * _along(case, rstd * gamma) * largest * (1.0 + z)
    mean, renorm_mean = (
        None if getattr(data.state, f) is None else _mean_bound(f, data, expected, std, tol)
        for f in ("mean", "renorm_mean")
    )
    relative = {
        f: None if v is None else 2 * tol * (np.abs(v) + np.abs(getattr(data.state, f)))
        for f, v in expected.state._asdict().items()
    }
    exact = case.zeroed & ~data.real  # padding of 0 is 0 to the bit (S4)
    return Result(
        np.where(exact, 0.0, tol * size + half(expected.y)),
        dx + half(expected.dx),
        tol * renormed * (dy * z).sum(axis=rows) + tol * largest,
        tol * dy.sum(axis=rows) + tol * largest,
        expected.state._replace(**relative)._replace(mean=mean, batches=0, renorm_mean=renorm_mean),
        None
        if expected.dresidual is None
        else np.where(exact, 0.0, _residual_bound(case, expected.dresidual, half)),
    )


def _residual_bound(
    case: Case, dresidual: np.ndarray, half: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    """One rounding to a half type; where a slope multiplies, the roundings of both factors."""
    slope = 2 * tolerances.HALF_ULP["float64" if case.dtype == "float64" else "float32"]
    sloped = slope if case.activation == "leaky_relu" else 0.0
    return half(dresidual) + sloped * np.abs(dresidual)


def _mean_bound(
    field: str, data: Data, expected: Result, std: np.ndarray, tol: float
) -> np.ndarray:
    """S3's error of the batch's mean, and a few roundings of the mean before and after the step."""
    size = np.abs(getattr(data.state, field)) + np.abs(getattr(expected.state, field))
    if tol <= tolerances.FLOAT64:  # state is float64 there
        return tol * (std + size)
    return tol * std + 4 * tolerances.HALF_ULP["float32"] * size


def _scales(case: Case, data: Data) -> tuple[np.ndarray, ...]:
    """|gamma|, |beta|, the largest rstd in play and the standard deviation, per channel."""
    rows = tuple(a for a in range(len(case.shape)) if a not in case.axes)
    gamma = np.ones(case.channels) if data.gamma is None else np.abs(data.gamma)
    beta = np.zeros(case.channels) if data.beta is None else np.abs(data.beta)
    x = np.where(data.real, data.x, np.nan)
    count = np.maximum(data.real.sum(axis=rows), 1)
    mean = np.nansum(x, axis=rows) / count
    std = np.sqrt(np.nansum((x - _along(case, mean)) ** 2, axis=rows) / count)
    whole = case.ghost is None and case.passes == 1
    own = 1 / np.sqrt(std**2 + case.eps) if whole else case.eps**-0.5
    kept = 1 / np.sqrt(data.state.var + case.eps)
    return gamma, beta, own if case.mode == "train" else kept, std


def _along(case: Case, per_channel: np.ndarray) -> np.ndarray:
    shape = [n if a in case.axes else 1 for a, n in enumerate(case.shape)]
    return np.reshape(per_channel, shape)


def _compare(name: str, found: object, expected: object, bound: object) -> float:
    """The largest error as a part of its bound."""
    if (found is None) != (expected is None):
        raise MismatchError(f"{name}: there is {'none' if found is None else 'one'}")
    if expected is None:
        return 0.0
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise MismatchError(f"{name}: the shape is {found.shape}, expected {expected.shape}")
    bound = np.broadcast_to(np.asarray(bound, float), expected.shape)
    same = np.isnan(found) & np.isnan(expected)
    with np.errstate(invalid="ignore"):
        off = ~same & ~(np.abs(found - expected) <= bound)
        worst = np.nanmax(np.abs(found - expected) / np.maximum(bound, 1e-300), initial=0.0)
    if off.any():
        raise MismatchError(
            f"{name}: {off.sum()} of {off.size} off by up to {worst:.3g} times the bound; first at "
            f"{tuple(np.argwhere(off)[0].tolist())}: {float(found[off][0])!r}, expected "
            f"{float(expected[off][0])!r}"
        )
    return float(worst)


def check_type(found: object, expected: object) -> None:
    """Raise for an output of another type than x's (S4)."""
    if found != expected:
        raise MismatchError(f"y: the type is {found}, expected {expected}")
