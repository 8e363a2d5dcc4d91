"""The terminal's view of a report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from batchnorm.tools.inspection.findings import EXPLANATIONS, LEVELS, Finding
from batchnorm.tools.inspection.records import Findings, LayerReport
from batchnorm.tools.text import format_number, plural, printable

__all__ = ["make_table"]

_STYLES = {"error": "bold red", "warning": "yellow", "note": "dim", "ok": "green"}
_SHOWN = 8  # layers of a kind of finding
_BESIDE = 70  # least width for a finding beside its layer's name


def make_table(report: Findings) -> RenderableType:
    """One line a layer, then each kind of finding with its remedy, then the verdict.

    Args:
        report: what `batchnorm.tools.inspect` returned.
    """
    parts: list[RenderableType] = []
    if report.layers:
        parts.append(_Layers(report))
    for code, pairs in report.by_code().items():
        if any(finding.level != "note" for _, finding in pairs):
            parts.append(_Kind(code, pairs))
    parts += [Text(f"note: {printable(note)}", style=_STYLES["note"]) for note in report.notes]
    if report.leaks is not None:
        parts.append(Text(str(report.leaks), style=_STYLES["ok" if report.leaks.ok else "warning"]))
    level = "error" if report.errors else "warning" if report.warnings else "ok"
    parts.append(Text(report.summarize(), style=_STYLES[level]))
    return Group(*parts)


_Cell = Callable[[LayerReport], str]


class _Layers:
    """A line for each layer, with the columns that the terminal has room for.

    Names and findings always stay. Settings that all layers share are in the caption, not in a
    column.
    """

    def __init__(self, report: Findings) -> None:
        self.layers = report.layers
        self.names = [printable(layer.name or layer.state.kind) for layer in report.layers]
        self.findings = [_name_findings(layer) for layer in report.layers]
        self.columns: dict[str, list[str]] = {
            "channels": [f"{x.state.channels:,}" for x in self.layers]
        }
        self.common = []
        for heading, cell in _SETTINGS.items():
            values = [cell(layer) for layer in report.layers]
            if len(set(values)) > 1:
                self.columns[heading] = values
            elif values[0]:
                self.common.append(f"{heading} {values[0]}")
        for heading, cell in _FIGURES.items():
            values = [cell(layer) for layer in report.layers]
            if any(values):
                self.columns[heading] = values

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the table."""
        width = options.max_width
        name = min(max(map(cell_len, self.names)), max(14, width // 2 - 5))
        finding = max(cell_len(word) for text in self.findings for word in text.plain.split())
        shown, left = _fit(self.columns, width - name - finding - 5)
        table = Table(box=SIMPLE_HEAD, pad_edge=False, caption_justify="left")
        table.add_column("layer", overflow="fold", min_width=min(name, width - finding - 5))
        for heading in shown:
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column("", overflow="fold", min_width=finding)
        for cells in zip(self.names, *shown.values(), self.findings, strict=True):
            table.add_row(*(cell if isinstance(cell, Text) else Text(cell) for cell in cells))
        caption = f"In every layer: {', '.join(self.common)}." if self.common else ""
        if left:
            caption += f" Wider terminals show: {', '.join(left)}."
        table.caption = caption.strip() or None
        yield table


def _fit(columns: Mapping[str, list[str]], room: int) -> tuple[dict[str, list[str]], list[str]]:
    """The columns that fit, in their order, and the headings of the others."""
    width = {
        heading: max(map(cell_len, [*heading.split("\n"), *cells])) + 3
        for heading, cells in columns.items()
    }
    shown = dict(columns)
    for heading in sorted(columns, key=_WORTH.index):
        if sum(width[h] for h in shown) > room:
            del shown[heading]
    left = [heading.replace("\n", " ") for heading in columns if heading not in shown]
    return shown, left


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


# Columns from the least to the most telling: the order in which a narrow terminal loses them.
_WORTH = (*_SETTINGS, "channels", "median\nstd", "padding", "largest\ngain", "largest\ndrift")


def _drift(layer: LayerReport) -> Any:
    drift = layer.quantities.drift
    return None if drift is None else drift.distance


def _format(reduce: Callable[[Any], Any], values: Any) -> str:
    if values is None:
        return ""
    finite = values[np.isfinite(values)]
    return format_number(float(reduce(finite)), 2) if finite.size else "none"


def _name_findings(layer: LayerReport) -> Text:
    named = [f for f in layer.findings if f.code != "padding"]  # its share has a column
    if not named:
        return Text("ok", style=_STYLES["ok"])
    return Text(", ").join([Text(f.code, style=_STYLES[f.level]) for f in named])


class _Kind:
    """A kind of finding: its meaning, the remedy, and its layers."""

    def __init__(self, code: str, pairs: list[tuple[LayerReport, Finding]]) -> None:
        self.code = code
        self.pairs = sorted(pairs, key=lambda pair: LEVELS.index(pair[1].level))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Yield the lines; findings stand below their layers where the terminal is narrow."""
        title, meaning, remedy = EXPLANATIONS[self.code]
        shown = [
            (Text(printable(layer.name or layer.state.kind)), Text(finding.message))
            for layer, finding in self.pairs[:_SHOWN]
        ]
        if len(self.pairs) > _SHOWN:
            shown.append((Text(f"and {plural(len(self.pairs) - _SHOWN, 'more layer')}"), Text()))
        lines = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        if options.max_width >= _BESIDE:
            lines.add_column(overflow="fold")
            lines.add_column()
            for pair in shown:
                lines.add_row(*pair)
        else:
            lines.add_column(overflow="fold")
            for name, message in shown:
                lines.add_row(name)
                if message:
                    lines.add_row(Padding(message, (0, 0, 0, 2)))
        head = Text.assemble((self.code, _STYLES[self.pairs[0][1].level]), (f"  {title}", "bold"))
        about = Text(f"{meaning} {remedy}", style="dim")
        yield Padding(Group(head, about, Padding(lines, (0, 0, 0, 2))), (0, 0, 1, 0))
