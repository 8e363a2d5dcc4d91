"""The state of one batch normalization in the specification's terms, from any source."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.core.running import LONG_RUNNING

__all__ = ["BatchNormState", "RenormState"]

FloatArray = NDArray[np.floating]
Variance = Literal["biased", "unbiased"]


@dataclass(frozen=True, eq=False)
class RenormState:
    """The statistics of batch renormalization beside the running ones (S11).

    Args:
        moving_stddev: shape (C,).
        renorm_mean: shape (C,).
        renorm_stddev: shape (C,).
    """

    moving_stddev: FloatArray
    renorm_mean: FloatArray
    renorm_stddev: FloatArray


@dataclass(frozen=True, eq=False)
class BatchNormState:
    """The canonical state of a batch normalization layer.

    Args:
        name: path of the layer in its model or file, as its framework spells it, like
            `layer1.0.bn1`; empty for a layer by itself.
        kind: class of the layer, like `torch.nn.BatchNorm2d` or `flax.nnx.BatchNorm`, or family
            of names in a checkpoint, like `torch`.
        mean: running mean, shape (C,), in the type in which it was stored (half types as float32,
            and `stored` keeps the name); None where the layer keeps none.
        var: running variance, like mean.
        gamma: scale, shape (C,), or None where the layer has none.
        beta: offset, like gamma.
        variance: kind of variance in `var` (S10); None where the source does not say.
        eps: added to the variance; None where the source does not say, as in most checkpoints.
        decay: weight of the old value in the running update (S9); None where the source does not
            say.
        cumulative: running statistics are the plain average of all batches (torch's
            `momentum=None`); `decay` is None then.
        steps: number of updates so far, torch's `num_batches_tracked`; None if not kept.
        renorm: batch renormalization's state, or None.
        shape: of the arrays in the source, if that is not (C,): several channel axes, ghost
            batches, or a per-element layer. The arrays here are flattened in C order.
        stored: dtype name of the running statistics in the source, like "bfloat16".
    """

    name: str
    kind: str
    mean: FloatArray | None
    var: FloatArray | None
    gamma: FloatArray | None = None
    beta: FloatArray | None = None
    variance: Variance | None = None
    eps: float | None = None
    decay: float | None = None
    cumulative: bool = False
    steps: int | None = None
    renorm: RenormState | None = None
    shape: tuple[int, ...] | None = None
    stored: str | None = None

    @property
    def counted(self) -> int | None:
        """The steps, if they were counted from the start; None where nobody knows (S23)."""
        return None if self.steps is None or self.steps >= LONG_RUNNING else self.steps

    @property
    def debiasing(self) -> int:
        """The counter of a layer that debiases: at most, and where there is none, long-running."""
        return LONG_RUNNING if self.steps is None else min(self.steps, LONG_RUNNING)

    @property
    def channels(self) -> int:
        """Number of channels; 0 where there is neither parameter nor statistic."""
        for array in (self.mean, self.var, self.gamma, self.beta):
            if array is not None:
                return int(array.size)
        return 0
