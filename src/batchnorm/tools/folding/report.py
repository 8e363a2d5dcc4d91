"""The report of `fold`, and the comparison of a folded model with its original."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.frameworks.records import Folded, FoldedModel, Kept

__all__ = ["FoldReport", "Folding", "check_same", "refuse_difference"]


@dataclass(frozen=True)
class FoldReport:
    """The batch norms that `fold` has removed, and the exactness of the new model.

    Args:
        folded: batch norms that are gone, in the order of the forward pass.
        kept: batch norms that are still there.
        method: how the model was read, like "torch.fx".
        difference: largest difference of an output, relative to the largest output.
        tolerance: the bound for it.
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
    """The new model, and a report on each batch norm."""

    model: Any
    report: FoldReport


def check_same(new: FoldedModel, tolerance: float | None) -> FoldReport:
    """Compare the outputs of a folded model with those of its original, and report.

    Args:
        new: the folded model.
        tolerance: largest relative difference allowed; None derives it.

    Raises:
        ValueError: they differ by more, or hold no finite number that could differ.

    A folded layer rounds in another order: weights once, products by them, and sums. The error of
    a sum of n products is a few times sqrt(n) units in the last place of its terms, and layers
    behind carry it on; 32 units a layer leave room for sums of a thousand terms.
    """
    allowed = _allowed(new.precision, new.depth, tolerance)
    found = _difference(new.before, new.after)
    if not any(np.isfinite(np.asarray(a, np.float64)).any() for a in new.before):
        shapes = ", ".join(str(tuple(a.shape)) for a in new.before) or "none"
        raise ValueError(
            "fold: the model's outputs on the example must hold finite numbers, by which the "
            f"folded model is checked; got outputs of shape {shapes} without any. Pass an "
            "example= on which the model returns some."
        )
    if not found <= allowed:
        shown = _show(found)
        raise ValueError(
            f"fold: the folded model must agree with the original within {allowed:.1e}; they "
            f"differ by {shown}. The original is unchanged. Where the batch is not what the model "
            "is made for, pass example=; where means are large against deviations, digits are "
            "lost by folding (S19), and tolerance= says how many may be."
        )
    return FoldReport(tuple(new.folded), tuple(new.kept), new.method, found, allowed)


def refuse_difference(
    before: list[Any], after: list[Any], precision: float, depth: int, tolerance: float | None
) -> str | None:
    """The reason against a folded copy, or None; arguments as in `FoldedModel`."""
    found, allowed = _difference(before, after), _allowed(precision, depth, tolerance)
    if found <= allowed:
        return None
    return f"the model differs by {_show(found)}, allowed {allowed:.1e}"


def _allowed(precision: float, depth: int, tolerance: float | None) -> float:
    return 32 * precision * max(depth, 1) if tolerance is None else tolerance


def _difference(before: list[Any], after: list[Any]) -> float:
    """The largest relative difference of an output; NaN where number or shapes differ."""
    if [a.shape for a in before] != [a.shape for a in after]:
        return math.nan
    return max(map(_relative_difference, before, after), default=0.0)


def _show(found: float) -> str:
    return "in number or shape" if math.isnan(found) else f"{found:.1e} of the largest output"


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
