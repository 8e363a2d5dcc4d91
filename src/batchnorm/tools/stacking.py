"""Splitting the states of stacked layers, which files and trees hold in one."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace

from batchnorm.tools.arrays import odd_shape
from batchnorm.tools.state import BatchNormState, FloatArray, RenormState
from batchnorm.tools.text import plain

__all__ = ["unstack"]

_SLICE = re.compile(r"(.*)\[([\d,]+)\]", re.DOTALL)  # as find_layers names them


def unstack(
    sources: Sequence[BatchNormState], targets: Sequence[BatchNormState]
) -> list[BatchNormState]:
    """The sources; one that holds several layers of the target is split into them.

    Args:
        sources: a file's states, where stacked layers are one with arrays of shape (n, C).
        targets: a model's, where each is a layer of its own, like `blocks.norm[0]`.
    """
    stacks: dict[str, tuple[int, ...]] = {}
    for target in targets:
        found = _SLICE.fullmatch(target.name)
        if found:  # the last one has the largest index
            stacks[plain(found[1])] = tuple(int(i) + 1 for i in found[2].split(","))
    return [part for s in sources for part in _parts(s, stacks.get(plain(s.name), ()))]


def _parts(state: BatchNormState, stack: tuple[int, ...]) -> Iterator[BatchNormState]:
    shape = state.shape or (state.channels,)
    if not stack or shape[: len(stack)] != stack or len(shape) == len(stack):
        yield state
        return

    def cut(array: FloatArray | None, part: slice) -> FloatArray | None:
        return None if array is None else array[part]

    size = math.prod(shape[len(stack) :])
    for position, index in enumerate(itertools.product(*map(range, stack))):
        part = slice(position * size, (position + 1) * size)
        renorm = None
        if state.renorm is not None:
            renorm = RenormState(*(array[part] for array in vars(state.renorm).values()))
        yield replace(
            state,
            name=f"{state.name}[{','.join(map(str, index))}]",
            shape=odd_shape(shape[len(stack) :]),
            renorm=renorm,
            mean=cut(state.mean, part),
            var=cut(state.var, part),
            gamma=cut(state.gamma, part),
            beta=cut(state.beta, part),
        )
