"""The limits beyond which a number becomes a finding."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """Where a number becomes a finding.

    Args:
        dead: a channel is dead if the standard deviation that it has left after normalization,
            `sqrt(var / (var + eps))`, is at most this. A living channel has 1; at 0.01 the variance
            is a ten-thousandth of eps, and the channel carries a hundredth of what gamma gives it.
            So is a channel whose variance is no more than the rounding of a constant of its mean
            to float32, `(2^-23·mean)²`.
        gain: `|gamma| / sqrt(var + eps)` explodes beyond this. A value of size 1 rounds to
            float16 by up to 2^-11; at 1000 the output moves by half a unit for that alone.
        offset: `|mean| / sqrt(var + eps)` is large beyond this. The variance as
            `E[x²] − E[x]²` in float32 is off by about `offset²·2^-24`, 1 % at 410.
        drift_warning: evaluation moves a channel's normalized values by more than this, in
            standard deviations (`quantities.Drift`); by less after an ordinary training with an
            ordinary momentum.
        drift_error: the same, by as much as the values themselves vary.
        sampling: standard errors that are put down to the few rows observed. n independent rows
            of a normal distribution make `sqrt(1.5 / n)` of drift.
        eps: taken where the source does not say its own, as in most checkpoints.
    """

    dead: float = 0.01
    gain: float = 1e3
    offset: float = 410.0
    drift_warning: float = 0.3
    drift_error: float = 1.0
    sampling: float = 4.0
    eps: float = 1e-5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (isinstance(value, (int, float)) and 0 <= value < math.inf):
                raise ValueError(
                    f"Thresholds: {name} must be a finite number, at least 0; got {value!r}."
                )
