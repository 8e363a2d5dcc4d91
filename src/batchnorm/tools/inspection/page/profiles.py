"""Pictures of how far a difference reaches into a sample, as inline SVG."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from batchnorm.tools.inspection.page.markup import Markup, element, join
from batchnorm.tools.inspection.page.scales import Scale
from batchnorm.tools.text import format_number, plural

__all__ = ["Reach", "describe", "draw_axis", "draw_profile", "fit_reach"]

_WIDTH, _HEIGHT = 240.0, 34.0
_BINS = 60  # most bars in a picture
_LEAST = 16  # positions shown where a leak reaches less far


class Reach(NamedTuple):
    """The scales that all pictures share.

    Attributes:
        positions: number of positions shown, counted from the end of a sample.
        scale: of relative differences, logarithmic; rounding is below its lower end.
    """

    positions: int
    scale: Scale


def fit_reach(profiles: Sequence[Any], tolerance: float) -> Reach:
    """Scales that show every difference beyond rounding.

    Args:
        profiles: of all layers; empty ones and NaN are left out.
        tolerance: relative differences up to this one are rounding.
    """
    far, most = 0, tolerance
    longest = max((len(profile) for profile in profiles), default=1)
    for profile in profiles:
        moved = np.nan_to_num(np.asarray(profile, np.float64), nan=0.0, posinf=1.0) > tolerance
        if moved.any():
            far = max(far, int(np.flatnonzero(moved)[-1]) + 1)
            most = max(most, float(np.nanmax(np.where(np.isinf(profile), 1.0, profile))))
    positions = max(1, min(longest, max(_LEAST, far * 5 // 4)))
    return Reach(positions, Scale(tolerance, max(most, 10.0 * tolerance), log=True))


def draw_profile(profile: Any, reach: Reach, title: str) -> Markup:
    """A bar for each position, or for a few neighbours: the end of the sample is on the right.

    Args:
        profile: largest difference for each distance to the end; NaN where there is none.
        reach: scales.
        title: shown where the pointer rests, and read to those who see no pictures.
    """
    values = _bin(np.asarray(profile, np.float64), reach.positions)
    step = _WIDTH / len(values)
    height = reach.scale.onto(3.0, _HEIGHT - 2.0)
    path, none = [], []
    for i, value in enumerate(values):
        x = _WIDTH - (i + 1) * step
        if np.isnan(value):
            none.append(f"M{x:.4g} {_HEIGHT:.4g}h{step:.4g}v-3h-{step:.4g}Z")
        elif value > reach.scale.low:
            # A gap shows that these are positions, where there is room for one.
            wide = step - (0.6 if step > 2.5 else 0.0)
            path.append(f"M{x:.4g} {_HEIGHT:.4g}h{wide:.4g}v-{height(value):.4g}h-{wide:.4g}Z")
    return element(
        "svg",
        {"viewBox": f"0 0 {_WIDTH:.0f} {_HEIGHT + 1:.0f}", "class": "profile", "role": "img"},
        element("title", None, title),
        element("path", {"class": "none", "d": "".join(none)}) if none else Markup(),
        element("path", {"class": "moved", "d": "".join(path)}) if path else Markup(),
        element("line", {"class": "base", "x1": 0, "x2": _WIDTH, "y1": _HEIGHT, "y2": _HEIGHT}),
        element("line", {"class": "end", "x1": _WIDTH, "x2": _WIDTH, "y1": 0, "y2": _HEIGHT}),
    )


def draw_axis(reach: Reach) -> Markup:
    """The scale of positions below the pictures' title, with a mark where the padding begins."""
    far = reach.positions
    ticks = sorted({far, far // 2})
    labels = [
        element(
            "text",
            {
                "class": "tick",
                "x": _WIDTH * (1 - tick / far),
                "y": 11,
                "text-anchor": "start" if tick == far else "middle",
            },
            f"−{tick:,}",
        )
        for tick in ticks
        if tick
    ]
    labels.append(
        element("text", {"class": "tick", "x": _WIDTH, "y": 11, "text-anchor": "end"}, "end")
    )
    return element("svg", {"viewBox": f"0 0 {_WIDTH:.0f} 15", "class": "profile"}, join(*labels))


def describe(profile: Any, reach: Reach) -> str:
    """The picture in words."""
    values = np.nan_to_num(np.asarray(profile, np.float64), nan=0.0)
    moved = np.flatnonzero(values > reach.scale.low)
    if not moved.size:
        return "no real position moves"
    most = format_number(float(values.max()), 2)
    return f"{plural(int(moved[-1]) + 1, 'position')} from the end move, by up to {most} relatively"


def _bin(profile: Any, positions: int) -> Any:
    """The largest value of each bar, from the end inward; NaN without any."""
    values = np.full(positions, np.nan)
    shown = profile[:positions]
    values[: len(shown)] = shown
    count = min(_BINS, positions)
    return np.array([_most(part) for part in np.array_split(values, count)])


def _most(part: Any) -> float:
    known = part[~np.isnan(part)]
    return float(known.max()) if known.size else float("nan")
