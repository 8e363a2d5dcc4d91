"""The results of an inspection as plain records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

from batchnorm.tools.inspection.findings import EXPLANATIONS, Finding
from batchnorm.tools.inspection.leaks.records import LeakFindings
from batchnorm.tools.inspection.quantities import Drift, Observed, Quantities
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import plural, printable

__all__ = ["Findings", "LayerReport"]


@dataclass(frozen=True, eq=False)
class LayerReport:
    """One layer with its findings.

    Args:
        state: its arrays and settings.
        quantities: figures derived from them, per channel.
        findings: problems and notes, the worst first.
        observed: its inputs, summed up; None if nothing was run.
    """

    state: BatchNormState
    quantities: Quantities
    findings: tuple[Finding, ...] = ()
    observed: Observed | None = None

    @property
    def name(self) -> str:
        """The layer's path in its model or file."""
        return self.state.name

    @property
    def level(self) -> str:
        """The worst level among the findings: "error" or "warning", else "ok"."""
        levels = {finding.level for finding in self.findings}
        return "error" if "error" in levels else "warning" if "warning" in levels else "ok"

    def to_dict(self, *, per_channel: bool = False) -> dict[str, Any]:
        """Plain types only; numbers that are not finite become None.

        Args:
            per_channel: include every channel's numbers, not only their range.
        """
        state = self.state
        found: dict[str, Any] = {
            "name": state.name,
            "kind": state.kind,
            "channels": state.channels,
            "eps": state.eps,
            "decay": state.decay,
            "cumulative": state.cumulative,
            "variance": state.variance,
            "steps": state.steps,
            "stored": state.stored,
            "level": self.level,
            "findings": [asdict(finding) for finding in self.findings],
            "quantities": {name: _quantiles(array) for name, array in self.arrays()},
        }
        if self.observed is not None:
            found["observed"] = {
                "calls": self.observed.calls,
                "rows": _number(np.max(self.observed.real.count, initial=0.0)),
                "padded": _number(self.observed.padded),
            }
        if per_channel:
            found["per_channel"] = {name: _numbers(array) for name, array in self.arrays()}
        return found

    def arrays(self) -> Iterator[tuple[str, Any]]:
        """All arrays with one number for each channel, by name."""
        for name in ("mean", "var", "gamma", "beta"):
            if getattr(self.state, name) is not None:
                yield name, getattr(self.state, name)
        for field in fields(Quantities):
            value = getattr(self.quantities, field.name)
            if isinstance(value, Drift):
                suffix = field.name.removeprefix("drift")
                yield f"shift{suffix}", value.shift
                yield f"ratio{suffix}", value.ratio
                yield f"drift{suffix}", value.distance
            elif value is not None:
                yield field.name, value
        if self.observed is not None:
            yield "observed_mean", self.observed.real.mean
            yield "observed_var", self.observed.real.var
            if self.observed.everything is not None:
                yield "observed_mean_padded", self.observed.everything.mean
                yield "observed_var_padded", self.observed.everything.var


@dataclass(frozen=True, eq=False)
class Findings:
    """The fields of `Report`, which documents them, and the questions that its views ask."""

    source: str
    layers: tuple[LayerReport, ...]
    limits: Thresholds
    batches: int = 0
    notes: tuple[str, ...] = ()
    leaks: LeakFindings | None = None

    @property
    def errors(self) -> tuple[LayerReport, ...]:
        """Layers with which evaluation gives wrong results."""
        return tuple(layer for layer in self.layers if layer.level == "error")

    @property
    def warnings(self) -> tuple[LayerReport, ...]:
        """Layers with which evaluation may give wrong results."""
        return tuple(layer for layer in self.layers if layer.level == "warning")

    @property
    def ok(self) -> bool:
        """True if no layer has an error, and none leaks."""
        return not self.errors and (self.leaks is None or self.leaks.ok)

    @property
    def channels(self) -> int:
        """Number of channels of all layers together."""
        return sum(layer.state.channels for layer in self.layers)

    def by_code(self) -> dict[str, list[tuple[LayerReport, Finding]]]:
        """The findings of each kind, with their layers; kinds in `EXPLANATIONS`' order."""
        found: dict[str, list[tuple[LayerReport, Finding]]] = {}
        for code in EXPLANATIONS:
            of_code = [
                (layer, f) for layer in self.layers for f in layer.findings if f.code == code
            ]
            if of_code:
                found[code] = of_code
        return found

    def to_dict(self, *, per_channel: bool = False) -> dict[str, Any]:
        """Plain types only; numbers that are not finite become None.

        Args:
            per_channel: include every channel's numbers, not only their range.
        """
        return {
            "source": self.source,
            "ok": self.ok,
            "batches": self.batches,
            "notes": list(self.notes),
            "thresholds": asdict(self.limits),
            "layers": [layer.to_dict(per_channel=per_channel) for layer in self.layers],
            **({} if self.leaks is None else {"leaks": self.leaks.to_dict()}),
        }

    def summarize(self) -> str:
        """One sentence."""
        source, layers = printable(self.source), plural(len(self.layers), "layer")
        if not self.layers:
            return f"{source}: no batch normalization found"
        parts = [f"{len(self.errors)} with errors"] if self.errors else []
        parts += [f"{len(self.warnings)} with warnings"] if self.warnings else []
        verdict = ", ".join(parts) or "nothing wrong"
        return f"{source}: {layers}, {plural(self.channels, 'channel')}: {verdict}"

    def __str__(self) -> str:
        lines = [self.summarize()]
        for layer in self.layers:
            for finding in layer.findings:
                name = printable(layer.name or layer.state.kind)
                lines.append(f"  {finding.level:<7}  {name}: {finding.message}")
        lines += [f"  note     {printable(note)}" for note in self.notes]
        lines += [] if self.leaks is None else [str(self.leaks)]
        return "\n".join(lines)


def _quantiles(array: Any) -> dict[str, float | None]:
    """Least, median and greatest of the finite values."""
    values = np.asarray(array, np.float64).reshape(-1)
    values = values[np.isfinite(values)]
    if not values.size:
        return {"min": None, "median": None, "max": None}
    low, middle, high = np.min(values), np.median(values), np.max(values)
    return {"min": _number(low), "median": _number(middle), "max": _number(high)}


def _numbers(array: Any) -> list[float | None]:
    return [_number(value) for value in np.asarray(array, np.float64).reshape(-1)]


def _number(value: Any) -> float | None:
    return float(value) if value is not None and math.isfinite(value) else None
