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

RESULTS = Path(__file__).parent / "results"
_SECONDS, _LEAST = 6.0, 9  # of taking turns for a case, and rounds at least
_TARGETS = {  # least times as fast as the faster of flax's two
    "rows": 2.4,
    "rows-mask": 2.7,
    "image": 2.4,
    "image-mask": 2.7,
    "small": 0.95,
    "small-mask": 0.95,
    "inference-small": 0.95,
    "inference-rows": 1.0,
    "inference-image": 1.0,
}
_MASK_OVERHEAD = 1.05  # masked step over the unmasked one, at most
_ACCURACY = 5e-6

_SHAPES = {"rows": (262144, 64), "image": (32, 56, 56, 256), "small": (32, 64)}
_LAYERS: dict[str, Callable[[], Any]] = {  # of the accuracy table
    "ours": lambda: BatchNorm(8, rngs=nnx.Rngs(0)),
    "ours, plain": lambda: BatchNorm(8, fused=False, rngs=nnx.Rngs(0)),
    "flax nnx": lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
    "flax nnx, two passes": lambda: nnx.BatchNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0)),
}


def _make_cases() -> tuple[Case, ...]:
    cases = []
    for name, shape in _SHAPES.items():
        cases.append(Case(name, f"{shape}", shape, axis=-1))
    for name, shape in _SHAPES.items():
        cases.append(Case(f"{name}-mask", f"{shape}, half padded", shape, axis=-1, padded=0.5))
    for name in ("rows", "image", "small"):
        shape = _SHAPES[name]
        cases.append(Case(f"inference-{name}", f"{shape}, inference", shape, "inference", axis=-1))
    return tuple(cases)


CASES = _make_cases()


def _measure(case: Case) -> dict[str, Any]:
    """The case's record."""
    start = time.perf_counter()
    problem = make_problem(case)
    variants = measure(problem, make_variants(problem), _SECONDS, _LEAST)
    print(f"{case.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    return {"title": case.title, "bytes": count_bytes(case), "variants": variants}


def _run_layer(make: Callable[[], Any]) -> Callable[[Any], Any]:
    return lambda x: np.asarray(nnx.jit(lambda layer, x: layer(x))(make(), x))


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that the library is held to, and the verdict on the run."""
    found = []

    def add(what: str, bound: float, measured: float, *, at_most: bool = False) -> None:
        met = measured <= bound if at_most else measured >= bound
        found.append(
            {"what": what, "bound": bound, "at most": at_most, "measured": float(f"{measured:.3g}")}
            | {"met": met}
        )

    for name, case in record["cases"].items():
        ms = {variant: figures["ms"] for variant, figures in case["variants"].items()}
        add(f"{case['title']}, times as fast as flax", _TARGETS[name], _ratio(ms))
        if "ours, no mask" in ms and name != "small-mask":
            overhead = ms["ours"] / ms["ours, no mask"]
            add(f"{case['title']}, times the unmasked step", _MASK_OVERHEAD, overhead, at_most=True)
    if record["accuracy"]:
        error = record["accuracy"]["1e+06"]["ours"]
        add("error of y at mean 1e6, deviation 1", _ACCURACY, error, at_most=True)
    return found


def _ratio(ms: dict[str, float]) -> float:
    """Times as fast as flax: layer against layer and function against function, the worse one.

    What surrounds them costs as much as a small step: nnx's state, linen's dictionaries.
    """
    return min(ms["flax nnx"] / ms["ours"], ms["flax linen"] / ms["ours, function"])


def write_markdown(record: dict[str, Any]) -> str:
    """The record as tables."""
    facts = record["machine"] | record["versions"]
    lines = [
        "# Speed in JAX on the CPU",
        "",
        f"Written by `{record['command']}`. Medians of interleaved rounds, in milliseconds; only "
        "their ratios mean anything. Everything is jitted; a step is a forward pass, the "
        "gradients of x, scale and bias, and the running statistics, float32. Every variant was "
        "compared with a float64 result in the same run before it was timed. Times: nnx's layer "
        "over ours, or linen's over our function, whichever is less.",
        "",
        *(f"- {name}: {value}" for name, value in facts.items()),
        "",
        "| | ours | flax nnx | ours, function | flax linen | ours, plain | ours, no mask | times |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in record["cases"].values():
        ms = {name: figures["ms"] for name, figures in case["variants"].items()}
        names = ("ours", "flax nnx", "ours, function", "flax linen", "ours, plain", "ours, no mask")
        figures = [f"{ms[name]:.3g}" if name in ms else "" for name in names]
        lines.append(f"| {case['title']} | {' | '.join(figures)} | {_ratio(ms):.2f} |")
    lines += ["", "## Targets", "", "|  | target | measured |  |", "| --- | ---: | ---: | --- |"]
    for e in record["targets"]:
        sign, state = "≤" if e["at most"] else "≥", "ok" if e["met"] else "short"
        lines.append(f"| {e['what']} | {sign} {e['bound']:g} | {e['measured']:g} | {state} |")
    names = list(next(iter(record["accuracy"].values()), {}))
    lines += ["", "## Largest error of y, float32 (4096, 8), deviation 1", ""]
    lines += [f"| mean | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    for mean, errors in record["accuracy"].items():
        lines.append(f"| {mean} | {' | '.join(f'{errors[n]:.1e}' for n in names)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure batchnorm.jax against flax on the CPU.")
    parser.add_argument("--case", default="", metavar="NAME", help="cases with NAME in their name")
    options = parser.parse_args()
    cases = [case for case in CASES if options.case in case.name]
    if not cases:
        parser.error(f"no case has {options.case!r} in its name: {[c.name for c in CASES]}")
    record = describe_run("benchmarks/run_jax.py", count_cores(), "jax", "jaxlib", "flax")
    record["cases"] = {case.name: _measure(case) for case in cases}
    layers = {name: _run_layer(make) for name, make in _LAYERS.items()}
    record["accuracy"] = measure_accuracy(layers)
    record["targets"] = judge(record)
    print(write_markdown(record))
    if not options.case:
        write_record(record, RESULTS / "jax.json")
        (RESULTS / "jax.md").write_text(write_markdown(record))


if __name__ == "__main__":
    main()
