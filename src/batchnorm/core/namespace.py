"""The functions that the core needs of an array library."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

Array = Any
"""An array of whichever library `xp` belongs to."""


class Namespace(Protocol):
    """The functions a front end supplies as `xp`.

    All but the last four are spelled alike in numpy, torch, jax.numpy and TensorFlow's numpy
    API, so a front end mostly re-exports its framework's own.
    """

    def sum(self, a: Array, *, axis: Sequence[int], keepdims: bool) -> Array: ...
    def max(self, a: Array, *, axis: int) -> Array: ...
    def abs(self, a: Array) -> Array: ...
    def sqrt(self, a: Array) -> Array: ...
    def square(self, a: Array) -> Array: ...
    def log(self, a: Array) -> Array: ...
    def expm1(self, a: Array) -> Array: ...
    def isfinite(self, a: Array) -> Array: ...
    def where(self, condition: Array, a: Array, b: Array) -> Array: ...
    def reshape(self, a: Array, shape: Sequence[int]) -> Array: ...
    def zeros_like(self, a: Array) -> Array: ...
    def ones_like(self, a: Array) -> Array: ...

    def broadcast_like(self, a: Array, x: Array) -> Array:
        """`a` broadcast to x's shape; its gradient is a sum like any other, in a fixed order."""
        ...

    def materialize(self, a: Array) -> Array:
        """`a`, with a value per channel, made once: for compilers that would repeat its making."""
        ...

    def cast(self, a: Array, dtype: Any) -> Array:
        """`a` in `dtype`."""
        ...

    def stop_gradient(self, a: Array) -> Array:
        """`a` as a constant to differentiation."""
        ...


def smallest_normal(a: Array) -> float:
    """The smallest positive number of `a`'s type whose reciprocal is finite and not 0."""
    return 2.0**-1022 if "float64" in str(a.dtype) else 2.0**-126


def select(mask: Array | None, a: Array, b: Array | float, xp: Namespace) -> Array:
    """`a` at real rows, `b` at padded ones; selecting, because NaN · 0 is NaN (S2)."""
    return a if mask is None else xp.where(mask, a, b)


def times(a: Array | None, b: Array | None) -> Array | None:
    """a·b, where None as b is 1 and None as a is 0."""
    return a if a is None or b is None else a * b


def plus(a: Array | None, b: Array | None) -> Array | None:
    """a + b, where None is 0."""
    if a is None or b is None:
        return a if b is None else b
    return a + b
