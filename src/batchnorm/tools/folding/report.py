"""What `fold` did, and whether two models compute the same."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

__all__ = ["FoldReport", "Folded", "Folding", "Kept"]

OWNER = "fold"


@dataclass(frozen=True)
class Folded:
    """A batch norm that is gone.

    Args:
        name: its path in the model.
        into: the linear map that has swallowed it.
    """

    name: str
    into: str


@dataclass(frozen=True)
class Kept:
    """A batch norm that is still there.

    Args:
        name: its path in the model.
        reason: why.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class FoldReport:
    """What `fold` did.

    Args:
        folded: batch norms that are gone, in the order of the forward pass.
        kept: batch norms that are still there.
        method: how the model was read, like "torch.fx".
        difference: largest difference of an output, relative to the largest output.
        tolerance: what it had to stay below.
    """

    folded: tuple[Folded, ...]
    kept: tuple[Kept, ...]
    method: str
    difference: float
    tolerance: float

    def __str__(self) -> str:
        """One line a layer."""
        total = len(self.folded) + len(self.kept)
        return "\n".join(
            [
                f"folded {len(self.folded)} of {total} batch norms ({self.method}); outputs differ "
                f"by {self.difference:.1e} of the largest, allowed {self.tolerance:.1e}",
                *(f"  {layer.name}: into {layer.into}" for layer in self.folded),
                *(f"  {layer.name}: kept, {layer.reason}" for layer in self.kept),
            ]
        )


class Folding(NamedTuple):
    """The new model, and what became of each batch norm."""

    model: Any
    report: FoldReport


class Change(NamedTuple):
    """A changed model that nobody has checked yet."""

    model: Any
    folded: list[Folded]
    kept: list[Kept]
    method: str
    depth: int  # linear maps and batch norms that an input may pass through


def check_same(
    change: Change,
    before: Sequence[Any],
    after: Sequence[Any],
    precision: float,
    tolerance: float | None,
) -> FoldReport:
    """Compare outputs, and report.

    Args:
        change: the new model.
        before: outputs of the old model, NumPy arrays.
        after: outputs of the new one.
        precision: distance from 1 to the next number of the type that the model computes in.
        tolerance: largest relative difference allowed; None derives it.

    Raises:
        ValueError: they differ by more.

    A folded layer rounds in another order: weights once, products by them, and sums. The error of
    a sum of n products is a few times sqrt(n) units in the last place of its terms, and layers
    behind carry it on; 32 units a layer leave room for sums of a thousand terms.
    """
    allowed = 32 * precision * max(change.depth, 1) if tolerance is None else tolerance
    found = 0.0
    same = len(before) == len(after)
    for old, new in zip(before, after, strict=False):
        same = same and old.shape == new.shape
        if same:
            found = max(found, _relative_difference(old, new))
    if not same or not found <= allowed:
        shown = f"{found:.1e} of the largest output" if same else "in number or shape"
        raise ValueError(
            f"{OWNER}: the folded model must agree with the original within {allowed:.1e}; they "
            f"differ by {shown}. The original is unchanged. Where the batch is not what the model "
            "is made for, pass example=; where means are large against deviations, digits are "
            "lost by folding (S19), and tolerance= says how many may be."
        )
    return FoldReport(tuple(change.folded), tuple(change.kept), change.method, found, allowed)


def _relative_difference(old: Any, new: Any) -> float:
    old, new = np.asarray(old, np.float64), np.asarray(new, np.float64)
    odd = ~np.isfinite(old)
    if not np.array_equal(odd, ~np.isfinite(new)):
        return math.inf
    difference = np.abs(np.where(odd, 0.0, old - new)).max(initial=0.0)
    largest = np.abs(np.where(odd, 0.0, old)).max(initial=0.0)
    if difference == 0.0:
        return 0.0
    return float(difference / largest) if largest > 0.0 else math.inf
