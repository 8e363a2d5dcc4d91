"""The figures that the library is held to, and the verdict on a run.

python benchmarks/targets.py [FILE]     # of benchmarks/results/cpu.json, without measuring
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cases import CASES

Record = dict[str, Any]
Found = tuple[float, str] | None
RESULTS = Path(__file__).parent / "results"
HUGE = ", huge pages"


@dataclass(frozen=True)
class Target:
    """A figure, and its least value, or its greatest where `at_most`."""

    what: str
    floor: float
    find: Callable[[Record], Found]
    at_most: bool = False

    def judge(self, record: Record) -> Record:
        """The target as the JSON has it; `measured` and `met` are None for cases left out."""
        found = self.find(record)
        entry: Record = {"what": self.what, "floor": self.floor, "at most": self.at_most}
        if found is None:
            return entry | {"measured": None, "where": "", "met": None}
        value, where = found
        met = value <= self.floor if self.at_most else value >= self.floor
        return entry | {"measured": float(f"{value:.3g}"), "where": where, "met": met}


def quotient(record: Record, case: str, above: str, below: str) -> float | None:
    """The time of one variant of a case over that of another; None if not measured."""
    variants = record["cases"].get(case, {}).get("variants", {})
    if above not in variants or below not in variants:
        return None
    return float(variants[above]["ms"] / variants[below]["ms"])


def judge(record: Record) -> list[Record]:
    """Every target."""
    return [target.judge(record) for target in TARGETS]


def print_targets(entries: Iterable[Record]) -> None:
    """One line each: ok, short, or not measured."""
    for e in entries:
        state = {True: "ok", False: "short", None: "not measured"}[e["met"]]
        measured = "" if e["measured"] is None else f"measured {e['measured']:g}"
        bound = f"{'at most' if e['at most'] else 'floor'} {e['floor']:g}"
        where = f" ({e['where']})" if e["where"] else ""
        print(f"{state:<13}{e['what']:<66}{bound:<16}{measured}{where}")


def _of(case: str, above: str, below: str = "ours") -> Callable[[Record], Found]:
    def find(record: Record) -> Found:
        value = quotient(record, case, above, below)
        return None if value is None else (value, "")

    return find


def _worst(names: Iterable[str]) -> Callable[[Record], Found]:
    def find(record: Record) -> Found:
        found = [(quotient(record, name, "torch", "ours"), name) for name in names]
        return min(((value, name) for value, name in found if value is not None), default=None)

    return find


def _most_zeroed(record: Record) -> Found:
    names = [case.name for case in CASES if case.inference and case.padded is not None]
    found = [(quotient(record, name, "ours, zeroed", "ours"), name) for name in names]
    return max(((value, name) for value, name in found if value is not None), default=None)


def _accuracy(record: Record) -> Found:
    errors = record.get("accuracy", {}).get("1e+06")
    return None if errors is None else (errors["ours"], "")


TARGETS = (
    Target("(262144, 64), times as fast as torch", 4.0, _of("rows", "torch")),
    Target(
        "(262144, 64), the same with huge pages for both",
        1.25,
        _of("rows", f"torch{HUGE}", f"ours{HUGE}"),
    ),
    Target("half padded, times as fast as packing", 12.0, _of("mask-50", "pack")),
    Target("half padded, against the compiled formula", 2.5, _of("mask-50", "formula, compiled")),
    Target("channels last, times as fast as BatchNorm2d", 2.2, _of("channels-last", "torch")),
    Target("channels first, times as fast as BatchNorm2d", 2.2, _of("channels-first", "torch")),
    Target("ReLU, times as fast as separate operators", 3.5, _of("relu", "torch")),
    Target("add and ReLU, times as fast as separate operators", 3.5, _of("add-relu", "torch")),
    Target("3-D, times as fast as BatchNorm3d", 2.0, _of("volume", "torch")),
    Target(
        "inference, worst of the large shapes, against torch",
        1.5,
        _worst(case.name for case in CASES if case.inference and case.padded is None),
    ),
    Target(
        "any shape, no option, the worst of all, against torch",
        0.9,
        _worst(case.name for case in CASES if case.plain),
    ),
    Target(
        "(262144, 64), reused buffers, times the plain copy",
        1.15,
        _of("rows", "ours, reused buffers", "copy"),
        at_most=True,
    ),
    Target(
        "(262144, 64), fresh buffers, times the plain copy",
        1.7,
        _of("rows", "ours", "copy"),
        at_most=True,
    ),
    Target(
        "half padded, times the step without a mask",
        1.05,
        _of("mask-50", "ours", "ours, no mask"),
        at_most=True,
    ),
    Target(
        "image half padded, times the step without a mask",
        1.05,
        _of("mask-image", "ours", "ours, no mask"),
        at_most=True,
    ),
    Target(
        "half padded, zeros at padding, times normalized padding",
        1.02,
        _of("mask-50", "ours, zeroed", "ours"),
        at_most=True,
    ),
    Target(
        "image half padded, zeros at padding, times normalized padding",
        1.02,
        _of("mask-image", "ours, zeroed", "ours"),
        at_most=True,
    ),
    Target(
        "inference, zeros at padding, worst, times no mask",
        1.05,
        _most_zeroed,
        at_most=True,
    ),
    Target("error of y at mean 1e6, deviation 1", 5e-6, _accuracy, at_most=True),
)


if __name__ == "__main__":
    _path = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS / "cpu.json"
    print_targets(judge(json.loads(_path.read_text())))
