"""The demo's table and picture."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # before pyplot: there may be no screen

from matplotlib import pyplot as plt
from matplotlib.ticker import MaxNLocator
from rich.box import SIMPLE_HEAD
from rich.table import Table

from batchnorm.demo.experiment import EXTRAS, Measured

# Okabe and Ito's colours, which differ for colour-blind eyes and in grey.
_COLOURS = ("#D55E00", "#0072B2")
_HEADINGS = (
    "",
    "test\naccuracy, %",
    "error of mean,\n% of std",
    "error of\nvariance, %",
    "logits\nmoved by",
    "train,\ns/epoch",
)
_WIDE = 80  # columns of a terminal that has room for a row of figures
_SMALLEST = 1e-7  # about one rounding of float32: nothing below it is meaningful on a log axis


def make_table(results: dict[str, Measured], width: int = _WIDE) -> Table:
    """One row for each kind of norm, every figure over the seeds.

    Args:
        results: by kind of norm.
        width: of the terminal; where it is narrow, each kind has a column.
    """
    rows = [_HEADINGS, *(_make_row(name, measured) for name, measured in results.items())]
    if width < _WIDE:
        flat = [[cell.replace("\n", " ") for cell in row] for row in rows]
        rows = [tuple(column) for column in zip(*flat, strict=True)]
    table = Table(title="Padded batches of ink points from handwritten digits", box=SIMPLE_HEAD)
    for heading in rows[0]:
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    for row in rows[1:]:
        table.add_row(*row)
    return table


def _make_row(name: str, measured: Measured) -> tuple[str, ...]:
    return (
        name,
        _spread([100 * a[-1] for a in measured.accuracy], ".1f"),
        _spread([100 * e for e in measured.mean_error], ".2g"),
        _spread([100 * e for e in measured.var_error], ".2g"),
        f"{statistics.fmean(m[-1] for m in measured.moved):.1e}",
        f"{statistics.fmean(measured.seconds):.2f}",
    )


def explain(seeds: int) -> str:
    """The legend of the table."""
    return (
        f"{_averaged(seeds)} Errors: running "
        "statistics of the first norm, worst channel, after one pass with fixed weights, against "
        "all real points in float64. Moved: largest change of one sample's training logits when "
        f"{EXTRAS[-1]} padded points are added to its batch. Both networks leave padding out of "
        "their pooling, so the norm is all that differs."
    )


def _averaged(seeds: int) -> str:
    if seeds == 1:
        return "One pair of networks."
    return f"Means over {seeds} pairs of networks, ± their standard deviation."


def draw(results: dict[str, Measured], path: Path) -> None:
    """Write the picture of the table as PNG."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 4.4), layout="constrained")
    _draw_accuracy(axes[0], results)
    _draw_statistics(axes[1], results)
    _draw_movement(axes[2], results)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _draw_accuracy(axis: Any, results: dict[str, Measured]) -> None:
    for colour, (name, measured) in zip(_COLOURS, results.items(), strict=True):
        runs = [[100 * a for a in run] for run in measured.accuracy]
        epochs = range(1, len(runs[0]) + 1)
        axis.plot(
            epochs, [statistics.fmean(e) for e in zip(*runs, strict=True)], color=colour, label=name
        )
        low, high = ([f(e) for e in zip(*runs, strict=True)] for f in (min, max))
        axis.fill_between(epochs, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.set(title="Test accuracy, mean and range of seeds", xlabel="epoch", ylabel="%")


def _draw_statistics(axis: Any, results: dict[str, Measured]) -> None:
    for index, (colour, measured) in enumerate(zip(_COLOURS, results.values(), strict=True)):
        for place, errors in enumerate((measured.mean_error, measured.var_error)):
            x = place + (index - 0.5) * 0.2
            axis.plot([x] * len(errors), errors, "o", color=colour, markersize=6, alpha=0.7)
    axis.set_xticks([0, 1], ["mean, in std", "variance, relative"])
    axis.set_xlim(-0.6, 1.6)
    axis.set(
        title="Running statistics, worst channel, by seed",
        yscale="log",
        ylabel="error",
    )


def _draw_movement(axis: Any, results: dict[str, Measured]) -> None:
    for colour, measured in zip(_COLOURS, results.values(), strict=True):
        moved = [max(statistics.fmean(e), _SMALLEST) for e in zip(*measured.moved, strict=True)]
        axis.plot(EXTRAS[1:], moved[1:], "o-", color=colour, markersize=4)
    axis.set(
        title="One sample's output, moved by padding",
        xlabel="padded points added to its batch",
        ylabel=f"largest change of a logit (at least {_SMALLEST:.0e})",
        yscale="log",
    )


def _spread(values: list[float], form: str) -> str:
    if len(values) == 1:
        return f"{values[0]:{form}}"
    return f"{statistics.fmean(values):{form}} ± {statistics.stdev(values):{form}}"
