"""Speed and accuracy of the compiled CPU kernels, against torch, checked and interleaved.

    python benchmarks/run.py                      # all of it; writes benchmarks/results/
    python benchmarks/run.py --quick --check      # a few cases, a few rounds; writes nothing
    python benchmarks/run.py --case mask --case small --output /tmp/figures

Each variant's results are compared with float64 before it is timed. torch reads the variable
that has it allocate huge pages when it starts, so that a second process measures those.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from batchnorm.benchmark.case import Case, count_bytes
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import describe_run, measure, measure_accuracy, write_record
from batchnorm.benchmark.torch_steps import make_variants, name_rival
from batchnorm.torch import BatchNorm
from cases import select_cases
from chart import draw
from report import print_report, write_markdown
from targets import HUGE, RESULTS, judge, print_targets

_VARIABLE = "THP_MEM_ALLOC_ENABLE"
_SECONDS, _LEAST = 5.0, 15  # of taking turns for a case, and rounds at least
_QUICK_SECONDS, _QUICK_LEAST = 0.3, 3


def main() -> None:
    """Measure, print, write."""
    options = _parse()
    cases = select_cases(options.case, options.quick)
    if options.part is not None:
        options.part.write_text(json.dumps(_measure_all(cases, options.quick, huge=True)))
        return
    console = Console(width=None if sys.stdout.isatty() else 140)
    record = _record(options, cases)
    print_report(record, console)
    if options.check:
        print_targets(record["targets"])
    output = options.output
    if output is None and not options.quick and not options.case:
        output = RESULTS
    if output is None:
        console.print("Not all cases in full: nothing is written without --output.")
        return
    _write(record, output)
    console.print(f"Written: cpu.json, cpu.md and cpu.png in {output}")


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
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # the process of huge pages
    options = parser.parse_args()
    if not select_cases(options.case, options.quick):
        parser.error(f"no case has a name like {options.case}; see benchmarks/cases.py")
    return options


def _record(options: argparse.Namespace, cases: list[Case]) -> dict[str, Any]:
    start = time.perf_counter()
    record = describe_run("benchmarks/run.py", torch.get_num_threads(), "torch")
    record["cases"] = _measure_all(cases, options.quick, huge=False)
    for name, case in _measure_with_huge_pages(options).items():
        record["cases"][name]["variants"] |= case["variants"]
    record["accuracy"] = measure_accuracy(_LAYERS)
    record["targets"] = judge(record)
    record["seconds"] = round(time.perf_counter() - start)
    return record


def _measure_all(cases: list[Case], quick: bool, *, huge: bool) -> dict[str, Any]:
    """Records of cases; with huge pages only the library's way and its rival's."""
    seconds, least = (_QUICK_SECONDS, _QUICK_LEAST) if quick else (_SECONDS, _LEAST)
    found = {}
    for case in cases:
        start = time.perf_counter()
        suffix, only = (HUGE, ("ours", name_rival(case)[0])) if huge else ("", ())
        problem = make_problem(case)
        variants = make_variants(problem, only)
        size = count_bytes(case, problem.mask)
        limit = seconds / 2 if huge else seconds
        figures = measure(problem, variants, limit, least, size=size)
        found[case.name] = _describe(case, size) | {
            "variants": {name + suffix: values for name, values in figures.items()}
        }
        spent = time.perf_counter() - start
        print(f"{case.name}{suffix}: {spent:.1f} s", file=sys.stderr, flush=True)
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


def _measure_with_huge_pages(options: argparse.Namespace) -> dict[str, Any]:
    """The same cases in a process whose torch allocates huge pages."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        command = [sys.executable, __file__, "--part", str(part)]
        command += ["--quick"] if options.quick else []
        command += [word for name in options.case for word in ("--case", name)]
        subprocess.run(command, env=os.environ | {_VARIABLE: "1"}, check=True)
        return json.loads(part.read_text())


def _write(record: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_record(record, folder / "cpu.json")
    (folder / "cpu.md").write_text(write_markdown(record))
    draw(record, folder / "cpu.png")


if __name__ == "__main__":
    main()
