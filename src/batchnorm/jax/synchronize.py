"""Statistics over a named axis of devices (S14)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchnorm.core.errors import ArgumentNameError, ArgumentValueError
from batchnorm.core.merge import GatherMerge, Merge, Parts
from batchnorm.jax.namespace import XP
from batchnorm.jax.private import varying_axes

Groups = Sequence[Sequence[int]] | None


def make_merge(axis_name: Any, axis_index_groups: Groups) -> Merge | None:
    """The merge of this device's statistics with the others' along `axis_name`; None without one.

    Raises:
        NameError: no transformation around this call binds `axis_name`.
        ValueError: groups that are not a partition of the axis.
    """
    if axis_name is None:
        if axis_index_groups is not None:
            raise ArgumentValueError(
                f"axis_index_groups needs axis_name; got axis_name=None and {axis_index_groups!r}."
            )
        return None
    try:
        size = jax.lax.axis_size(axis_name)
    except NameError as error:
        raise ArgumentNameError(
            f"axis_name={axis_name!r} is not bound here; call this inside jax.shard_map, "
            f"jax.pmap or jax.vmap(axis_name={axis_name!r}), or pass axis_name=None. Under plain "
            "jit with sharded arrays statistics are global without it."
        ) from error
    members = None if axis_index_groups is None else _group_of(axis_index_groups, size)

    def gather(parts: Parts) -> Parts:
        # One collective for all five; every device merges them in the order of the axis.
        one = jnp.stack([jnp.broadcast_to(a, parts.power.shape) for a in parts])
        stacked = _all_gather(one, axis_name)  # (participants, 5, ...)
        found = Parts(*(stacked[:, i] for i in range(len(parts))))
        if members is None:
            return found
        group = jnp.asarray(members)
        mine = group == group[jax.lax.axis_index(axis_name)]
        shape = (size,) + (1,) * (found.count.ndim - 1)
        return found._replace(count=jnp.where(mine.reshape(shape), found.count, 0.0))

    return GatherMerge(gather, XP)


def _all_gather(a: jax.Array, axis_name: Any) -> jax.Array:
    """Every participant's `a`, in a type that lets shard_map return it as equal everywhere."""
    names = axis_name if isinstance(axis_name, tuple) else (axis_name,)
    found = a
    for name in reversed(names):  # one by one: vmap cannot gather along several at once
        to = "invarying" if name in varying_axes(a) else "varying"
        found = jax.lax.all_gather(found, name, to=to)
    participants = math.prod(found.shape[: len(names)])  # not -1, which a size of 0 forbids
    return found.reshape((participants, *a.shape))


def _group_of(groups: Sequence[Sequence[int]], size: int) -> np.ndarray:
    """The number of the group of each index of the axis."""
    flat = [int(i) for group in groups for i in group]
    if sorted(flat) != list(range(size)):
        raise ArgumentValueError(
            f"axis_index_groups must hold each of the {size} indices of the axis once; "
            f"got {groups!r}."
        )
    found = np.zeros(size, np.int32)
    for number, group in enumerate(groups):
        found[np.asarray(group, int)] = number
    return found
