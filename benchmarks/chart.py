"""The picture of a run, made from its JSON.

python benchmarks/chart.py [JSON [PNG]]     # of benchmarks/results/cpu.json by default
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

from judging import HUGE, RESULTS, quotient

matplotlib.use("Agg")  # before pyplot: there may be no screen

from matplotlib import pyplot as plt

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
_COLOURS = {"": "#0072B2", HUGE: "#56B4E9"}
_LABELS = {"": "torch as it comes", HUGE: "torch with huge pages (THP_MEM_ALLOC_ENABLE=1)"}
_LOSS = "#D55E00"
_HEADLINES = {  # case: label and rival
    "rows": ("(262144, 64)", "torch"),
    "channels-last": ("(32, 256, 56, 56), channels last", "torch"),
    "channels-first": ("(32, 256, 56, 56)", "torch"),
    "deep": ("(64, 512, 14, 14)", "torch"),
    "volume": ("(8, 64, 16, 64, 64)", "torch"),
    "small": ("(32, 64)", "torch"),
    "relu": ("(262144, 64), ReLU", "torch"),
    "add-relu": ("(262144, 64), add, ReLU", "torch"),
    "mask-50": ("(262144, 64), half padded,\nagainst packing", "pack"),
    "mask-image": ("(32, 256, 56, 56), half padded,\nagainst packing", "pack"),
    "inference-rows": ("(262144, 64), inference", "torch"),
    "inference-channels-first": ("(32, 256, 56, 56), inference", "torch"),
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the picture as PNG."""
    names = [name for name in _HEADLINES if name in record["cases"]]
    figure, axis = plt.subplots(figsize=(10, 7), layout="constrained")
    for offset, suffix in ((-0.2, ""), (0.2, HUGE)):
        for place, name in enumerate(names):
            rival = _HEADLINES[name][1]
            value = quotient(record, name, f"{rival}{suffix}", "ours")
            if value is not None:
                _draw_bar(axis, place + offset, value, suffix)
    axis.axvline(1.0, color="black", linewidth=1.2)
    axis.set_yticks(range(len(names)), [_HEADLINES[name][0] for name in names])
    axis.invert_yaxis()
    _scale(axis)
    machine = record["machine"]
    axis.set_title(
        f"Times as fast as torch {record['versions']['torch']}: training steps, and inference\n"
        f"{machine['processor']}, {machine['threads']} threads, {machine['instructions']}, float32",
        fontsize=11,
    )
    colours, labels = [*_COLOURS.values(), _LOSS], [*_LABELS.values(), "slower than torch"]
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in colours]
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def _draw_bar(axis: Any, place: float, value: float, suffix: str) -> None:
    """A bar from 1, to the right for a gain and to the left for a loss."""
    colour = _COLOURS[suffix]
    axis.barh(place, value - 1.0, 0.38, left=1.0, color=colour if value >= 1.0 else _LOSS)
    side = "left" if value >= 1.0 else "right"
    axis.annotate(
        f"{value:.2f}",
        (value, place),
        xytext=(3 if value >= 1.0 else -3, 0),
        textcoords="offset points",
        va="center",
        ha=side,
        fontsize=8,
    )


def _scale(axis: Any) -> None:
    """A logarithmic axis, on which twice and half as fast are as long."""
    axis.set_xscale("log", base=2)
    low, high = axis.get_xlim()
    low, high = min(low, 0.8) * 0.95, max(high, 2.0) * 1.15
    axis.set_xlim(low, high)
    ticks = [t for t in (0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0) if low < t < high]
    axis.set_xticks(ticks, [f"{t:g}×" for t in ticks])
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="x", alpha=0.3)
    axis.set_axisbelow(True)


def main() -> None:
    """Draw the JSON named on the command line."""
    arguments = [Path(a) for a in sys.argv[1:]]
    source = arguments[0] if arguments else RESULTS / "cpu.json"
    target = arguments[1] if len(arguments) > 1 else source.with_suffix(".png")
    draw(json.loads(source.read_text()), target)


if __name__ == "__main__":
    main()
