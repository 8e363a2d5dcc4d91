"""The moments of a step, as functions return and take them, and those of several passes (S21)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, export

from batchnorm.core import moments as core
from batchnorm.core.accumulate import contribution
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.core.merge import Parts, merge_parts
from batchnorm.core.moments import Centred, centred_from
from batchnorm.core.running import average_groups
from batchnorm.jax.checks import wide_type
from batchnorm.jax.namespace import XP

__all__ = ["APART", "AVERAGED", "Moments", "merge_moments"]

APART, AVERAGED = "apart", "averaged"
_VALUES = (Array, np.ndarray, np.generic, float)  # anything else stands for one: axes, shardings


class Moments(core.Moments):
    """Number of real rows, their mean and their biased variance; 0 where there are none.

    A named tuple of these three, and a pytree of four arrays: `low` comes along.

    Args:
        count: `(C,)`; with ghost batches `(G, C)`.
        mean: the same.
        var: the same.
        low: what rounding took from `mean`: their sum is the mean in twice the digits, which
            float32 needs at large offsets (S3). None: 0, or what stands for the mean in a tree of
            axes or shardings.
        groups: None; "apart" if the first axis is of ghost batches; "averaged" if the moments are
            averages of ghost batches, and `count` is the number of those that are not empty. A
            static part of the tree.
    """

    low: Any
    groups: str | None

    def __new__(
        cls, count: Any, mean: Any, var: Any, low: Any = None, groups: str | None = None
    ) -> Moments:
        """A mean without its low part has one of 0."""
        made = super().__new__(cls, count, mean, var)
        if low is None:
            low = jnp.zeros_like(mean) if isinstance(mean, _VALUES) else mean
        made.low, made.groups = low, groups
        return made

    @classmethod
    def of(cls, centred: Centred, groups: str | None, shape: Sequence[int]) -> Moments:
        """The core's moments, of this shape."""
        found = cls(*centred.moments, jax.lax.stop_gradient(centred.low), groups)
        return found.map(lambda a: jnp.reshape(a, shape))

    @classmethod
    def _make(cls, iterable: Iterable[Any]) -> Moments:  # type: ignore[override]
        return cls(*iterable)

    def _replace(self, **changes: Any) -> Moments:
        """Another mean has no low part unless one is given."""
        low = None if "mean" in changes else self.low
        kept = {**self._asdict(), "low": low, "groups": self.groups}
        if unknown := sorted(changes.keys() - kept.keys()):
            raise ValueError(f"Got unexpected field names: {unknown!r}")
        return type(self)(**{**kept, **changes})

    def map(self, function: Callable[[Any], Any]) -> Moments:
        """The same with `function` applied to every array."""
        count, mean, var, low = map(function, (*self, self.low))
        return type(self)(count, mean, var, low, self.groups)


def _flatten(moments: Moments) -> tuple[tuple[tuple[Any, Any], ...], str | None]:
    named = {**moments._asdict(), "low": moments.low}
    return tuple((jax.tree_util.GetAttrKey(k), a) for k, a in named.items()), moments.groups


def _unflatten(groups: str | None, children: Iterable[Any]) -> Moments:
    """Children may be anything: nothing is made of them."""
    *fields, low = children
    made = tuple.__new__(Moments, fields)
    made.low, made.groups = low, groups
    return made


jax.tree_util.register_pytree_with_keys(Moments, _flatten, _unflatten)
# Exported programs may take and return them; the first are those of older programs.
export.register_namedtuple_serialization(core.Moments, serialized_name="batchnorm.Moments")
export.register_pytree_node_serialization(
    Moments,
    serialized_name="batchnorm.jax.Moments",
    serialize_auxdata=lambda groups: (groups or "").encode(),
    deserialize_auxdata=lambda data: data.decode() or None,
)


@names_errors("merge_moments")
def merge_moments(parts: Moments | Sequence[Moments]) -> Moments:
    """Moments of several forward passes, as if their rows had been one batch (S21).

    A step whose gradient is accumulated over several passes moves the running statistics once:
    `update_running(running, merge_moments(parts))`. Each pass is still normalized by its own
    moments. The result may be merged again, in any order: a part of a `lax.scan`'s carry too.

    Args:
        parts: a sequence of what `batch_norm` returned, all of one shape; or such Moments whose
            arrays are stacked on a new first axis, as `lax.scan` and `jax.vmap` return them.

    Returns:
        Moments, `(C,)`. Of ghost batches these are their average, over all that are not empty, and
        `count` is the number of those. Parts without real rows contribute nothing. A channel with
        moments that are not finite in one part has none here, so that it will not move (S9).

    Raises:
        TypeError: not Moments.
        ValueError: no parts; parts of different shapes, or of ghost batches and of none.

    Source: S12, S14, S21; Chan, Golub and LeVeque 1983, equation 2.1b.

    >>> from batchnorm.jax import batch_norm
    >>> x = jnp.array([[1.0], [3.0], [5.0], [7.0]])
    >>> parts = [batch_norm(half)[1] for half in (x[:2], x[2:])]
    >>> count, mean, var = merge_moments(parts)
    >>> count.tolist(), mean.tolist(), var.tolist()
    ([4.0], [4.0], [5.0])
    """
    if isinstance(parts, core.Moments):
        contributions, groups = _stacked(_complete(parts))
    else:
        contributions, groups = _listed(parts)
    merged = merge_parts(contributions, XP, spread=groups is None)
    return Moments.of(merged, groups, merged.power.shape)


def _stacked(parts: Moments) -> tuple[Parts, str | None]:
    """The contributions of parts on the first axis."""
    least = 3 if parts.groups == APART else 2
    shape = jnp.shape(parts.mean)
    if len(shape) < least:
        raise ArgumentValueError(
            f"parts must be a sequence of Moments, or Moments whose arrays are stacked on a new "
            f"first axis; got one with a mean of shape {shape}. Put it into a list."
        )
    if shape[0] == 0:
        raise ArgumentValueError(f"parts must hold at least one; got a mean of shape {shape}.")
    return _contribution(parts, 1), parts.groups and AVERAGED


def _listed(parts: Any) -> tuple[Parts, str | None]:
    """The contributions of parts in a sequence, stacked."""
    found = list(parts) if isinstance(parts, Iterable) else [parts]
    if wrong := [type(a).__name__ for a in found if not isinstance(a, core.Moments)]:
        raise ArgumentTypeError(
            f"parts must be Moments, as batch_norm returns them, in a sequence or stacked; got "
            f"{wrong[0]}."
        )
    if not found:
        raise ArgumentValueError("parts must hold at least one; got none.")
    every = [_complete(part) for part in found]
    kinds = {part.groups is not None for part in every}
    if len(kinds) > 1:
        raise ArgumentValueError(
            "parts must all be of ghost batches, or none of them; got both. What a loop starts "
            'from says so too: Moments(zeros, zeros, zeros, groups="averaged").'
        )
    one = [_contribution(part, 0) for part in every]
    shapes = sorted({tuple(part.power.shape) for part in one})
    if len(shapes) > 1:
        raise ArgumentValueError(
            f"parts must have the same channels; got shapes {', '.join(map(str, shapes))}."
        )
    dtype = wide_type(*(part.power.dtype for part in one))
    stacked = (jnp.stack([a.astype(dtype) for a in column]) for column in zip(*one, strict=True))
    return Parts(*stacked), AVERAGED if kinds == {True} else None


def _complete(part: core.Moments) -> Moments:
    """With arrays of one shape and type, and a low part."""
    if not isinstance(part, Moments):  # of a program that an older version exported
        part = Moments(*part)
    like = jnp.asarray(part.mean)
    return part.map(lambda a: jnp.broadcast_to(jnp.asarray(a).astype(like.dtype), like.shape))


def _contribution(part: Moments, axis: int) -> Parts:
    """The moments that a part adds to its step; `axis` is that of its ghost batches."""
    apart = part.groups == APART
    count, mean, var = part
    centred = centred_from(count, mean, part.low, var, XP)
    average = average_groups(centred, axis if apart else None, XP)
    found = contribution(average, apart, False, XP)
    return Parts(*(jnp.squeeze(a, axis) for a in found)) if apart else found
