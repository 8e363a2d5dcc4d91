"""The report as one HTML file without scripts, light or dark as the reader's system is."""

from __future__ import annotations

from batchnorm.tools.inspection.findings import EXPLANATIONS, LEVELS, Finding
from batchnorm.tools.inspection.page.document import make_document, make_header
from batchnorm.tools.inspection.page.layers import make_layers
from batchnorm.tools.inspection.page.leaks import make_section
from batchnorm.tools.inspection.page.markup import Markup, element, join
from batchnorm.tools.inspection.page.overview import make_charts
from batchnorm.tools.inspection.records import Findings, LayerReport
from batchnorm.tools.text import plural, printable

__all__ = ["make_page"]

_SHOWN = 6  # layers of a finding before the rest is folded away


def make_page(report: Findings) -> str:
    """The report as an HTML document.

    Args:
        report: what `batchnorm.tools.inspect` returned.
    """
    charts = make_charts(report) if report.layers else []
    body = [_make_header(report), join(*charts[:1]), _make_findings(report)]
    if charts[1:]:
        body.append(element("section", None, element("h2", None, "Statistics"), *charts[1:]))
    if report.layers:
        body.append(make_layers(report))
    for note in report.notes:
        body.append(element("p", {"class": "legend"}, f"Note: {printable(note)}"))
    if report.leaks is not None:
        body.append(make_section(report.leaks))
    title = f"Batch normalizations of {printable(report.source)}"
    return make_document(title, body, "Statistics are per channel.")


def _make_header(report: Findings) -> Markup:
    facts = [("layers", f"{len(report.layers):,}"), ("channels", f"{report.channels:,}")]
    if report.batches:
        facts.append(("batches run", f"{report.batches:,}"))
        shares = [x.observed.padded for x in report.layers if x.observed is not None]
        known = [share for share in shares if share is not None]
        if known:
            facts.append(("padding", f"{sum(known) / len(known):.0%}"))
    kinds = sorted({layer.state.kind for layer in report.layers})
    if len(kinds) == 1:
        facts.append(("kind", printable(kinds[0])))
    source = printable(report.source)
    return make_header("Batch normalizations of", source, _judge(report), facts)


def _judge(report: Findings) -> tuple[str, str]:
    total = len(report.layers)
    if not total:
        return "ok", "The model has none."
    of = f"of {plural(total, 'layer')}" if total > 1 else "of 1 layer"
    if report.errors:
        return "error", f"Evaluation gives wrong results in {len(report.errors):,} {of}."
    if report.warnings:
        return "warning", f"Evaluation may give wrong results in {len(report.warnings):,} {of}."
    return "ok", f"No problem found in {plural(total, 'layer')}."


def _make_findings(report: Findings) -> Markup:
    cards = [
        _make_card(report, code, found)
        for code, found in report.by_code().items()
        if code != "padding"  # the layers' own rows have it
    ]
    if not cards:
        return Markup()
    return element("section", None, element("h2", None, "Findings"), *cards)


def _make_card(report: Findings, code: str, found: list[tuple[LayerReport, Finding]]) -> Markup:
    title, meaning, remedy = EXPLANATIONS[code]
    level = min((f.level for _, f in found), key=LEVELS.index)
    found = sorted(found, key=lambda pair: LEVELS.index(pair[1].level))
    items = [
        element(
            "li",
            None,
            element(
                "a",
                {"href": f"#layer-{report.layers.index(layer)}"},
                printable(layer.name or layer.state.kind),
            ),
            element("span", None, finding.message),
        )
        for layer, finding in found
    ]
    shown = [element("ul", None, *items[:_SHOWN])]
    if len(items) > _SHOWN:
        rest = element("summary", None, f"and {plural(len(items) - _SHOWN, 'more layer')}")
        shown.append(element("details", None, rest, element("ul", None, *items[_SHOWN:])))
    return element(
        "article",
        {"class": f"card {level}"},
        element(
            "h3",
            None,
            title,
            element("span", {"class": f"pill {level}"}, level),
            element("span", {"class": "count"}, plural(len(found), "layer")),
        ),
        element("p", None, meaning),
        element("p", {"class": "remedy"}, remedy),
        *shown,
    )
