"""Charts as inline SVG; the page's style sheet has their colours."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.inspection.page.markup import Markup, element, join
from batchnorm.tools.inspection.page.scales import Scale, flatten
from batchnorm.tools.text import format_number

__all__ = ["Line", "Spread", "draw_histogram", "draw_layers", "draw_sparkline", "spread"]

_WIDTH, _LEFT, _RIGHT = 1000.0, 52.0, 78.0
_TOP, _HEIGHT, _NAMES = 14.0, 150.0, 22.0
_NOTCHED = 6.0  # least height of a bar in which the median is drawn
_QUARTILES = (0.0, 0.25, 0.5, 0.75, 1.0)
_GROUPS = 12
_LETTER = 6.2  # about the width of a letter of a label


class Spread(NamedTuple):
    """One layer's values: the ends, the quartiles and the median, over its channels."""

    name: str
    level: str
    low: float
    first: float
    median: float
    third: float
    high: float
    other: float | None = None  # the median of a second set, drawn as a ring


class Line(NamedTuple):
    """A threshold."""

    value: float
    label: str
    level: str


def spread(name: str, level: str, values: Any, other: Any = None) -> Spread | None:
    """The spread of the finite values, or None if there is none."""
    array = flatten([values])
    if not array.size:
        return None
    middle = None if other is None else flatten([other])
    second = float(np.median(middle)) if middle is not None and middle.size else None
    low, first, median, third, high = (float(q) for q in np.quantile(array, _QUARTILES))
    return Spread(name, level, low, first, median, third, high, second)


def draw_layers(
    spreads: Sequence[Spread | None], names: Sequence[str], scale: Scale, lines: Sequence[Line] = ()
) -> Markup:
    """One mark for each layer, left to right: ends, quartiles, median.

    Args:
        spreads: one for each layer; None leaves its place empty.
        names: the layers' names, for the groups below.
        scale: of the values.
        lines: thresholds.
    """
    y = scale.onto(_TOP + _HEIGHT, _TOP)
    step = (_WIDTH - _LEFT - _RIGHT) / len(names)
    shown = [line for line in lines if scale.low <= line.value <= scale.high]
    marks = [
        _draw_mark(index, found, _LEFT + (index + 0.5) * step, step, y)
        for index, found in enumerate(spreads)
        if found is not None
    ]
    return element(
        "svg",
        {
            "viewBox": f"0 0 {_WIDTH:.0f} {_TOP + _HEIGHT + _NAMES:.0f}",
            "class": "layers",
            "role": "img",
        },
        _draw_groups(names, step),
        _draw_ticks(y),
        *(_draw_line(line, y) for line in shown),
        *marks,
        *(_draw_label(line, y) for line in shown),
    )


def _draw_mark(index: int, found: Spread, x: float, step: float, y: Scale) -> Markup:
    thick = min(7.0, 0.62 * step)
    level = "" if found.level == "ok" else f" {found.level}"
    title = (
        f"{found.name}\nmedian {format_number(found.median)}, "
        f"{format_number(found.low)} to {format_number(found.high)}"
    )
    shapes = [
        element("title", None, title),
        _draw_path("hit", f"M{x - step / 2:.1f} {_TOP:g}h{step:.1f}v{_HEIGHT:g}h-{step:.1f}Z"),
        _draw_path("ends", f"M{x:.1f} {y(found.low):.1f}V{y(found.high):.1f}"),
        _draw_box(x, thick, y(found.third), y(found.first)),
    ]
    if y(found.first) - y(found.third) > _NOTCHED:
        place = {"x": x - thick / 2, "y": y(found.median) - 0.75, "width": thick, "height": 1.5}
        shapes.append(element("rect", {"class": "median", **place}))
    if found.other is not None:
        radius = min(3.0, 0.3 * step)
        shapes.append(
            element("circle", {"class": "other", "cx": x, "cy": y(found.other), "r": radius})
        )
    return element("a", {"href": f"#layer-{index}", "class": f"mark{level}"}, *shapes)


def _draw_path(kind: str, way: str) -> Markup:
    return element("path", {"class": kind, "d": way})


def _draw_box(x: float, thick: float, top: float, bottom: float) -> Markup:
    height = max(2.0, bottom - top)
    return element(
        "rect",
        {
            "class": "box",
            "x": x - thick / 2,
            "y": (top + bottom - height) / 2,
            "width": thick,
            "height": height,
            "rx": min(1.5, thick / 2),
        },
    )


def _draw_ticks(y: Scale) -> Markup:
    parts = []
    for value in y.ticks():
        place = y(value)
        parts.append(
            element(
                "line",
                {"class": "grid", "x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": place, "y2": place},
            )
        )
        parts.append(
            element(
                "text",
                {"class": "tick", "x": _LEFT - 8, "y": place + 3.5, "text-anchor": "end"},
                format_number(value),
            )
        )
    return join(*parts)


def _draw_line(line: Line, y: Scale) -> Markup:
    ends = {"x1": _LEFT, "x2": _WIDTH - _RIGHT, "y1": y(line.value), "y2": y(line.value)}
    return element("line", {"class": f"limit {line.level}", **ends})


def _draw_label(line: Line, y: Scale) -> Markup:
    at = {"x": _WIDTH - _RIGHT + 8, "y": y(line.value) + 3.5}
    return element("text", {"class": f"limit {line.level}", **at}, line.label)


def _draw_groups(names: Sequence[str], step: float) -> Markup:
    """Bands behind the layers that share the beginning of their names."""
    parts, start = [], 0
    for number, (label, members) in enumerate(groupby(_group(names))):
        count = len(list(members))
        x, width = _LEFT + start * step, count * step
        if number % 2 == 0:
            parts.append(
                element(
                    "rect", {"class": "band", "x": x, "y": _TOP, "width": width, "height": _HEIGHT}
                )
            )
        room = int(width / _LETTER)
        if room >= min(len(label), 4):
            short = label if len(label) <= room else f"{label[: room - 1]}…"
            place = {
                "class": "tick",
                "x": x + width / 2,
                "y": _TOP + _HEIGHT + 15,
                "text-anchor": "middle",
            }
            parts.append(element("text", place, short))
        start += count
    return join(*parts)


def _group(names: Sequence[str]) -> list[str]:
    """For each name, the beginning that it shares with its neighbours; at most 12 in all."""
    if len(names) <= _GROUPS:
        return list(names)
    paths = [re.split(r"[./]", name) for name in names]
    best = ["" for _ in names]
    for depth in range(1, max(len(path) for path in paths)):
        labels = [".".join(path[:depth]) for path in paths]
        runs = sum(1 for _ in groupby(labels))
        if runs > _GROUPS:
            break
        if runs > 1:
            best = labels
    return best


def draw_sparkline(values: Any, scale: Scale, title: str) -> Markup:
    """A histogram without axes, for a line of a table.

    Args:
        values: any shape.
        scale: the same in every line, so that lines compare.
        title: shown where the pointer rests.
    """
    counts = scale.bins(values, 24)
    return element(
        "svg",
        {"viewBox": "0 0 120 24", "class": "sparkline", "role": "img"},
        element("title", None, title),
        _draw_outline("fill", counts, 120.0, 24, max([*counts, 1])),
    )


def draw_histogram(title: str, values: Any, scale: Scale, other: Any = None) -> Markup:
    """A histogram over channels, with an axis.

    Args:
        title: name of the values.
        values: any shape.
        scale: of both sets.
        other: a second set, drawn as an outline.
    """
    width, height = 280.0, 64
    bins = min(32, max(10, round(2.0 * math.sqrt(np.size(values)))))
    counts = scale.bins(values, bins)
    others = None if other is None else scale.bins(other, bins)
    most = max([*counts, *(others or []), 1])
    x = scale.onto(0.0, width)
    ticks = [
        element(
            "text",
            {"x": round(min(width - 2, max(2, x(t)))), "class": _anchor(x(t), width)},
            format_number(t),
        )
        for t in scale.ticks(4)
    ]
    shapes = [_draw_outline("fill", counts, width, height, most)]
    if others is not None:
        shapes.append(_draw_outline("outline", others, width, height, most))
    # The ticks share their height: a page of 300 layers has thousands of them.
    picture = element(
        "svg",
        {"viewBox": f"0 0 {width:.0f} {height + 20}", "class": "histogram", "role": "img"},
        *shapes,
        element("path", {"class": "base", "d": f"M0 {height}h{width:.0f}"}),
        element("g", {"transform": f"translate(0 {height + 15})"}, *ticks),
    )
    return element("figure", None, element("figcaption", None, title), picture)


def _anchor(x: float, width: float) -> str | None:
    return "first" if x < 16 else "last" if x > width - 16 else None


def _draw_outline(kind: str, counts: Sequence[int], width: float, height: int, most: int) -> Markup:
    """A path along the tops of the bars; every bar that is not empty stays visible.

    A bar is one unit wide, and neighbours of one height are one step of the path: such paths are
    most of a page.
    """
    tops = [height - (max(2, round(n / most * (height - 2))) if n else 0) for n in counts]
    path = "".join(f"V{top}h{len(list(same))}" for top, same in groupby(tops))
    scale = f"scale({width / len(counts):.5g} 1)"
    return element("path", {"class": kind, "transform": scale, "d": f"M0 {height}{path}V{height}Z"})
