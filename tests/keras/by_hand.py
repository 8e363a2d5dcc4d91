"""A training step in NumPy, written from the specification and sharing no code with the package."""

from __future__ import annotations

from typing import Any

import numpy as np


def train(
    x: np.ndarray,
    real: np.ndarray,
    state: dict[str, np.ndarray],
    axes: tuple[int, ...],
    *,
    momentum: float = 0.99,
    eps: float = 1e-3,
    ghost: int | None = None,
    renorm: dict[str, float] | None = None,
    renorm_momentum: float = 0.99,
    s: Any = 1.0,
    t: Any = 0.0,
) -> np.ndarray:
    """y of a training step with gamma 1 and beta 0; updates `state`, with arrays per channel.

    Args:
        x: input.
        real: of x's shape, True at real positions.
        state: moving_mean, moving_variance, and with renorm the other three.
        axes: channel axes, sorted.
        momentum, eps, ghost, renorm, renorm_momentum: as the layer's.
        s, t: the adjustment's scale and bias, broadcastable against x.
    """
    x = np.asarray(x, np.float64)
    z = np.empty_like(x)
    groups = 1 if ghost is None else x.shape[0] // ghost
    member = np.arange(x.shape[0]) % groups  # S12
    for channel in np.ndindex(*(x.shape[a] for a in axes)):
        at: list[Any] = [slice(None)] * x.ndim
        for axis, index in zip(axes, channel, strict=True):
            at[axis] = index
        place = tuple(at)
        z[place] = _channel(
            x[place], real[place], member, groups, state, channel, momentum, eps, renorm,
            renorm_momentum,
        )  # fmt: skip
    return z * s + t


def _channel(
    x: np.ndarray,
    real: np.ndarray,
    member: np.ndarray,
    groups: int,
    state: dict[str, np.ndarray],
    channel: tuple[int, ...],
    momentum: float,
    eps: float,
    renorm: dict[str, float] | None,
    renorm_momentum: float,
) -> np.ndarray:
    values = [x[member == g][real[member == g]] for g in range(groups)]
    full = [v for v in values if v.size]
    if full:
        mean = np.mean([v.mean() for v in full])
        var = np.mean([v.var() for v in full])
    r, d = 1.0, 0.0
    if renorm is not None and full:  # S11
        floor = max(state["renorm_stddev"][channel], np.sqrt(eps))
        r = np.clip(np.sqrt(var + eps) / floor, renorm.get("rmin", 0), renorm.get("rmax", np.inf))
        limit = renorm.get("dmax", np.inf)
        d = np.clip((mean - state["renorm_mean"][channel]) / floor, -limit, limit)
    z = np.empty_like(x)
    for g, v in enumerate(values):
        rows = member == g
        if v.size:
            z[rows] = (x[rows] - v.mean()) / np.sqrt(v.var() + eps) * r + d
        else:  # S6
            kept = state["moving_variance"][channel]
            z[rows] = (x[rows] - state["moving_mean"][channel]) / np.sqrt(kept + eps)
    if not full or not np.isfinite([mean, var]).all():
        return z

    def move(name: str, new: float, weight: float = momentum) -> None:
        state[name][channel] = weight * state[name][channel] + (1 - weight) * new

    move("moving_mean", mean)
    if renorm is None:
        move("moving_variance", var)
        return z
    move("moving_stddev", np.sqrt(var + eps))
    state["moving_variance"][channel] = max(state["moving_stddev"][channel] ** 2 - eps, 0.0)
    move("renorm_mean", mean, renorm_momentum)
    move("renorm_stddev", np.sqrt(var + eps), renorm_momentum)
    return z
