"""Shared parts of the examples: options, figures of several runs, pictures."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

matplotlib.use("Agg")  # before pyplot: there may be no screen

from matplotlib import pyplot as plt

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
RED, BLUE, GREEN, GREY = "#D55E00", "#0072B2", "#009E73", "#666666"


def parse_options(description: str | None, seeds: int) -> argparse.Namespace:
    """The options of every example, checked: `seeds`, `quick` and `out`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, help=f"runs ({seeds})")
    parser.add_argument("--quick", action="store_true", help="a short run of one seed")
    parser.add_argument("--out", type=Path, help="where to write the picture, a .png")
    options = parser.parse_args()
    if options.seeds < 1:
        parser.error(f"--seeds must be at least 1; got {options.seeds}.")
    if options.out is not None and options.out.suffix != ".png":
        parser.error(f"--out must end in .png; got {options.out}.")
    if options.out is not None and not options.out.resolve().parent.is_dir():
        parser.error(f"--out: the folder {options.out.resolve().parent} does not exist.")
    if options.quick:
        options.seeds = 1
    return options


def spread(values: Any, form: str = ".1f") -> str:
    """Mean and standard deviation over the seeds."""
    return f"{np.mean(values):{form}} ± {deviation(values):{form}}"


def deviation(values: Any) -> float:
    """The standard deviation of a sample, and 0 of a single value."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def print_table(headings: list[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest entry; all but the first are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
    for row in (headings, *rows):
        first, *rest = (text.strip() for text in row)
        cells = [first.ljust(widths[0])]
        cells += [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        print("  ".join(cells).rstrip())


def draw_runs(axis: Any, runs: Any, colour: str, label: str, line: str = "-") -> None:
    """The mean over the seeds of (seeds, epochs) values, and their range."""
    runs = np.asarray(runs)
    epochs = np.arange(1, runs.shape[1] + 1)
    axis.plot(epochs, runs.mean(axis=0), line, color=colour, label=label)
    axis.fill_between(
        epochs, runs.min(axis=0), runs.max(axis=0), color=colour, alpha=0.2, linewidth=0
    )


def save(figure: Any, path: Path | None) -> None:
    """Write the picture, if asked to, without the frame's upper and right side."""
    for axis in figure.axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_axisbelow(True)
    if path is not None:
        figure.savefig(path, dpi=110)
        print(f"picture: {path}")
    plt.close(figure)
