"""The inputs of each layer while a model is inspected."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.core.layout import make_layout
from batchnorm.core.moments import Moments
from batchnorm.tools.frameworks.records import Observation
from batchnorm.tools.frameworks.switch import adapter_for
from batchnorm.tools.inspection.findings import Finding, Level
from batchnorm.tools.inspection.leaks.records import LeakFindings
from batchnorm.tools.inspection.quantities import Observed
from batchnorm.tools.observe import Tally
from batchnorm.tools.text import printable

__all__ = ["Mask", "Watch", "note_leaks"]

Mask = Callable[[Any], Any]


class Watch:
    """The inputs of every layer, and remarks on them.

    Args:
        mask: function of a batch that gives the mask of layers without one; or None.
    """

    def __init__(self, mask: Mask | None) -> None:
        self._make_mask = mask
        self._mask: Any = None
        self._seen: dict[str, _Seen] = {}
        self._notes: dict[str, list[Finding]] = {}

    def take(self, batch: Any) -> None:
        """Make the mask of the batch that comes next."""
        if self._make_mask is not None:
            self._mask = np.asarray(self._make_mask(batch)) != 0

    def see(self, observation: Observation) -> None:
        """Take in one call of a layer."""
        name = observation.layer.name
        if observation.mask is None and self._mask is not None:
            observation = self._add_mask(observation)
        self._seen.setdefault(name, _Seen()).add(observation)

    def note(self, name: str, code: str, message: str, level: Level = "note") -> None:
        """Keep a remark on a layer, once."""
        notes = self._notes.setdefault(name, [])
        if all(finding.code != code for finding in notes):
            notes.append(Finding(code, level, message))

    def notes(self, name: str) -> Sequence[Finding]:
        """The remarks on a layer."""
        return self._notes.get(name, ())

    def observed(self, name: str) -> Observed | None:
        """A layer's inputs, summed up, or None if it did not run."""
        seen = self._seen.get(name)
        return None if seen is None else seen.summarize()

    def _add_mask(self, observation: Observation) -> Observation:
        shape = tuple(observation.x.shape)
        layout = make_layout(shape, observation.axes)
        try:
            sizes = layout.mask_shape(self._mask.shape)
        except ValueError:
            shapes = f"mask {self._mask.shape}, input {shape}"
            self.note(observation.layer.name, "unfit-mask", shapes)
            return observation
        adapter = adapter_for(observation.layer.framework)
        mask = adapter.to_mask(self._mask.reshape(sizes), observation.x)
        return replace(observation, mask=mask)


def note_leaks(watch: Watch, leaks: LeakFindings) -> None:
    """Keep a remark on each batch norm through which padding reaches real positions."""
    for leak in leaks.leaks:
        if leak.norm:
            message = f"{printable(leak.title)} reads its padding, and {leak.movement}"
            watch.note(leak.norm, "padding-read", message, "error")
        watch.note(leak.name, "padding-in-batch", f"it {leak.movement}", "warning")


class _Seen:
    """The moments of one layer's inputs, with padding and without."""

    def __init__(self) -> None:
        self._real, self._everything = Tally(), Tally()
        self._masked = False
        self._rows = self._all_rows = 0.0

    def add(self, observation: Observation) -> None:
        """Take in one call."""
        moments = observation.moments()
        everything = moments
        if observation.mask is not None:
            self._masked = True
            everything = observation.moments(padded=True)
        self._real.add(moments)
        self._everything.add(everything)
        self._rows += _most(moments)
        self._all_rows += _most(everything)

    def summarize(self) -> Observed:
        """All calls together."""
        assert self._real.moments is not None
        return Observed(
            self._real.moments,
            self._everything.moments if self._masked else None,
            rows=self._rows,
            padded_rows=self._all_rows - self._rows,
            calls=self._real.uses,
            skipped=self._real.skipped,
        )


def _most(moments: Moments) -> float:
    return float(np.max(moments.count, initial=0.0))
