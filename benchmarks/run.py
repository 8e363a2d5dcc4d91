"""Speed and accuracy of the compiled CPU kernels, against torch, checked and interleaved.

    python benchmarks/run.py                      # all of it; writes benchmarks/results/
    python benchmarks/run.py --quick              # the targets' cases, a few rounds; writes nothing
    python benchmarks/run.py --case mask --case small --output /tmp/figures

Each variant's results are compared with float64 before it is timed; in a quick run those of each
eighth channel. torch with huge pages is a process of its own, which takes turns with this one.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from torch import nn

from batchnorm.benchmark.case import Case, count_bytes
from batchnorm.benchmark.huge_pages import HugePages, time_anywhere
from batchnorm.benchmark.memory import measure_memory
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import describe_run, measure, measure_accuracy, write_record
from batchnorm.benchmark.single_passes import measure_passes
from batchnorm.benchmark.torch_steps import make_variants
from batchnorm.torch import BatchNorm
from cases import select_cases, select_variants
from judging import RESULTS, judge, print_targets
from publish import write_pages
from report import print_report
from targets import TORCH


class _Effort(NamedTuple):
    """Seconds of taking turns for a case, rounds at least, and which channels are checked."""

    seconds: float
    least: int
    every: int


_FULL, _QUICK = _Effort(4.0, 15, 1), _Effort(0.4, 5, 8)


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    cases = select_cases(options.case, options.quick)
    console = Console(width=None if sys.stdout.isatty() else 140)
    record = measure_all(cases, quick=options.quick)
    print_report(record, console)
    if options.check:
        print_targets(record["targets"])
    output = options.output
    if output is None and not options.quick and not options.case:
        output = RESULTS
    if output is None:
        console.print("Not all cases in full: nothing is written without --output.")
        return
    output.mkdir(parents=True, exist_ok=True)
    write_record(record, output / "cpu.json")
    console.print("Written:", *write_pages(output))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure batchnorm against torch on the CPU.")
    parser.add_argument("--quick", action="store_true", help="few cases, few rounds")
    parser.add_argument(
        "--case",
        action="append",
        default=[],
        metavar="NAME",
        help="only cases with NAME in their name; may be repeated",
    )
    parser.add_argument("--check", action="store_true", help="print which targets are met")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where results go")
    options = parser.parse_args()
    if not select_cases(options.case, options.quick):
        parser.error(f"no case has a name like {options.case}; see benchmarks/cases.py")
    return options


def measure_all(cases: list[Case], *, quick: bool) -> dict[str, Any]:
    """The record of a run.

    Args:
        cases: to measure.
        quick: fewer rounds, variants and channels that are checked.
    """
    start = time.perf_counter()
    record = describe_run("benchmarks/run.py", torch.get_num_threads(), "torch")
    with HugePages() as pages:
        record["cases"] = {case.name: _measure(case, pages, quick) for case in cases}
    effort = _QUICK if quick else _FULL
    record["passes"] = measure_passes(effort.seconds, effort.least)
    record["accuracy"] = measure_accuracy(_LAYERS)
    record["targets"] = judge(record, TORCH)
    record["seconds"] = round(time.perf_counter() - start)
    return record


def _measure(case: Case, pages: HugePages, quick: bool) -> dict[str, Any]:
    start = time.perf_counter()
    effort = _QUICK if quick else _FULL
    elsewhere = pages.offer(case, effort.every) if case.huge else {}
    problem = make_problem(case)
    variants = make_variants(problem, select_variants(case, quick)) | elsewhere
    size = count_bytes(case, problem.mask)
    figures = measure(
        problem,
        variants,
        effort.seconds,
        effort.least,
        size=size,
        clock=time_anywhere,
        every=effort.every,
    )
    found = _describe(case, size) | {"variants": figures}
    if case.memory:
        found["memory"] = measure_memory(problem)
    spent = time.perf_counter() - start
    print(f"{case.name}: {spent:.1f} s", file=sys.stderr, flush=True)
    return found


def _describe(case: Case, size: int) -> dict[str, Any]:
    return {
        "title": case.title,
        "shape": list(case.shape),
        "mode": case.mode,
        "channels last": case.channels_last,
        "dtype": case.dtype,
        "padded": case.padded,
        "activation": case.activation,
        "residual": case.residual,
        "bytes": size,
    }


def _run_layer(make: Callable[[], nn.Module]) -> Callable[[Any], Any]:
    return lambda x: make()(torch.from_numpy(x)).detach().numpy()


_LAYERS = {  # of the accuracy table
    "ours": _run_layer(lambda: BatchNorm(8)),
    "plain": _run_layer(lambda: BatchNorm(8, fused=False)),
    "torch": _run_layer(lambda: nn.BatchNorm1d(8)),
}


if __name__ == "__main__":
    main()
