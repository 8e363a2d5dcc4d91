"""Calls of linear maps and batch norms, and the channels in the memory of their outputs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.private import find_address


class Layout(NamedTuple):
    """The place of a strided tensor's elements in its memory, which has room for `size`."""

    storage: int
    size: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


def layout_of(tensor: Tensor) -> Layout | None:
    """The layout of a strided tensor, else None."""
    if tensor.layout is not torch.strided or tensor.is_nested:
        return None
    memory = tensor.untyped_storage()
    size = memory.nbytes() // tensor.element_size()
    shape, offset = tuple(tensor.shape), int(tensor.storage_offset())
    return Layout(find_address(memory), size, tensor.dtype, shape, tensor.stride(), offset)


@dataclass(eq=False)
class Call:
    """A call of a linear map or a batch norm.

    Attributes:
        module: has the parameters.
        kind: the axes of a linear map; None for a batch norm.
        given: the arguments by name; of the module, or of the function that it calls.
        x: layout of the input, None if it has none.
        source: the call whose output the input is, or the name of what made it.
        whole: the module does nothing else.
        y: layout of the output.
        readers: calls and names of operators that compute with the output.
        copies: layouts of parts of the output that were copied, and of the copies.
    """

    module: Any
    kind: maps.LinearMap | None
    given: dict[str, Any]
    x: Layout | None
    source: Call | str
    whole: bool
    y: Layout | None = None
    readers: list[Call | str] = field(default_factory=list)
    copies: list[tuple[Layout, Layout]] = field(default_factory=list)


def reaches(call: Call, axis: int | None, x: Layout | None, x_axis: int | None) -> bool:
    """True if axis `x_axis` of a tensor in the memory of a call's output counts its channels.

    Every element of the output is marked with its channel, copies take the marks along, and the
    tensor must find them in order. So views, transposed and flattened ones too, need no rules.
    """
    if call.y is None or x is None or axis is None or x_axis is None:
        return False
    if call.y.dtype is not x.dtype or not x.shape or not call.y.shape[axis]:
        return False
    marks = {call.y.storage: _write(call.y, _numbers(call.y.shape, axis))}
    for source, copy in call.copies:
        marks[copy.storage] = _write(copy, _read(marks[source.storage], source))
    found = _read(marks[x.storage], x) if x.storage in marks else None
    return (
        found is not None
        and found.shape[x_axis] == call.y.shape[axis]
        and torch.equal(found, _numbers(x.shape, x_axis))
    )


def _numbers(shape: tuple[int, ...], axis: int) -> Tensor:
    sizes = [1] * len(shape)
    sizes[axis] = shape[axis]
    return torch.arange(shape[axis], dtype=torch.int32).reshape(sizes).expand(shape)


def _write(layout: Layout, values: Tensor) -> Tensor:
    memory = torch.full((layout.size,), -1, dtype=torch.int32)
    memory.as_strided(layout.shape, layout.stride, layout.offset).copy_(values)
    return memory


def _read(memory: Tensor, layout: Layout) -> Tensor:
    return memory.as_strided(layout.shape, layout.stride, layout.offset)
