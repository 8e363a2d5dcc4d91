"""The leaks of a model: a card for each, and a picture for each layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from batchnorm.tools.inspection.leaks.records import Leak, LeakFindings, Movement
from batchnorm.tools.inspection.page.document import make_document, make_header
from batchnorm.tools.inspection.page.markup import Markup, element
from batchnorm.tools.inspection.page.profiles import (
    Reach,
    describe,
    draw_axis,
    draw_profile,
    fit_reach,
)
from batchnorm.tools.text import format_number, plural, printable

__all__ = ["make_leaks_page", "make_section"]

_SHOWN = 200  # layers with a picture before the rest is folded away
_LISTED = 6  # layers of a card


def make_leaks_page(leaks: LeakFindings) -> str:
    """The result of `find_leaks` as an HTML document.

    Args:
        leaks: what `batchnorm.tools.find_leaks` returned.
    """
    first = leaks.first
    level = "ok" if first is None else "error"
    verdict = (
        "No layer lets padding reach real positions."
        if first is None
        else f"Padding reaches real positions, first through {printable(first.title)}."
    )
    facts = [
        ("leaks", f"{len(leaks.leaks):,}"),
        ("layer calls compared", f"{leaks.compared:,}"),
        ("positions", f"{_sizes(leaks.before)} → {_sizes(leaks.after)}"),
        ("outputs move by", format_number(leaks.moved, 2)),
    ]
    header = make_header(
        "Padding that reaches real positions of",
        printable(leaks.source),
        (level, verdict),
        facts,
    )
    title = f"Padding in {printable(leaks.source)}"
    foot = f"Relative differences up to {format_number(leaks.tolerance, 2)} count as rounding."
    return make_document(title, [header, *_make_cards(leaks), *_make_list(leaks)], foot)


def make_section(leaks: LeakFindings) -> Markup:
    """The same as a section of the report of `inspect`.

    Args:
        leaks: what `batchnorm.tools.find_leaks` returned.
    """
    return element(
        "section",
        None,
        element("h2", None, "Padding"),
        element("p", {"class": "legend"}, printable(leaks.summarize(), 400)),
        *_make_cards(leaks),
        *_make_list(leaks),
    )


def _make_cards(leaks: LeakFindings) -> list[Markup]:
    cards = [_make_card(group, "error" if counts else "note") for counts, group in leaks.groups()]
    return [element("section", {"class": "cards"}, *cards)] if cards else []


def _make_card(group: Sequence[Leak], level: str) -> Markup:
    """Leaks with the same remedy."""
    items = [
        element(
            "li",
            None,
            element("b", {"class": "name"}, printable(leak.title)),
            element("span", None, f"{leak.movement}. {leak.cause}"),
        )
        for leak in group
    ]
    shown = [element("ul", None, *items[:_LISTED])]
    if len(items) > _LISTED:
        rest = element("summary", None, f"and {plural(len(items) - _LISTED, 'more layer')}")
        shown.append(element("details", None, rest, element("ul", None, *items[_LISTED:])))
    return element(
        "article",
        {"class": f"card {level}"},
        element(
            "h3",
            None,
            plural(len(group), "layer"),
            element("span", {"class": f"pill {level}"}, "leak" if level == "error" else level),
        ),
        element("p", {"class": "remedy"}, group[0].remedy),
        *shown,
    )


def _make_list(leaks: LeakFindings) -> list[Markup]:
    """A row for each layer that calls no other, and for each that leaks by its own code."""
    shown = [layer for layer in leaks.layers if layer.leaks or not layer.inner]
    shown = [layer for layer in shown if layer.relative is not None]
    if not shown:
        return []
    reach = fit_reach([layer.profile for layer in shown], leaks.tolerance)
    rows = [_make_row(layer, leaks, reach) for layer in shown]
    titles = element(
        "div",
        {"class": "leak titles"},
        element("span", None, "Layer, in the order of execution"),
        element("span", {"class": "number"}, "Moves by"),
        element("span", None, draw_axis(reach)),
        element("span", None, ""),
    )
    legend = (
        f"In {leaks.shown}, what the layers before leak included. Each picture: the largest "
        f"difference at each of the last {reach.positions:,} positions of a sample, in positions "
        "of the input; the padding begins at the dotted line. Logarithmic: "
        f"{_range(reach)} of the outputs' size. Grey feet: nothing to compare."
    )
    parts = [
        element("h2", None, "By how much each layer moves"),
        element("p", {"class": "legend"}, legend),
        titles,
        element("div", {"class": "leaks"}, *rows[:_SHOWN]),
    ]
    if len(rows) > _SHOWN:
        rest = element("summary", None, f"and {plural(len(rows) - _SHOWN, 'more call')}")
        parts.append(element("details", None, rest, *rows[_SHOWN:]))
    return [element("section", None, *parts)]


def _make_row(layer: Movement, leaks: LeakFindings, reach: Reach) -> Markup:
    moved = layer.relative is not None and layer.relative > leaks.tolerance
    level, pill = ("note", "moves") if moved else ("ok", "ok")
    if layer.leaks:
        here = leaks.shown in layer.leaks
        level, pill = ("error", "leaks") if here else ("warning", f"in {layer.leaks[0]}")
    name = printable(layer.name or leaks.source)
    name += f" #{layer.call + 1}" if layer.call else ""
    if np.size(layer.profile):
        title = f"{name}: {describe(layer.profile, reach)}"
        picture = draw_profile(layer.profile, reach, title)
    else:
        picture = element("span", {"class": "whole"}, "no positions")
    return element(
        "div",
        {"class": f"leak {level}"},
        element(
            "span",
            {"class": "name"},
            name,
            element("small", None, printable(layer.kind)),
        ),
        element("span", {"class": "number"}, format_number(layer.amount or 0.0, 2)),
        element("span", None, picture),
        element("span", {"class": f"pill {level}"}, pill),
    )


def _range(reach: Reach) -> str:
    return f"{format_number(reach.scale.low, 2)} to {format_number(reach.scale.high, 2)}"


def _sizes(sizes: Sequence[int]) -> str:
    return " × ".join(f"{size:,}" for size in sizes)
