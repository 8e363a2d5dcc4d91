"""The limits beyond which a number becomes a finding."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Thresholds"]


@dataclass(frozen=True)
class Thresholds:
    """The limits beyond which a number becomes a finding.

    Args:
        dead: a channel is dead if its standard deviation after normalization,
            `sqrt(var / (var + eps))`, is at most this. A normal channel has 1. At 0.01 the variance
            is a ten-thousandth of eps, and the output varies by a hundredth of gamma. A channel is
            dead, too, if its variance is no larger than the rounding of its mean to float32
            explains, `(2^-23·mean)²`.
        gain: limit of `|gamma| / sqrt(var + eps)`. Rounding to float16 moves a value of size 1 by
            up to 2^-11; a gain of 1000 makes half a unit of output from that alone.
        offset: limit of `|mean| / sqrt(var + eps)`. A variance computed as
            `E[x²] − E[x]²` in float32 is off by about `offset²·2^-24`, 1 % at 410.
        drift_warning: largest distance by which evaluation may move a channel's normalized values
            without a warning, in standard deviations (`quantities.Drift`). Ordinary training with
            an ordinary momentum stays below it.
        drift_error: the same distance for an error; at 1, values move by as much as they vary.
        sampling: number of standard errors by which few observed rows may raise both limits. The
            standard error of n independent rows of a normal distribution is `sqrt(1.5 / n)`.
        eps: for layers whose source does not say theirs, as most checkpoints.
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
