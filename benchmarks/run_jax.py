"""Speed and accuracy in JAX on the CPU, against flax, checked and interleaved.

    python benchmarks/run_jax.py              # writes benchmarks/results/jax.json and jax.md
    python benchmarks/run_jax.py --case rows  # cases with that in their name; writes nothing

Everything is jitted. A step is a forward pass and the gradients of x, scale and bias for a given
cotangent, with the running statistics that follow. Each variant's results are compared with
float64 before it is timed.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

import batchnorm
from batchnorm.benchmark.jax_steps import make_step
from batchnorm.benchmark.machine import describe_machine, describe_versions
from batchnorm.benchmark.timing import summarize, take_turns
from batchnorm.jax import (
    BatchNorm,
    RunningStatistics,
    batch_norm,
    batch_norm_inference,
    update_running,
)

RESULTS = Path(__file__).parent / "results"
EPS = 1e-5
_SECONDS, _LEAST = 6.0, 9
_OURS, _THEIRS = 5e-6, 1e-3
_OFFSETS = (0.0, 1e2, 1e4, 1e6)
_TARGETS = {  # least times as fast as the faster of flax's two
    "rows": 2.4,
    "rows-mask": 2.7,
    "image": 2.4,
    "image-mask": 2.7,
    "small": 0.9,
    "small-mask": 0.9,
    "inference-rows": 1.0,
    "inference-image": 1.0,
}
_MASK_OVERHEAD = 1.05  # masked step over the unmasked one, at most
_ACCURACY = 5e-6


@dataclass(frozen=True)
class Case:
    """One shape, channels last, and what is done with it."""

    name: str
    shape: tuple[int, ...]
    masked: bool = False
    inference: bool = False

    @property
    def title(self) -> str:
        """For readers."""
        kind = ", inference" if self.inference else ""
        return f"{self.shape}{', half padded' if self.masked else ''}{kind}"

    @property
    def bytes(self) -> int:
        """What has to move between memory and processor, a mask's savings left out."""
        return 4 * int(np.prod(self.shape)) * (2 if self.inference else 8)


_SHAPES = {"rows": (262144, 64), "image": (32, 56, 56, 256), "small": (32, 64)}
CASES = (
    *(Case(name, shape) for name, shape in _SHAPES.items()),
    *(Case(f"{name}-mask", shape, masked=True) for name, shape in _SHAPES.items()),
    *(Case(f"inference-{n}", _SHAPES[n], inference=True) for n in ("rows", "image")),
)


@dataclass
class Problem:
    """A case's arrays."""

    x: jax.Array
    dy: jax.Array
    mask: jax.Array | None


Step = Callable[[], Any]


def make_problem(case: Case) -> Problem:
    """Random arrays, the same ones for the same case."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(case.shape, np.float32)) for _ in range(2))
    if not case.masked:
        return Problem(x, dy, None)
    mask = jnp.asarray(rng.random(case.shape[:-1]) < 0.5)
    # flax sends gradients through padded outputs; zeros there leave nothing to differ in.
    return Problem(x, jnp.where(mask[..., None], dy, 0.0), mask)


def make_variants(case: Case, problem: Problem) -> dict[str, Step]:
    """Our layer and function, flax's two layers, and our layer without the mask if there is one."""
    channels = case.shape[-1]
    layers = {
        "ours": BatchNorm(channels, rngs=nnx.Rngs(0)),
        "ours, plain": BatchNorm(channels, fused=False, rngs=nnx.Rngs(0)),
        "flax nnx": nnx.BatchNorm(channels, rngs=nnx.Rngs(0)),
    }
    x, dy, mask = problem.x, problem.dy, problem.mask
    wide = None if mask is None else mask[..., None]  # flax takes no other shape
    found = {}
    for name, layer in layers.items():
        layer.set_attributes(use_running_average=case.inference)
        given = wide if name == "flax nnx" else mask
        found[name] = make_step(layer, x, dy, given, inference=case.inference)
    found["ours, function"] = _function_step(channels, problem, mask, case.inference)
    found["flax linen"] = _linen_step(channels, problem, wide, case.inference)
    if case.masked:
        found["ours, no mask"] = make_step(layers["ours"], x, dy, None, inference=False)
    return found


def _function_step(channels: int, problem: Problem, mask: Any, inference: bool) -> Step:
    ones, zeros = jnp.ones(channels), jnp.zeros(channels)
    running = RunningStatistics(zeros, ones)
    if inference:
        forward = jax.jit(lambda r, g, b, x: batch_norm_inference(x, r.mean, r.var, g, b))
        return lambda: jax.block_until_ready((forward(running, ones, zeros, problem.x),))

    @jax.jit
    def step(running: Any, scale: Any, bias: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(scale: Any, bias: Any, x: Any) -> Any:
            y, moments = batch_norm(
                x, scale, bias, mask=mask, running_mean=running.mean, running_var=running.var
            )
            return y, update_running(running, moments)

        y, transpose, after = jax.vjp(forward, scale, bias, x, has_aux=True)
        dscale, dbias, dx = transpose(dy)
        return y, dx, dscale, dbias, after

    arguments = (running, ones, zeros, problem.x, problem.dy, mask)
    return lambda: jax.block_until_ready(step(*arguments))


def _linen_step(channels: int, problem: Problem, mask: Any, inference: bool) -> Step:
    layer = linen.BatchNorm(use_running_average=inference, epsilon=EPS)
    ones, zeros = jnp.ones(channels), jnp.zeros(channels)
    parameters = {"scale": ones, "bias": zeros}
    statistics = {"mean": zeros, "var": ones}
    if inference:
        forward = jax.jit(lambda p, s, x: layer.apply({"params": p, "batch_stats": s}, x))
        return lambda: jax.block_until_ready((forward(parameters, statistics, problem.x),))

    @jax.jit
    def step(parameters: Any, statistics: Any, x: Any, dy: Any, mask: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            variables = {"params": parameters, "batch_stats": statistics}
            y, after = layer.apply(variables, x, mask=mask, mutable=["batch_stats"])
            return y, after

        y, transpose, after = jax.vjp(forward, parameters, x, has_aux=True)
        gradients, dx = transpose(dy)
        return y, dx, gradients["scale"], gradients["bias"], after

    arguments = (parameters, statistics, problem.x, problem.dy, mask)
    return lambda: jax.block_until_ready(step(*arguments))


def expect(case: Case, problem: Problem) -> list[np.ndarray]:
    """y, dx, dgamma and dbeta in float64; those that the case has."""
    x = np.asarray(problem.x)
    mask = None if problem.mask is None else np.asarray(problem.mask)
    if case.inference:
        return [x.astype(np.float64) / np.sqrt(1.0 + EPS)]
    settings: dict[str, Any] = {"mask": mask, "axis": -1, "eps": EPS}
    y, _ = batchnorm.batch_norm(x, **settings)
    return [y, *batchnorm.batch_norm_gradient(np.asarray(problem.dy), x, **settings)]


def check(name: str, case: Case, problem: Problem, step: Step, expected: list[np.ndarray]) -> float:
    """The largest error, relative to 1 + |expected|.

    Raises:
        RuntimeError: it is more than allowed; a wrong result has no speed.
    """
    found = step()[: len(expected)]
    errors = []
    for index, (a, wanted) in enumerate(zip(found, expected, strict=True)):
        # dgamma and dbeta are sums over rows: what one row may be off by, times their root.
        scale = np.sqrt(case.bytes / 32 / case.shape[-1]) if index > 1 else 1.0
        off = np.abs(np.asarray(a) - wanted) / (scale + np.abs(wanted))
        if index == 0 and problem.mask is not None and not name.startswith("ours"):
            off = off[np.asarray(problem.mask)]  # nobody else promises anything there
        errors.append(float(off.max(initial=0.0)))
    worst = max(errors)
    if not worst <= (_OURS if name.startswith("ours") else _THEIRS):
        raise RuntimeError(f"{case.name}, {name}: off by {errors}; a wrong result has no speed")
    return worst


def measure(case: Case) -> dict[str, Any]:
    """The case's record."""
    start = time.perf_counter()
    problem = make_problem(case)
    steps = make_variants(case, problem)
    expected = expect(case, problem)
    bare = Problem(problem.x, problem.dy, None)
    errors = {}
    for name, step in steps.items():
        if name == "ours, no mask":
            errors[name] = check(name, case, bare, step, expect(case, bare))
        else:
            errors[name] = check(name, case, problem, step, expected)
    del expected
    times = take_turns(steps, _SECONDS, _LEAST)
    print(f"{case.name}: {time.perf_counter() - start:.1f} s", file=sys.stderr, flush=True)
    variants = {
        name: summarize(seen, case.bytes) | {"error": float(f"{errors[name]:.1e}")}
        for name, seen in times.items()
    }
    return {"title": case.title, "bytes": case.bytes, "variants": variants}


def measure_accuracy() -> dict[str, dict[str, float]]:
    """Largest |y - float64| of a jitted training step, (4096, 8), deviation 1, by mean."""
    rng = np.random.default_rng(0)
    noise = rng.standard_normal((4096, 8))
    makers: dict[str, Callable[[], Any]] = {
        "ours": lambda: BatchNorm(8, rngs=nnx.Rngs(0)),
        "ours, plain": lambda: BatchNorm(8, fused=False, rngs=nnx.Rngs(0)),
        "flax nnx": lambda: nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        "flax nnx, two passes": lambda: nnx.BatchNorm(8, use_fast_variance=False, rngs=nnx.Rngs(0)),
    }
    found: dict[str, dict[str, float]] = {}
    for mean in _OFFSETS:
        x = (noise + mean).astype(np.float32)
        expected, _ = batchnorm.batch_norm(x)
        found[f"{mean:g}"] = {
            name: float(f"{np.abs(nnx.jit(lambda m, x: m(x))(make(), x) - expected).max():.2g}")
            for name, make in makers.items()
        }
    return found


def judge(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The figures that the library is held to, and whether the run has them."""
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
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/run_jax.py", *sys.argv[1:]]),
        "machine": describe_machine(len(os.sched_getaffinity(0))),
        "versions": describe_versions("jax", "jaxlib", "flax"),
        "cases": {case.name: measure(case) for case in cases},
        "accuracy": measure_accuracy(),
    }
    record["targets"] = judge(record)
    print(write_markdown(record))
    if not options.case:
        (RESULTS / "jax.json").write_text(json.dumps(record, indent=2) + "\n")
        (RESULTS / "jax.md").write_text(write_markdown(record))


if __name__ == "__main__":
    main()
