"""Remarks on what a transfer changed, or could not carry over."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import list_names
from batchnorm.tools.transferring.sides import Side

__all__ = ["Remarks", "remark", "remark_rest"]


class Remarks:
    """Notes, each with the layers that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        """Note it for the layer of that name."""
        self._names.setdefault(what, []).append(name or "the layer")

    def lines(self) -> list[str]:
        """One line for each remark."""
        return [f"{what}: {list_names(names)}" for what, names in self._names.items()]


def remark(remarks: Remarks, state: BatchNormState, wanted: BatchNormState, side: Side) -> None:
    """Add what does not reach a layer as its state means it."""
    name = wanted.name
    if state.var is not None and state.variance != wanted.variance:
        if state.variance is None:
            what = "the source does not say which variance it holds; it was carried as it is"
        else:
            what = (
                f"the {state.variance} variance was carried as it is, where the target keeps the "
                f"{wanted.variance} one; count= converts it"
            )
        remarks.add(what, name)
    for option in ("eps", "decay"):
        value = getattr(state, option)
        if value is None and side.has_options and not state.cumulative:
            kept = getattr(wanted, option)
            remarks.add(f"the source does not say {option}; the target keeps {kept}", name)
        elif value is not None and not side.has_options and getattr(wanted, option) is None:
            remarks.add(f"{option}={value:g} is to be set in the target's own module", name)
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
            remarks.add("not moved, as names says", state.name)
    for j, state in enumerate(targets):
        if j not in reached:
            remarks.add("unchanged in the target, as names says", state.name)
