"""The terminal's view of a report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from batchnorm.tools.inspection.findings import EXPLANATIONS, LEVELS, Finding
from batchnorm.tools.inspection.records import Findings, LayerReport
from batchnorm.tools.text import format_number, plural, printable

__all__ = ["make_table"]

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim", "ok": "green"}
_SHOWN = 8  # layers of a kind of finding


def make_table(report: Findings) -> RenderableType:
    """One line a layer, then each kind of finding with its remedy, then the verdict.

    Args:
        report: what `batchnorm.tools.inspect` returned.
    """
    parts: list[RenderableType] = []
    if report.layers:
        parts.append(_make_layers(report))
    for code, pairs in report.by_code().items():
        if any(finding.level != "note" for _, finding in pairs):
            parts.append(_make_kind(code, pairs))
    parts += [Text(f"note: {printable(note)}", style=_STYLES["note"]) for note in report.notes]
    if report.leaks is not None:
        parts.append(Text(str(report.leaks), style=_STYLES["ok" if report.leaks.ok else "warning"]))
    level = "error" if report.errors else "warning" if report.warnings else "ok"
    parts.append(Text(report.summarize(), style=_STYLES[level]))
    return Group(*parts)


_Cell = Callable[[LayerReport], str]


def _make_layers(report: Findings) -> Table:
    """Settings that all layers share are in the caption, not in a column."""
    columns: dict[str, _Cell] = {"channels": lambda layer: f"{layer.state.channels:,}"}
    common = []
    for heading, cell in _SETTINGS.items():
        values = {cell(layer) for layer in report.layers}
        if len(values) > 1:
            columns[heading] = cell
        elif values != {""}:
            common.append(f"{heading} {values.pop()}")
    for heading, cell in _FIGURES.items():
        if any(cell(layer) for layer in report.layers):
            columns[heading] = cell
    table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.caption = f"In every layer: {', '.join(common)}." if common else None
    table.add_column("layer", overflow="fold")
    for heading in columns:
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("", overflow="fold")
    for layer in report.layers:
        name = Text(printable(layer.name or layer.state.kind))
        cells = (cell(layer) for cell in columns.values())
        table.add_row(name, *cells, _name_findings(layer))
    return table


def _format_decay(layer: LayerReport) -> str:
    if layer.state.cumulative:
        return "1 − 1/t"
    return "" if layer.state.decay is None else f"{layer.state.decay:g}"


def _format_padding(layer: LayerReport) -> str:
    padded = None if layer.observed is None else layer.observed.padded
    return "" if padded is None else f"{padded:.0%}"


_SETTINGS: dict[str, _Cell] = {
    "eps": lambda layer: "" if layer.state.eps is None else f"{layer.state.eps:g}",
    "decay": _format_decay,
    "variance": lambda layer: layer.state.variance or "",
}
_FIGURES: dict[str, _Cell] = {
    "median\nstd": lambda layer: _format(np.median, layer.quantities.std),
    "largest\ngain": lambda layer: _format(np.max, layer.quantities.gain),
    "largest\ndrift": lambda layer: _format(np.max, _drift(layer)),
    "padding": _format_padding,
}


def _drift(layer: LayerReport) -> Any:
    drift = layer.quantities.drift
    return None if drift is None else drift.distance


def _format(reduce: Callable[[Any], Any], values: Any) -> str:
    if values is None:
        return ""
    finite = values[np.isfinite(values)]
    return format_number(float(reduce(finite)), 2) if finite.size else "none finite"


def _name_findings(layer: LayerReport) -> Text:
    named = [f for f in layer.findings if f.code != "padding"]  # its share has a column
    if not named:
        return Text("ok", style=_STYLES["ok"])
    return Text(", ").join([Text(f.code, style=_STYLES[f.level]) for f in named])


def _make_kind(code: str, pairs: list[tuple[LayerReport, Finding]]) -> RenderableType:
    title, meaning, remedy = EXPLANATIONS[code]
    pairs = sorted(pairs, key=lambda pair: LEVELS.index(pair[1].level))
    style = _STYLES[pairs[0][1].level]
    lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    lines.add_column(overflow="fold")
    lines.add_column()
    for layer, finding in pairs[:_SHOWN]:
        lines.add_row(Text(printable(layer.name or layer.state.kind)), Text(finding.message))
    if len(pairs) > _SHOWN:
        lines.add_row(Text(f"and {plural(len(pairs) - _SHOWN, 'more layer')}"), Text())
    about = Text.assemble(f"{meaning} {remedy}", style="dim")
    head = Text.assemble((code, style), (f"  {title}", "bold"))
    return Padding(Group(head, about, Padding(lines, (0, 0, 0, 2))), (0, 0, 1, 0))
