"""What a batch normalization's arrays say, channel by channel, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from batchnorm.core.fold import inference_affine
from batchnorm.core.moments import Moments
from batchnorm.tools.state import BatchNormState

__all__ = ["Drift", "Observed", "Quantities", "derive"]

Vector = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Observed:
    """What one layer was given while batches ran through the model.

    Args:
        real: moments of the real rows, each field of shape (C,), merged over the batches (S14).
        everything: the same with padded rows counted; None where no mask was seen.
        rows: real rows, in the channel that has most.
        padded_rows: the others; 0 without a mask.
        calls: how many times the layer ran.
        skipped: calls that were left out of a channel's moments, because they were not finite.
    """

    real: Moments
    everything: Moments | None = None
    rows: float = 0.0
    padded_rows: float = 0.0
    calls: int = 1
    skipped: int = 0

    @property
    def padded(self) -> float | None:
        """Share of padded rows among all, or None without a mask."""
        total = self.rows + self.padded_rows
        if self.everything is None or not total:
            return None
        return self.padded_rows / total


@dataclass(frozen=True, eq=False)
class Drift:
    """How far evaluation, by the running statistics, moves x̂ from where training puts it.

    With m, v the running statistics and μ, σ² those observed, over the observed rows,
    `x̂_evaluation − x̂_training` has mean `shift = (μ − m) / sqrt(v + eps)`, and its root mean
    square is `distance`, in standard deviations. `ratio = sqrt((σ² + eps) / (v + eps))` is what
    evaluation multiplies the deviation with.

    Args:
        shift, ratio, distance: shape (C,); NaN where no row was observed, or the running variance
            has no root.
    """

    shift: Vector
    ratio: Vector
    distance: Vector


@dataclass(frozen=True, eq=False)
class Quantities:
    """What the arrays of one layer mean; every field has shape (C,), or is None.

    Args:
        std: running standard deviation; NaN where the variance is negative.
        signal: `sqrt(var / (var + eps))`, the deviation that the channel has left after
            normalization, 1 for a living one.
        offset: `|mean| / sqrt(var + eps)`.
        gain: `|gamma| / sqrt(var + eps)`, what evaluation multiplies a difference in x with.
        drift: against the real rows observed.
        drift_padded: against all rows, padded ones counted.
    """

    std: Vector | None = None
    signal: Vector | None = None
    offset: Vector | None = None
    gain: Vector | None = None
    drift: Drift | None = None
    drift_padded: Drift | None = None


def derive(state: BatchNormState, eps: float, observed: Observed | None = None) -> Quantities:
    """The quantities of a layer.

    Args:
        state: the layer's; without running statistics there are none.
        eps: used where the state does not know its own.
        observed: what the layer was given, or None.
    """
    if state.mean is None or state.var is None:
        return Quantities()
    eps = eps if state.eps is None else state.eps
    mean, var = _vector(state.mean), _vector(state.var)
    gamma = None if state.gamma is None else _vector(state.gamma)
    with np.errstate(all="ignore"):  # negative and non-finite variances are what is looked for
        rstd = 1.0 / np.sqrt(var + eps)
        gain, _ = inference_affine(mean, var, gamma, None, eps=eps, xp=cast(Any, np))
        return Quantities(
            std=np.sqrt(var),
            signal=np.sqrt(np.where(var == 0, 0.0, var / (var + eps))),
            offset=np.abs(mean) * rstd,
            gain=np.abs(gain),
            drift=None if observed is None else _drift(mean, var, observed.real, eps),
            drift_padded=None
            if observed is None or observed.everything is None
            else _drift(mean, var, observed.everything, eps),
        )


def _drift(mean: Vector, var: Vector, seen: Moments, eps: float) -> Drift:
    """The distance between running statistics and observed ones.

    Args:
        mean: running mean, shape (C,).
        var: running variance, shape (C,).
        seen: observed moments, each of shape (C,).
        eps: the layer's.
    """
    with np.errstate(all="ignore"):
        seen_mean = np.where(seen.count > 0, seen.mean, np.nan)
        seen_var = _vector(seen.var)
        rstd = 1.0 / np.sqrt(var + eps)
        shift = (seen_mean - mean) * rstd
        ratio = np.where(seen.count > 0, np.sqrt(seen_var + eps) * rstd, np.nan)
        # Of x̂ in training the deviation is sqrt(σ² / (σ² + eps)), a little below 1.
        power = np.where(seen_var == 0, 0.0, seen_var / (seen_var + eps))
        distance = np.sqrt(shift**2 + power * (ratio - 1.0) ** 2)
    return Drift(shift, ratio, distance)


def _vector(array: Any) -> Vector:
    return np.asarray(array, np.float64).reshape(-1)
