"""The tables of JAX and Keras, for benchmarks/results/jax.md and keras.md."""

from __future__ import annotations

from typing import Any

from judging import against_flax
from report import Grid, as_markdown, make_targets
from targets import KERAS

Record = dict[str, Any]
_JAX_VARIANTS = (
    "ours",
    "flax nnx",
    "ours, function",
    "flax linen",
    "ours, plain",
    "ours, no mask",
)


def write_jax(record: Record) -> str:
    """The record of a run in JAX as markdown."""
    facts = record["machine"] | record["versions"]
    parts = [
        "# Speed in JAX on the CPU",
        f"Written by `{record['command']}`. Medians of interleaved rounds, in milliseconds; only "
        "their ratios mean anything. Everything is jitted; a step is a forward pass, the "
        "gradients of x, scale and bias, and the running statistics, float32. Every variant was "
        "compared with a float64 result in the same run before it was timed. Times: nnx's layer "
        "over ours, or linen's over our function, whichever is less. GB/s: the bytes that the job "
        "cannot do without pass after pass, over the time. Trips: the time over that of a copy of "
        "x into an array that is kept.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        as_markdown(_jax(record).without_empty_columns()),
    ]
    targets = make_targets(record)
    parts += [f"## {targets.title}", as_markdown(targets)]
    names = list(next(iter(record["accuracy"].values()), {}))
    errors = Grid("", ["mean", *names], [])
    for mean, found in record["accuracy"].items():
        errors.rows.append([mean, *(f"{found[n]:.1e}" for n in names)])
    parts += ["## Largest error of y, float32 (4096, 8), deviation 1", as_markdown(errors)]
    return "\n\n".join(parts) + "\n"


def _jax(record: Record) -> Grid:
    grid = Grid("", ["", *_JAX_VARIANTS, "times", "GB/s", "copy, GB/s", "trips"], [])
    for name, case in record["cases"].items():
        variants = case["variants"]
        figures = [f"{variants[v]['ms']:.3g}" if v in variants else "" for v in _JAX_VARIANTS]
        found = against_flax(name)(record)
        times = "" if found is None else f"{found[0]:.2f}"
        grid.rows.append([case["title"], *figures, times, *_speeds(variants)])
    return grid


def _speeds(variants: Record) -> list[str]:
    copy = variants.get("copy", {}).get("GB/s")
    figures = (variants["ours"]["GB/s"], copy, variants["ours"].get("trips"))
    return ["" if value is None else f"{value:.3g}" for value in figures]


def write_keras(record: Record) -> str:
    """The record of a run in Keras as markdown."""
    machine, versions = record["machine"], record["versions"]
    about = (
        f"`{record['command']}` on {machine['cores']} cores of {machine['processor']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Medians in milliseconds, float32, variants in turns. Trips: the time over that of a "
        "copy of x into an array that is kept."
    )
    headings = ["backend", "case", "ours", "Keras's own", "times as fast", "wanted"]
    headings.append("ours, kernels demanded")
    grid = Grid("", [*headings, "GB/s", "copy, GB/s", "trips"], [])
    for backend, cases in record["backends"].items():
        for name, found in cases.items():
            ours, theirs = found["ours"]["ms"], found["keras"]["ms"]
            wanted = KERAS[backend].get(name, 1.0)
            row = [backend, name, f"{ours:g}", f"{theirs:g}", f"{theirs / ours:.2f}", f"{wanted:g}"]
            kernels = found.get("ours, kernels", {}).get("ms")
            row.append("" if kernels is None else f"{kernels:g}")
            grid.rows.append(row + _speeds(found))
    return f"# Keras on the CPU\n\n{about}\n\n{as_markdown(grid.without_empty_columns())}\n"
