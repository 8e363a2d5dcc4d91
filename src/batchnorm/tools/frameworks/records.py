"""The records that adapters and tools exchange."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from numpy.typing import NDArray

from batchnorm.core.moments import Moments
from batchnorm.tools.state import BatchNormState

__all__ = [
    "Called",
    "Folded",
    "FoldedModel",
    "FoundLayer",
    "Framework",
    "Kept",
    "Observation",
    "OtherArray",
    "Values",
]

Framework = Literal["torch", "nnx", "keras"]


@dataclass(frozen=True, eq=False)
class FoundLayer:
    """A batch norm inside a model.

    Args:
        name: its path in the model, as the framework spells it; empty for the model itself.
        layer: the layer, not a copy; for one of several that `nnx.vmap` has stacked in a module,
            that module with an index.
        framework: of the model.
        state: its state when it was found, copied.
    """

    name: str
    layer: Any
    framework: Framework
    state: BatchNormState


@dataclass(frozen=True, eq=False)
class Observation:
    """One call of a batch norm.

    Args:
        layer: the layer that was called.
        x: its input, an array of the framework's; not a copy, so look at it now.
        mask: boolean, of x's rank with sizes of x or 1, True at real rows (S1); None where all
            are.
        axes: channel axes of x, sorted, not negative.
        measure: moments of x over the real rows of a mask, float64, shape (C,).
    """

    layer: FoundLayer
    x: Any
    mask: Any
    axes: tuple[int, ...]
    measure: Callable[[Any, Any, tuple[int, ...]], Moments]

    def moments(self, *, padded: bool = False) -> Moments:
        """Count, mean and biased variance per channel, float64, shape (C,).

        Args:
            padded: count padding as if it were real.
        """
        return self.measure(self.x, None if padded else self.mask, self.axes)


class Called(NamedTuple):
    """A layer of any kind that is called.

    Attributes:
        name: its path in the model, as the framework spells it; empty for the model itself.
        kind: the name of its class.
        norm: it is a batch norm.
    """

    name: str
    kind: str
    norm: bool


class Values(NamedTuple):
    """An array of a framework, in NumPy.

    Attributes:
        values: a copy; half types as float32.
        dtype: the name of the array's own type.
    """

    values: Any
    dtype: str


class OtherArray(NamedTuple):
    """An array of numbers in a model that belongs to no batch norm.

    Attributes:
        name: its path in the model.
        read: function that gives its values, in NumPy; half types as float32.
        write: function that takes values for it, of its shape.
    """

    name: str
    read: Callable[[], NDArray[Any]]
    write: Callable[[NDArray[Any]], None]


@dataclass(frozen=True)
class Folded:
    """A batch norm that is gone.

    Args:
        name: its path in the model.
        into: the linear map that it was folded into.
    """

    name: str
    into: str


@dataclass(frozen=True)
class Kept:
    """A batch norm that is still there.

    Args:
        name: its path in the model.
        reason: for staying.
    """

    name: str
    reason: str


class FoldedModel(NamedTuple):
    """A folded copy of a model, with outputs of both on the same input.

    Attributes:
        model: the copy.
        folded: batch norms that are gone, in the order of the forward pass.
        kept: batch norms that are still there.
        method: how the model was read, like "torch.fx".
        depth: linear maps and batch norms that an input may pass through.
        before: outputs of the original, NumPy arrays.
        after: outputs of the copy.
        precision: distance from 1 to the next number of the type that the model computes in.
    """

    model: Any
    folded: list[Folded]
    kept: list[Kept]
    method: str
    depth: int
    before: list[Any]
    after: list[Any]
    precision: float
