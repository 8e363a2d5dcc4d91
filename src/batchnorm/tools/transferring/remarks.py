"""Remarks on what a transfer changed, or could not carry over."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from batchnorm.tools.sides import Side
from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import list_names

__all__ = ["Remarks", "remark", "remark_rest", "remark_rounding"]

_ARRAYS = ("mean", "var", "gamma", "beta")


class Remarks:
    """Notes, each with the layers that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Add a remark on the layer of that name."""
        self._names.setdefault(what, []).append(name or "the layer")

    def lines(self) -> list[str]:
        """One line for each remark."""
        return [f"{what}: {list_names(names)}" for what, names in self._names.items()]


def remark(remarks: Remarks, state: BatchNormState, wanted: BatchNormState, side: Side) -> None:
    """Add remarks on what a layer does not get exactly as its state has it."""
    name = wanted.name
    if state.var is not None and state.variance != wanted.variance:
        if state.variance is None:
            what = "the source does not say which kind of variance it has; it was copied unchanged"
        else:
            what = (
                f"the {state.variance} variance was copied unchanged, but the target keeps the "
                f"{wanted.variance} one; count= converts it"
            )
        remarks.add(what, name)
    for option in ("eps", "decay"):
        value = getattr(state, option)
        if value is None and side.has_options and not state.cumulative:
            kept = getattr(wanted, option)
            remarks.add(f"the source does not say {option}; the target keeps {kept}", name)
        elif value is not None and not side.has_options and getattr(wanted, option) is None:
            remarks.add(f"{option}={value:g} was not written; set it in the target's module", name)
    if state.cumulative and not side.can_average:
        remarks.add("the source averages all batches (momentum=None); the target cannot", name)
    if state.renorm is not None and wanted.renorm is None:
        remarks.add("renormalization's statistics were left out; the target has none", name)
    if state.renorm is None and wanted.renorm is not None:
        remarks.add("renormalization's statistics were derived from mean and variance (S11)", name)


def remark_rest(
    remarks: Remarks,
    sources: Sequence[BatchNormState],
    targets: Sequence[BatchNormState],
    pairs: Iterable[tuple[int, int]],
) -> None:
    """Add the layers of both sides that are in no pair."""
    moved, reached = {i for i, _ in pairs}, {j for _, j in pairs}
    for i, state in enumerate(sources):
        if i not in moved:
            remarks.add("not moved, since names leaves it out", state.name)
    for j, state in enumerate(targets):
        if j not in reached:
            remarks.add("unchanged in the target, since names leaves it out", state.name)


def remark_rounding(
    remarks: Remarks,
    wanted: Mapping[str, BatchNormState],
    written: Mapping[str, BatchNormState],
) -> None:
    """Add the layers whose values differ from those that were to be written."""
    for name, state in wanted.items():
        if any(_differs(getattr(state, a), getattr(written[name], a)) for a in _ARRAYS):
            remarks.add("values were rounded to the target's type", name)


def _differs(wanted: Any, found: Any) -> bool:
    if wanted is None or found is None:
        return False
    return not np.array_equal(wanted, found, equal_nan=True)
