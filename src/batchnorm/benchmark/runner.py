"""The runner: checks every variant of a case, times them in turns, and writes records."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.benchmark.case import count_bytes, count_copied_bytes
from batchnorm.benchmark.machine import describe_machine, describe_versions
from batchnorm.benchmark.problem import Problem, solve
from batchnorm.benchmark.timing import Clock, round_to, summarize, take_turns, time_calls
from batchnorm.benchmark.variant import Variant, check
from batchnorm.reference import batch_norm

__all__ = ["check_all", "describe_run", "measure", "measure_accuracy", "write_record"]

OFFSETS = (0.0, 1e2, 1e4, 1e6)  # means of the accuracy table, at deviation 1


def measure(
    problem: Problem,
    variants: dict[str, Variant],
    seconds: float,
    least: int,
    *,
    size: int | None = None,
    clock: Clock = time_calls,
    every: int = 1,
) -> dict[str, dict[str, Any]]:
    """Each variant's figures, once all of them are right.

    Args:
        problem: the problem that they solve.
        variants: by name.
        seconds: time to take turns, about.
        least: least number of rounds, however long they take.
        size: bytes that the job must move; None counts padded rows like real ones.
        clock: measures calls of a step.
        every: check each so many channels only.

    Returns:
        For each variant: median, quartiles, GB/s, rounds, error; and, if one of them copies,
        `trips`, the time over that of one copy of x.

    Raises:
        RuntimeError: as `check`.
        ValueError: as `check`.
    """
    errors = check_all(problem, variants, every)
    times = take_turns({name: v.step for name, v in variants.items()}, seconds, least, clock)
    whole = count_bytes(problem.case.bare)
    size = count_bytes(problem.case) if size is None else size
    figures = {}
    for name, variant in variants.items():
        moved = whole if variant.unmasked else size
        if variant.copies:
            moved = variant.copies * count_copied_bytes(problem.case)
        figures[name] = summarize(times[name], moved)
        figures[name]["error"] = float(f"{errors[name]:.1e}")
    _add_trips(figures, variants)
    return figures


def _add_trips(figures: dict[str, dict[str, Any]], variants: dict[str, Variant]) -> None:
    copy = next((name for name, v in variants.items() if v.copies), None)
    if copy is not None:
        one = figures[copy]["ms"] / variants[copy].copies
        for found in figures.values():
            found["trips"] = round_to(found["ms"] / one, 3)


def check_all(problem: Problem, variants: dict[str, Variant], every: int = 1) -> dict[str, float]:
    """Each variant's error.

    Args:
        problem: the problem that they solve.
        variants: by name.
        every: check each so many channels only.

    Raises:
        RuntimeError: as `check`.
        ValueError: as `check`.
    """
    errors: dict[str, float] = {}
    for unmasked in (False, True):
        chosen = {name: v for name, v in variants.items() if v.unmasked == unmasked}
        if chosen:
            solved = problem.unmasked if unmasked else problem
            expected = solve(solved, every)
            errors |= {name: check(name, v, solved, expected) for name, v in chosen.items()}
    return errors


def measure_accuracy(layers: dict[str, Callable[[Any], Any]]) -> dict[str, dict[str, float]]:
    """Largest |y - float64| of training steps, float32 (4096, 8), deviation 1, by mean.

    Args:
        layers: functions from x to y, both numpy arrays, by name; each makes a new layer.
    """
    noise = np.random.default_rng(0).standard_normal((4096, 8))
    found: dict[str, dict[str, float]] = {}
    for mean in OFFSETS:
        x = (noise + mean).astype(np.float32)
        expected, _ = batch_norm(x)
        found[f"{mean:g}"] = {
            name: float(f"{np.abs(forward(x) - expected).max():.2g}")
            for name, forward in layers.items()
        }
    return found


def describe_run(program: str, threads: int, *packages: str) -> dict[str, Any]:
    """The command, the machine and the versions, as records begin with them.

    Args:
        program: path of the script in the repository.
        threads: number of threads that steps use.
        packages: distributions whose speed enters, beside numpy and this one.
    """
    return {
        "command": " ".join(["python", program, *sys.argv[1:]]),
        "machine": describe_machine(threads),
        "versions": describe_versions(*packages),
    }


def write_record(record: dict[str, Any], path: Path) -> None:
    """Write a record as JSON."""
    path.write_text(json.dumps(record, indent=2) + "\n")
