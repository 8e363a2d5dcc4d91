"""S19 on the weights of a linear map, in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from batchnorm.core import fold as core
from batchnorm.numpy_namespace import XP
from batchnorm.tools.state import BatchNormState


class Affine(NamedTuple):
    """An inference batch norm, y = scale·x + offset."""

    scale: Any
    offset: Any

    @property
    def moves_zero(self) -> bool:
        """True if it maps 0 to something else, so that padding before it and behind it differ."""
        return bool(np.any(self.offset != 0.0))


def refuse_zeroing(norm: Any) -> str | None:
    """The reason against folding a layer that zeroes padded rows (S4), or None."""
    if getattr(norm, "padded_output", "normalize") == "normalize":
        return None
    return (
        "zeroes padded rows (padded_output='zero'), which no linear map does; set it to "
        "'normalize' if the folded model gets no padding"
    )


def affine_of(state: BatchNormState) -> Affine:
    """The batch norm of a state with running statistics, in float64."""
    assert state.eps is not None

    def wide(a: Any) -> Any:
        return None if a is None else np.asarray(a, np.float64)

    with np.errstate(all="ignore"):  # a negative variance shows in the outputs, as it did before
        return Affine(
            *core.inference_affine(
                wide(state.mean),
                wide(state.var),
                wide(state.gamma),
                wide(state.beta),
                eps=state.eps,
                xp=XP,
            )
        )


def into_previous(
    weight: Any, bias: Any, affine: Affine, *, axis: int, groups: int = 1
) -> core.Folded:
    """Weight and bias of the map before a batch norm; arguments as in the core."""
    weight = np.asarray(weight, np.float64)
    with np.errstate(all="ignore"):
        return core.fold_into_previous(weight, bias, *affine, axis=axis, groups=groups, xp=XP)


def into_next(
    weight: Any, bias: Any, affine: Affine, *, axis: int, output_axis: int, groups: int = 1
) -> core.Folded:
    """Weight and bias of the map behind a batch norm; arguments as in the core."""
    weight = np.asarray(weight, np.float64)
    with np.errstate(all="ignore"):
        return core.fold_into_next(
            weight, bias, *affine, axis=axis, output_axis=output_axis, groups=groups, xp=XP
        )
