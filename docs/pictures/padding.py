"""The picture of the start page: the effect of padding on a batch norm that counts it as data.

    python docs/pictures/padding.py            # measure and draw; takes some minutes
    python docs/pictures/padding.py --draw     # draw from padding.json

The demo's networks and data, trained at several amounts of padding.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from batchnorm.demo import data, experiment

matplotlib.use("Agg")  # before pyplot: there may be no screen

from matplotlib import pyplot as plt

FOLDER = Path(__file__).parent
MOST_EXTRA = (0, 48, 96, 192, 384)  # most padded points; each batch draws its number
SHOWN = 96  # the left panel's
SEEDS = 5
EPOCHS = 10
NAMES = {
    "torch.nn": "torch.nn.BatchNorm1d, without a mask",
    "batchnorm": "batchnorm, with the mask",
}
# Okabe and Ito's colours, which differ for colour-blind eyes and in grey; lighter on dark pages.
COLOURS = {False: ("#D55E00", "#0072B2", "#999999"), True: ("#F28C4B", "#56B4E9", "#888888")}
INK = {False: "#222222", True: "#e2e4e9"}


def measure(
    most_extra: Sequence[int] = MOST_EXTRA,
    seeds: int = SEEDS,
    epochs: int = EPOCHS,
    limit: int | None = None,
) -> dict[str, Any]:
    """All data of the picture.

    Args:
        most_extra: amounts of padding to train at.
        seeds: pairs of networks for each of them.
        epochs: passes over the training digits.
        limit: use that many training digits only.
    """
    framework = experiment.load_framework("torch")
    samples = data.load_samples()[0][:limit]
    levels = []
    for extra in most_extra:
        found = experiment.run(
            framework, seeds, epochs, lambda: None, limit=limit, most_extra=extra
        )
        batches = data.batches(samples, experiment.BATCH_SIZE, 0, extra)
        share = float(np.mean([1.0 - batch.mask.mean() for batch in batches]))
        norms = {
            name: {
                "accuracy": [run[-1] for run in measured.accuracy],
                "mean_error": measured.mean_error,
                "var_error": measured.var_error,
            }
            for name, measured in found.items()
        }
        levels.append({"most_extra": extra, "padding": share, "norms": norms})
    return {
        "command": "python docs/pictures/padding.py",
        "torch": version("torch"),
        "seeds": seeds,
        "epochs": epochs,
        "levels": levels,
        "channel": _one_channel(framework, samples),
    }


def _one_channel(framework: Any, samples: list[data.Sample]) -> dict[str, Any]:
    """A channel's values and both running statistics, for weights as they start."""
    networks = dict(zip(framework.names, framework.make_pair(0), strict=True))
    found = {}
    for name, network in networks.items():
        batches = data.batches(samples, experiment.BATCH_SIZE, 0, SHOWN)
        each = [network.batch_statistics(batch) for batch in batches]
        found[name] = [np.mean(a, axis=0) for a in zip(*each, strict=True)]
    weight, bias = networks["batchnorm"].first_layer()
    x = np.concatenate([sample.points for sample in samples]) @ weight + bias  # (points, C)
    error = np.abs(found["torch.nn"][0] - x.mean(axis=0)) / x.std(axis=0)
    middle = int(np.argsort(error)[len(error) // 2])  # neither the worst channel nor the best
    density, edges = np.histogram(x[:, middle], bins=48, density=True)
    return {
        "density": density.tolist(),
        "edges": edges.tolist(),
        "statistics": {
            name: [float(a[middle]) for a in mean_and_var] for name, mean_and_var in found.items()
        },
    }


def draw(record: dict[str, Any], path: Path, *, dark: bool, narrow: bool = False) -> None:
    """Write the picture as SVG, on a transparent ground.

    Args:
        record: what `measure` returned.
        path: of the file.
        dark: for a dark page.
        narrow: panels one below the other, for the width of a telephone.
    """
    shape, size = ((3, 1), (5, 10.5)) if narrow else ((1, 3), (13, 4))
    style = {
        **{f"{part}.color": INK[dark] for part in ("text", "xtick", "ytick")},
        **{f"axes.{part}": INK[dark] for part in ("labelcolor", "edgecolor", "titlecolor")},
        "font.size": 11,
        "svg.hashsalt": path.name,  # the same bytes each time
    }
    with plt.rc_context(style):
        figure, axes = plt.subplots(*shape, figsize=size, layout="constrained")
        _draw_channel(axes[0], record["channel"], COLOURS[dark])
        _draw_levels(axes[1], record, "var_error", COLOURS[dark])
        axes[1].set(title="Error of the running variance", ylabel="%, worst channel")
        _draw_levels(axes[2], record, "accuracy", COLOURS[dark])
        axes[2].set(title="Accuracy on the test digits", ylabel="%")
        for axis in axes:
            axis.spines[["top", "right"]].set_visible(False)
            axis.patch.set_alpha(0.0)
        handles, labels = axes[1].get_legend_handles_labels()
        columns = 1 if narrow else 2
        figure.legend(handles, labels, loc="outside lower center", ncols=columns, frameon=False)
        figure.savefig(path, transparent=True, metadata={"Date": None})
        plt.close(figure)


def _draw_channel(axis: Any, channel: dict[str, Any], colours: Sequence[str]) -> None:
    edges = np.array(channel["edges"])
    axis.stairs(channel["density"], edges, fill=True, color=colours[2], alpha=0.5)
    reach = np.linspace(edges[0] - 0.5, edges[-1] + 0.5, 400)
    for colour, (mean, var) in zip(colours, channel["statistics"].values(), strict=False):
        bell = np.exp(-((reach - mean) ** 2) / (2 * var)) / np.sqrt(2 * np.pi * var)
        axis.plot(reach, bell, color=colour, linewidth=2.2)
    axis.set(title="One channel: its values, and what\nthe running statistics say", yticks=[])
    axis.spines["left"].set_visible(False)


def _draw_levels(axis: Any, record: dict[str, Any], figure: str, colours: Sequence[str]) -> None:
    levels = record["levels"]
    shares = [100.0 * level["padding"] for level in levels]
    for colour, (name, label) in zip(colours, NAMES.items(), strict=False):
        runs = [[100.0 * v for v in level["norms"][name][figure]] for level in levels]
        axis.plot(
            shares,
            [statistics.fmean(r) for r in runs],
            "o-",
            color=colour,
            label=label,
            markersize=4,
        )
        low, high = ([f(r) for r in runs] for f in (min, max))
        axis.fill_between(shares, low, high, color=colour, alpha=0.2, linewidth=0)
    axis.set_xlabel("padding, % of the points")
    axis.grid(axis="y", alpha=0.25)


def main() -> None:
    """Measure if asked to, and draw."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draw", action="store_true", help="draw what padding.json holds")
    path = FOLDER / "padding.json"
    if not parser.parse_args().draw:
        path.write_text(json.dumps(measure(), indent=1) + "\n")
    record = json.loads(path.read_text())
    for dark, narrow in itertools.product((False, True), repeat=2):
        name = f"padding-{'narrow-' if narrow else ''}{'dark' if dark else 'light'}.svg"
        draw(record, FOLDER / name, dark=dark, narrow=narrow)


if __name__ == "__main__":
    main()
