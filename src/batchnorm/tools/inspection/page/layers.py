"""The report's list of layers, and the details of each."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.inspection.page.charts import draw_histogram, draw_sparkline
from batchnorm.tools.inspection.page.markup import Markup, element, join
from batchnorm.tools.inspection.page.overview import FLOOR, HINT
from batchnorm.tools.inspection.page.scales import Scale, fit, flatten
from batchnorm.tools.inspection.records import Findings, LayerReport
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.text import format_number, plural, printable

__all__ = ["make_layers"]

_WORST = {"error": 6, "warning": 6, "ok": 3}  # channels in a layer's table


class _Column(NamedTuple):
    """A column of the list: one quantity of every layer, on one scale."""

    key: str
    title: str
    about: str
    scale: Scale


def make_layers(report: Findings) -> Markup:
    """A row for each layer, which opens; the worst ones first.

    Args:
        report: with at least one layer.
    """
    columns = list(_columns(report))
    titles = [
        element("span", {"class": "name"}, "Layer"),
        element("span", {"class": "number"}, "Channels"),
    ]
    for column in columns:
        span = f"{format_number(column.scale.low)} … {format_number(column.scale.high)}"
        titles.append(
            element("span", {"class": "spark"}, column.title, element("small", None, span))
        )
    titles.append(element("span", {"class": "pill"}, ""))
    numbered = sorted(enumerate(report.layers), key=lambda pair: _SHOWN.index(pair[1].level))
    rows = [_make_row(index, layer, columns, report) for index, layer in numbered]
    counts = {level: sum(x.level == level for x in report.layers) for level in _SHOWN}
    mixed = sum(count > 0 for count in counts.values()) > 1
    order = "The worst layers come first. " if mixed else ""
    return element(
        "section",
        {"style": f"--columns: {len(columns)}"},
        element("h2", None, "Layers"),
        element(
            "p",
            {"class": "legend"},
            f"{order}Histograms over channels, one scale for each column. Click a row for details.",
        ),
        _make_filter(counts) if mixed else Markup(),
        element("div", {"class": "row titles"}, *titles),
        element("div", {"class": "rows"}, *rows),
    )


_SHOWN = ("error", "warning", "ok")  # in this order
_FILTERS = {"error": "errors", "warning": "warnings", "ok": "ok"}


def _make_filter(counts: dict[str, int]) -> Markup:
    """Buttons that hide the rows of other levels; the style sheet does it, without a script."""
    labels = {"all": ("all", sum(counts.values()))}
    labels |= {k: (_FILTERS[k], n) for k, n in counts.items() if n}
    buttons = [
        element(
            "label",
            None,
            element(
                "input",
                {
                    "type": "radio",
                    "name": "shown",
                    "id": f"shown-{level}",
                    "checked": "" if level == "all" else None,
                },
            ),
            f" {text} {count:,}",
        )
        for level, (text, count) in labels.items()
    ]
    return element("fieldset", None, element("legend", None, "Show"), *buttons)


_COLUMNS = (("std", "Running std"), ("gamma", "gamma"), ("drift", "Drift"))


def _columns(report: Findings) -> Any:
    for key, title in _COLUMNS:
        arrays = [a for layer in report.layers for name, a in layer.arrays() if name == key]
        flat = flatten(arrays)
        if not flat.size:
            continue
        # The few channels beyond are drawn at the ends, so that they do not squeeze the others.
        low, high = np.quantile(flat, (0.002, 0.998))
        log = None if key == "gamma" else True
        scale = fit(np.clip(flat, low, high), least=FLOOR.get(key), log=log)
        if scale is not None:
            yield _Column(key, title, "", scale)


def _make_row(index: int, layer: LayerReport, columns: list[_Column], report: Findings) -> Markup:
    arrays = dict(layer.arrays())
    cells = [
        element("span", {"class": "name"}, printable(layer.name or layer.state.kind)),
        element("span", {"class": "number"}, f"{layer.state.channels:,}"),
    ]
    for column in columns:
        values = arrays.get(column.key)
        drawn = Markup() if values is None else draw_sparkline(values, column.scale, column.title)
        cells.append(element("span", {"class": "spark"}, drawn))
    cells.append(element("span", {"class": f"pill {layer.level}"}, layer.level))
    summary = element("summary", {"class": "row"}, *cells)
    return element(
        "details",
        {"class": f"layer {layer.level}"},
        summary,
        _make_body(index, layer, arrays, report.limits),
    )


def _make_body(
    index: int, layer: LayerReport, arrays: dict[str, Any], limits: Thresholds
) -> Markup:
    parts = []
    if layer.findings:
        items = [
            element("li", {"class": f.level}, element("b", None, f.level), " ", f.message)
            for f in layer.findings
        ]
        parts.append(element("ul", {"class": "messages"}, *items))
    parts.append(element("p", {"class": "settings"}, _describe(layer, limits)))
    parts.append(element("div", {"class": "histograms"}, *_make_histograms(arrays)))
    if layer.quantities.drift is not None:
        parts.append(_make_worst(layer, arrays))
    # The address is inside: a browser opens what holds the target of a link.
    return element("div", {"class": "body", "id": f"layer-{index}"}, *parts)


def _describe(layer: LayerReport, limits: Thresholds) -> str:
    state = layer.state
    parts = [printable(state.kind)]
    parts.append(
        f"eps {state.eps:g}" if state.eps is not None else f"eps unknown, {limits.eps:g} taken"
    )
    if state.cumulative:
        parts.append("statistics are the average of all batches")
    elif state.decay is not None:
        parts.append(f"decay {state.decay:g}")
    if state.variance is not None:
        parts.append(f"{state.variance} variance")
    if state.stored is not None:
        parts.append(f"statistics in {printable(state.stored)}")
    if state.counted is not None:
        parts.append(plural(state.counted, "update"))
    if layer.observed is not None:
        rows = int(np.max(layer.observed.real.count, initial=0.0))
        parts.append(f"observed on {plural(rows, 'row')} in {plural(layer.observed.calls, 'call')}")
    return " · ".join(parts)


_HISTOGRAMS = (
    ("mean", "Mean", "observed_mean"),
    ("std", "Standard deviation", "observed_std"),
    ("gamma", "gamma", None),
    ("beta", "beta", None),
    ("gain", "Gain", None),
    ("drift", "Drift", "drift_padded"),
)


def _make_histograms(arrays: dict[str, Any]) -> list[Markup]:
    arrays = dict(arrays)
    if "observed_var" in arrays:
        arrays["observed_std"] = np.sqrt(np.maximum(arrays["observed_var"], 0.0))
    drawn = []
    for key, title, beside in _HISTOGRAMS:
        if key not in arrays:
            continue
        other = arrays.get(beside) if beside else None
        scale = fit(arrays[key]) if other is None else fit(arrays[key], other)
        if scale is None:
            continue
        note = {"drift_padded": "outline: padding counted"}.get(str(beside), "outline: observed")
        caption = title if other is None else f"{title} ({note})"
        drawn.append(draw_histogram(caption, arrays[key], scale, other))
    return drawn


def _make_worst(layer: LayerReport, arrays: dict[str, Any]) -> Markup:
    """The channels that drift most."""
    distance = np.nan_to_num(arrays["drift"], nan=-1.0)
    count = _WORST[layer.level]
    order = np.argsort(-distance, kind="stable")[:count]
    padded = "drift_padded" in arrays
    titles = ["channel", "mean", "observed", "std", "observed", "drift"]
    titles += ["with padding"] if padded else []
    rows = []
    for channel in order.tolist():
        values = [
            arrays["mean"][channel],
            arrays["observed_mean"][channel],
            arrays["std"][channel],
            np.sqrt(max(arrays["observed_var"][channel], 0.0)),
            arrays["drift"][channel],
        ]
        values += [arrays["drift_padded"][channel]] if padded else []
        cells = [element("td", None, format_number(float(v))) for v in values]
        rows.append(element("tr", None, element("th", None, f"{channel}"), *cells))
    head = element("tr", None, *(element("th", None, title) for title in titles))
    caption = "Channels that drift most" if layer.state.channels > count else "Channels"
    table = element("table", None, element("caption", None, caption), head, join(*rows))
    return join(element("p", {"class": "hint"}, HINT), element("div", {"class": "scroll"}, table))
