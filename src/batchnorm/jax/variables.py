"""The kinds of variables that the nnx layer has beside statistics and parameters."""

from __future__ import annotations

from collections.abc import Container, Mapping
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

    def known(self, without: Container[str]) -> dict[str, float]:
        """The limits that have values now, as the decimals that were most likely typed."""
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
    """The form in which a layer keeps checked options."""
    return None if renorm is None else Renormalization(renorm, stack, dtype)


def set_limits(renorm: Renormalization | None, limits: Mapping[str, Any]) -> None:
    """Set those that are not None; none is set if one does not do."""
    known, traced = split_limits(limits)
    # Values that only the program knows are not compared.
    held = None if renorm is None else Renorm(renorm.decay, **renorm.known(traced))
    changed = change_clipping(held, known)
    for name, value in limits.items():
        if value is not None:
            variable = getattr(renorm, name)
            new = jnp.asarray(traced.get(name, getattr(changed, name))).astype(variable.dtype)
            variable[...] = jnp.broadcast_to(new, variable.shape)


def value_of(option: Any) -> Any:
    """The value of an option that may be in variables."""
    if isinstance(option, Renormalization):
        return option.read()
    return option[...] if isinstance(option, nnx.Variable) else option
