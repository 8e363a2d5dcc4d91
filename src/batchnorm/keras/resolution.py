"""A mask at the resolution of a layer that is not the one the mask was made for."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from batchnorm.core.errors import ArgumentValueError
from batchnorm.keras.functional import BACKEND


def at_resolution(mask: Any, rule: str | None, x: Any, axes: tuple[int, ...]) -> Any:
    """A boolean mask with x's rows, or a prefix of them.

    Sizes that a graph does not know are compared when it runs; without a rule, they must be equal.

    Raises:
        ValueError: sizes that do not fit, or blocks that are partly padding without a rule.
    """
    rows = [a for a in range(len(x.shape)) if a not in axes]
    sizes, wanted = tuple(mask.shape), tuple(x.shape[a] for a in rows)
    merges = rule is not None and len(sizes) == len(wanted)
    if len(sizes) <= len(wanted) and all(
        not (merges and axis > 0) if None in (size, goal) else size == goal
        for axis, (size, goal) in enumerate(zip(sizes, wanted, strict=False))
    ):
        return mask
    if not wanted or len(wanted) > len(sizes) or _differ(sizes[0], wanted[0]):
        raise _misfit(sizes, wanted, "the batch axis or the number of axes differs")
    # Axes that pooling or flattening removed are one block each.
    target = (*wanted, *(1,) * (len(sizes) - len(wanted)))
    for axis in range(1, len(sizes)):
        size, goal = sizes[axis], target[axis]
        if size is None or goal is None or size == goal:
            continue
        if goal > size:
            raise _misfit(sizes, wanted, f"{goal} is finer than {size} on axis {axis}")
        if goal == 0 or size % goal != 0:
            raise _misfit(sizes, wanted, f"{goal} does not divide {size} on axis {axis}")
    now = keras.ops.shape(x)
    goals = [now[a] for a in rows] + [1] * (len(sizes) - len(wanted))
    merged = _merge_blocks(mask, goals, rule)
    if merged is None:
        raise ArgumentValueError(
            f"in padding_mask, a mask of shape {sizes} does not carry over to a layer "
            f"with rows {wanted}: some blocks are partly padding, or may be in compiled code. Pad "
            'to whole blocks, or say rescale="any" or rescale="all".'
        )
    return keras.ops.reshape(merged, goals[: len(wanted)])


def _differ(size: int | None, goal: int | None) -> bool:
    return None not in (size, goal) and size != goal


def _merge_blocks(mask: Any, goals: list[Any], rule: str | None) -> Any:
    """One position for each block by `rule`; None if a block is mixed and there is no rule."""
    sizes = keras.ops.shape(mask)
    split = [mask.shape[0] or sizes[0], 1]
    for size, goal in zip(sizes[1:], goals[1:], strict=True):
        # A size that the graph does not know, and that does not divide, fails in the reshape.
        split += [goal, size // goal]
    some = every = keras.ops.reshape(mask, split)
    for axis in range(len(split) - 1, 0, -2):  # one by one: Keras 3.14 on torch takes no several
        some, every = keras.ops.any(some, axis=axis), keras.ops.all(every, axis=axis)
    if rule is None:
        if BACKEND.find_trace() is not None:
            return None
        some, every = (np.asarray(keras.ops.convert_to_numpy(a)) for a in (some, every))
        if not np.array_equal(some, every):
            return None
        return keras.ops.convert_to_tensor(every)
    return every if rule == "all" else some


def _misfit(sizes: Any, wanted: Any, reason: str) -> ArgumentValueError:
    return ArgumentValueError(
        f"in padding_mask, a mask of shape {sizes} does not fit a layer with rows "
        f"{wanted}: {reason}. Put a Remask before this layer, pass mask= to it, or wrap it in "
        "padding_mask(None)."
    )
