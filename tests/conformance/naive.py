"""The specification once more, channel by channel and row by row, to check the oracle itself.

Shares no code with the package: packs the real rows of each group and channel into a list, as
the packing principle says (S5), and applies the textbook to it.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import partial

import numpy as np

from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path
from cases import Case, Data, Result, State, split
from paths import Way


def run(case: Case, data: Data, *, unbiased: bool) -> Result:
    if case.single_value == "running":
        case = replace(case, mode="eval")
    names = [f for f in State._fields if getattr(data.state, f) is not None and f != "batches"]
    state = {f: np.array(getattr(data.state, f)) for f in names}
    y, dx = np.full(case.shape, np.nan), np.zeros(case.shape)
    dgamma, dbeta = np.zeros(case.channels), np.zeros(case.channels)
    updated = False
    for channel in np.ndindex(*case.channels):
        at = [slice(None)] * len(case.shape)
        for axis, index in zip(case.axes, channel, strict=True):
            at[axis] = index
        view = _Channel(case, data, tuple(at), channel)
        passes = [view]
        if case.passes > 1:
            passes = [_Channel(*part, tuple(at), channel) for part in split(case, data)]
            if case.ghost is not None:
                view.statistics = [one for part in passes for one in part.statistics]
        found = [part.normalize() for part in passes]
        y[view.at], dx[view.at] = (np.concatenate([one[i] for one in found]) for i in (0, 1))
        dgamma[channel], dbeta[channel] = (math.fsum(one[i] for one in found) for i in (2, 3))
        if case.zeroed:
            y[view.at][~view.real] = 0.0
        moves = case.mode == "train" and case.update and case.single_value == "raise"
        if moves and (new := view.running(unbiased)):
            updated = True
            for f, value in new.items():
                state[f][channel] = value
    batches = data.state.batches + (1 if updated else 0)
    found = State(**{"batches": batches, **state})
    dresidual = _activated(y, data.dy, case) if case.residual else None
    if case.zeroed and dresidual is not None:
        dresidual = np.where(data.real, dresidual, 0.0)
    return Result(
        y,
        dx,
        dgamma if case.gamma else None,
        dbeta if case.beta else None,
        found,
        dresidual,
    )


class _Channel:
    """One channel of a case."""

    def __init__(self, case: Case, data: Data, at: tuple, channel: tuple[int, ...]) -> None:
        self.case, self.at, self.channel = case, at, channel
        self.x, self.dy, self.real = data.x[at], data.dy[at], data.real[at]
        self.shape = self.x.shape
        self.gamma = 1.0 if data.gamma is None else data.gamma[channel]
        self.beta = 0.0 if data.beta is None else data.beta[channel]
        training = case.mode == "train"
        self.training = training
        broadcast = [
            None if a is None else np.broadcast_to(a, case.shape)[at]
            for a in (data.s, data.t, data.residual)
        ]
        self.s = broadcast[0] if training and case.adjusted else np.ones(self.shape)
        self.t = broadcast[1] if training and case.adjusted else np.zeros(self.shape)
        self.residual = broadcast[2] if case.residual else np.zeros(self.shape)
        self.state = {
            f: None if v is None or f == "batches" else v[channel]
            for f, v in data.state._asdict().items()
        }
        self.batches = data.state.batches
        self.groups = self._groups()
        self.statistics = [self._moments(g) for g in self.groups]
        self.r, self.d = self._renorm()

    def _groups(self) -> list[np.ndarray]:
        """Boolean selections of x; without ghost batches a single one."""
        if not self.training or self.case.ghost is None:
            return [np.ones(self.shape, bool)]
        count = self.case.shape[0] // self.case.ghost
        return [
            np.broadcast_to(
                (np.arange(self.shape[0]) % count == g).reshape(-1, *(1,) * (len(self.shape) - 1)),
                self.shape,
            )
            for g in range(count)
        ]

    def _moments(self, group: np.ndarray) -> tuple[int, float, float]:
        values = [float(v) for v in self.x[group & self.real]]
        if not values:
            return 0, 0.0, 0.0
        mean = math.fsum(values) / len(values)
        return len(values), mean, math.fsum((v - mean) ** 2 for v in values) / len(values)

    def _averages(self) -> tuple[float, float, float] | None:
        """Averages over the groups that are not empty: mean, variance, unbiased variance."""
        full = [(n, m, v) for n, m, v in self.statistics if n]
        if not full:
            return None
        unbiased = [v * n / (n - 1) if n > 1 else v for n, _, v in full]
        return (
            math.fsum(m for _, m, _ in full) / len(full),
            math.fsum(v for _, _, v in full) / len(full),
            math.fsum(unbiased) / len(full),
        )

    def _renorm(self) -> tuple[float, float]:
        average = self._averages()
        if not self.training or self.case.renorm is None or average is None:
            return 1.0, 0.0
        limits = {"rmin": 0.0, "rmax": math.inf, "dmax": math.inf} | self.case.renorm
        reference = max(self.state["renorm_stddev"], math.sqrt(self.case.eps))
        r = math.sqrt(average[1] + self.case.eps) / reference
        d = (average[0] - self.state["renorm_mean"]) / reference
        return (
            min(max(r, limits["rmin"]), limits["rmax"]),
            min(max(d, -limits["dmax"]), limits["dmax"]),
        )

    def normalize(self) -> tuple[np.ndarray, np.ndarray, float, float]:
        y, dx = np.full(self.shape, np.nan), np.zeros(self.shape)
        dgamma = dbeta = 0.0
        for group, (n, mean, var) in zip(self.groups, self.statistics, strict=True):
            own = self.training and n > 0
            if not own:
                mean, var = self.state["mean"], self.state["var"]
            r, d = (self.r, self.d) if own else (1.0, 0.0)
            rstd = 1.0 / math.sqrt(var + self.case.eps)
            xhat = (self.x - mean) * rstd
            z = (xhat * r + d) * self.s + self.t
            pre = z * self.gamma + self.beta + self.residual
            out = _act(pre, self.case)
            y[group] = out[group]
            rows = group & self.real
            if not rows.any():
                continue
            dy = _activated(out, self.dy, self.case)
            dgamma += math.fsum((dy * z)[rows])
            dbeta += math.fsum(dy[rows])
            g = (dy * self.gamma * self.s * r)[rows]
            if own:
                h = xhat[rows]
                g = g - math.fsum(g) / n - h * (math.fsum(g * h) / n) if n > 1 else 0.0 * g
            dx[rows] = rstd * g
        return y, dx, dgamma, dbeta

    def running(self, unbiased: bool) -> dict[str, float]:
        average = self._averages()
        if average is None or not np.isfinite(average[:2]).all():
            return {}
        mean, var, corrected = average
        t = self.batches + 1
        decay = 1.0 - 1.0 / t if self.case.decay is None else self._debiased(self.case.decay, t)

        def move(name: str, new: float, weight: float) -> float:
            return weight * self.state[name] + (1.0 - weight) * new

        renorm_decay = self._debiased(0.99, t)
        found = {"mean": move("mean", mean, decay)}
        if self.case.renorm is None:
            return found | {"var": move("var", corrected if unbiased else var, decay)}
        deviation = math.sqrt(var + self.case.eps)
        stddev = move("stddev", deviation, decay)
        return found | {
            "var": max(stddev**2 - self.case.eps, 0.0),
            "stddev": stddev,
            "renorm_mean": move("renorm_mean", mean, renorm_decay),
            "renorm_stddev": move("renorm_stddev", deviation, renorm_decay),
        }

    def _debiased(self, decay: float, t: int) -> float:
        if not self.case.debias or decay == 1.0:
            return decay
        exact = Fraction(decay)  # 1 - decay^t loses its digits where decay is close to 1
        return float(1 - (1 - exact) / (1 - exact**t)) if t < 100 else decay


def _act(pre: np.ndarray, case: Case) -> np.ndarray:
    if case.activation is None:
        return pre
    slope = {"relu": 0.0, "leaky_relu": 0.01}[case.activation]
    return np.where(pre > 0, pre, np.where(np.isnan(pre), pre, slope * pre))


def _activated(y: np.ndarray, dy: np.ndarray, case: Case) -> np.ndarray:
    if case.activation is None:
        return dy
    slope = {"relu": 0.0, "leaky_relu": 0.01}[case.activation]
    return np.where(y > 0, dy, slope * dy)


WAYS = {
    "naive-biased": Way(Path(partial(run, unbiased=False), False, tolerances.NAIVE)),
    "naive-unbiased": Way(Path(partial(run, unbiased=True), True, tolerances.NAIVE)),
}
