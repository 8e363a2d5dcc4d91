"""Speed and accuracy in JAX on the CPU, against flax, checked and interleaved.

    python benchmarks/run_jax.py              # writes benchmarks/results/jax.json and jax.md
    python benchmarks/run_jax.py --case rows  # cases with that in their name; writes nothing

Everything is jitted. A step is a forward pass and the gradients of x, scale and bias for a given
cotangent, with the running statistics that follow. Each variant's results are compared with
float64 before it is timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from batchnorm.benchmark.case import Case, count_bytes
from batchnorm.benchmark.jax_steps import make_variants
from batchnorm.benchmark.machine import count_cores
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import describe_run, measure, measure_accuracy, write_record
from batchnorm.jax import BatchNorm
from cases import JAX_CASES
from judging import RESULTS, judge
from publish import write_pages
from report_others import write_jax
from targets import JAX

_SECONDS, _LEAST = 6.0, 9  # of taking turns for a case, and rounds at least
_QUICK_SECONDS, _QUICK_LEAST = 1.0, 5
# Cases and variants of the targets of `make bench-quick`.
_QUICK = ("small", "rows-mask")
_QUICK_VARIANTS = ("ours", "ours, function", "flax nnx", "flax linen", "copy")

_LAYERS: dict[str, Callable[[], Any]] = {  # of the accuracy table
    "ours": lambda: BatchNorm(8, rngs=nnx.Rngs(0)),
    "ours, plain": lambda: BatchNorm(8, fused=False, rngs=nnx.Rngs(0)),
    "flax nnx": lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
    "flax nnx, two passes": lambda: nnx.BatchNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0)),
}


def _measure(case: Case, quick: bool) -> dict[str, Any]:
    """The case's record."""
    start = time.perf_counter()
    problem = make_problem(case)
    variants = make_variants(problem, _QUICK_VARIANTS if quick else ())
    effort = (_QUICK_SECONDS, _QUICK_LEAST) if quick else (_SECONDS, _LEAST)
    figures = measure(problem, variants, *effort, every=8 if quick else 1)
    print(f"JAX {case.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return {"title": case.title, "bytes": count_bytes(case), "variants": figures}


def _run_layer(make: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda x: np.asarray(nnx.jit(lambda layer, x: layer(x))(make(), x))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure batchnorm.jax against flax on the CPU.")
    parser.add_argument("--case", default="", metavar="NAME", help="cases with NAME in their name")
    parser.add_argument("--quick", action="store_true", help="two cases, few rounds")
    parser.add_argument("--output", type=Path, metavar="FILE", help="where the JSON goes")
    options = parser.parse_args()
    cases = [case for case in JAX_CASES if options.case in case.name]
    if options.quick:
        cases = [case for case in cases if case.name in _QUICK]
    if not cases:
        parser.error(f"no case has {options.case!r} in its name: {[c.name for c in JAX_CASES]}")
    record = describe_run("benchmarks/run_jax.py", count_cores(), "jax", "jaxlib", "flax")
    record["cases"] = {case.name: _measure(case, options.quick) for case in cases}
    layers = {name: _run_layer(make) for name, make in _LAYERS.items()}
    record["accuracy"] = measure_accuracy(layers)
    record["targets"] = judge(record, JAX)
    print(write_jax(record))
    output = options.output
    if output is None and not options.quick and not options.case:
        output = RESULTS / "jax.json"
    if output is not None:
        write_record(record, output)
        write_pages(output.parent)


if __name__ == "__main__":
    main()
