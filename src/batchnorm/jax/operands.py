"""The record of a step, as primitives carry it: its arrays, and its static parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from jax import Array

from batchnorm.core.config import Options, Renorm
from batchnorm.core.forward import Inputs
from batchnorm.core.layout import Layout
from batchnorm.jax.checks import working_type


class Operands(NamedTuple):
    """Arrays of a step, each but x may be None; per-channel ones in the working type.

    The running statistics serve empty channels (S6) or, if the call is not by batch statistics,
    all of them. `limits` are renormalization's rmin, rmax and dmax (S11). `decay` is the weight of
    the old running statistics, where a step moves them (S9).
    """

    x: Array
    mask: Array | None = None
    gamma: Array | None = None
    beta: Array | None = None
    mean: Array | None = None
    var: Array | None = None
    renorm_mean: Array | None = None
    renorm_stddev: Array | None = None
    limits: Array | None = None
    decay: Array | None = None

    def inputs(self, s: Array | None = None, t: Array | None = None) -> Inputs:
        """The arrays as the core takes them; s and t are the adjustment's (S13)."""
        real = None if self.mask is None else self.mask.astype(bool)
        x = self.x.astype(working_type(self.x))
        return Inputs(x, real, gamma=self.gamma, beta=self.beta, s=s, t=t)


class Static(NamedTuple):
    """The static parameters of a step.

    Attributes:
        layout: of x.
        eps: added to the variance.
        batch: normalize by the batch's own statistics.
        renorm: batch renormalization, by the operands' limits.
        padded_output: as in Options.
        demanded: fused=True, so that a device without kernels is an error.
        owner: the layer or function, for errors and explanations.
        update: move the running mean and variance by the operands' decay.
        present: for each of the operands, True if there is one; `run_step` fills it in.
    """

    layout: Layout
    eps: float
    batch: bool
    renorm: bool
    padded_output: str
    demanded: bool
    owner: str
    update: bool = False
    present: tuple[bool, ...] = ()

    def options(self, limits: Array | None, decay: Any = None) -> Options:
        """The options that a step depends on; `limits` and `decay` as in Operands."""
        renorm = None if limits is None else Renorm(rmin=limits[0], rmax=limits[1], dmax=limits[2])
        return Options(eps=self.eps, decay=decay, renorm=renorm, padded_output=self.padded_output)

    def operands(self, arrays: Sequence[Any]) -> Operands:
        """The arrays a primitive was bound to, by name."""
        given = iter(arrays)
        return Operands(*[next(given) if there else None for there in self.present])  # type: ignore[arg-type]
