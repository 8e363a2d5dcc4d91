"""The report's charts over all layers."""

from __future__ import annotations

from collections.abc import Sequence

from batchnorm.tools.inspection.page.charts import Line, Spread, draw_layers, spread
from batchnorm.tools.inspection.page.markup import Markup, element
from batchnorm.tools.inspection.page.scales import Scale, fit
from batchnorm.tools.inspection.records import Findings
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.text import printable

__all__ = ["FLOOR", "HINT", "make_charts"]


def make_charts(report: Findings) -> list[Markup]:
    """Each quantity over all layers, the one that matters most first.

    Args:
        report: with at least one layer.
    """
    names = [printable(layer.name) for layer in report.layers]
    limits = _limits(report.limits)
    figures: list[Markup] = []
    for key, title, about in _CHARTS:
        arrays = [dict(layer.arrays()) for layer in report.layers]
        others = [a.get(f"{key}_padded") for a in arrays]
        spreads = [
            None if key not in a else spread(name, layer.level, a[key], other)
            for name, layer, a, other in zip(names, report.layers, arrays, others, strict=True)
        ]
        if not any(spreads):
            continue
        scale = _fit_chart(key, spreads)
        picture = draw_layers(spreads, names, scale, limits.get(key, ()))
        legend = _LEGEND + (_RING if any(s and s.other is not None for s in spreads) else "")
        figures.append(
            element(
                "figure",
                {"class": "chart"},
                element("figcaption", None, element("b", None, title), " ", about),
                element("p", {"class": "hint"}, HINT),
                element("div", {"class": "scroll", "tabindex": "0"}, picture),
                element("p", {"class": "legend"}, legend) if not figures else Markup(),
            )
        )
    return figures


_CHARTS = (
    (
        "drift",
        "Drift",
        "How far evaluation moves the normalized values from those of training, in standard "
        "deviations.",
    ),
    ("std", "Running standard deviation", "The divisor of evaluation, but for eps."),
    ("gain", "Gain", "|gamma| / sqrt(var + eps): the factor of evaluation for a difference in x."),
)
HINT = "Wider than the screen: scroll it sideways."
_LEGEND = "Line: all channels. Bar: the middle half of them. Notch: their median."
_RING = " Ring: the median if padding were counted."
FLOOR = {"drift": 1e-3, "std": 1e-12, "gain": 1e-12}


def _limits(limits: Thresholds) -> dict[str, Sequence[Line]]:
    return {
        "drift": (
            Line(limits.drift_warning, f"warning {limits.drift_warning:g}", "warning"),
            Line(limits.drift_error, f"error {limits.drift_error:g}", "error"),
        ),
        "gain": (Line(limits.gain, f"warning {limits.gain:g}", "warning"),),
    }


def _fit_chart(key: str, spreads: Sequence[Spread | None]) -> Scale:
    values = [v for s in spreads if s for v in (s.low, s.median, s.high, s.other) if v is not None]
    if key == "drift":
        # The same range where nothing drifts, so that reports can be compared.
        least = min([0.01, *(s.first for s in spreads if s and s.first > FLOOR[key])])
        return Scale(least, max(3.0, max(values) * 1.3), log=True)
    found = fit(values, least=FLOOR[key], log=True)
    assert found is not None
    return found
