"""The kinds of variables that the nnx layer has beside statistics and parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from flax import nnx

from batchnorm.core.config import Renorm, change_clipping
from batchnorm.jax.checks import read_values
from batchnorm.jax.options import split_limits

__all__ = ["Momentum", "PassStatistics", "RenormLimit", "Renormalization"]

LIMITS = ("rmin", "rmax", "dmax")


class Momentum(nnx.Variable):
    """The weight of the old running value: an array, so that changing it compiles nothing anew."""


class RenormLimit(nnx.Variable):
    """A limit of renormalization's r or d: an array, so that a schedule compiles nothing anew.

    A setting rather than a statistic: states of `nnx.BatchStat` and `nnx.Param` leave it out.
    """


class PassStatistics(nnx.BatchStat):
    """The moments of a step's passes so far, stacked: count, mean, variance, low part of mean."""


class Renormalization(nnx.Pytree):
    """The `renorm` of a layer: `decay`, static, and the limits `rmin`, `rmax`, `dmax` (S11).

    Args:
        renorm: in the core's terms.
        stack: leading axes of stacked layers.
        dtype: of the limits.
    """

    rmin: RenormLimit
    rmax: RenormLimit
    dmax: RenormLimit

    def __init__(self, renorm: Renorm, stack: tuple[int, ...], dtype: Any) -> None:
        self.decay = renorm.decay
        for name in LIMITS:
            value = jnp.asarray(getattr(renorm, name)).astype(dtype)
            setattr(self, name, RenormLimit(jnp.broadcast_to(value, stack)))

    def read(self) -> Renorm:
        """The same in the core's terms."""
        return Renorm(self.decay, **{name: getattr(self, name)[...] for name in LIMITS})

    def clip(self, limits: Mapping[str, Any]) -> None:
        """Set those that are not None; none is set if one does not do."""
        known, traced = split_limits(limits)
        # Values that only the program knows are not compared.
        changed = change_clipping(Renorm(self.decay, **self._values(traced)), known)
        for name, value in limits.items():
            if value is not None:
                held = getattr(self, name)
                new = jnp.asarray(traced.get(name, getattr(changed, name)))
                held[...] = jnp.broadcast_to(new.astype(held[...].dtype), held[...].shape)

    def _values(self, without: Mapping[str, Any]) -> dict[str, float]:
        """The limits that are known now, as the decimals that were most likely typed."""
        found = {}
        for name in LIMITS:
            values = read_values(getattr(self, name)[...])
            if values is not None and values.size and name not in without:
                worst = values.max() if name == "rmin" else values.min()
                found[name] = float(str(worst))
        return found


def hold_renorm(
    renorm: Renorm | None, stack: tuple[int, ...], dtype: Any
) -> Renormalization | None:
    """What a layer keeps of checked options."""
    return None if renorm is None else Renormalization(renorm, stack, dtype)
