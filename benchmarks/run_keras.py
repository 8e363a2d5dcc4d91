"""Speed of the Keras layer on the CPU, against Keras's own, on each backend, checked.

    python benchmarks/run_keras.py                     # writes benchmarks/results/keras.json, .md
    python benchmarks/run_keras.py --backend jax       # one backend; writes nothing

A step is a forward pass in training and the gradients of x, gamma and beta for a given cotangent,
as the backend runs it in `fit`: a graph, jitted, or eager. y and dx are compared with float64
before a variant is timed. A process has one backend, so that each gets its own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from batchnorm.benchmark.machine import describe_machine, describe_versions
from batchnorm.benchmark.timing import summarize, take_turns

RESULTS = Path(__file__).parent / "results"
BACKENDS = ("tensorflow", "jax", "torch")
EPS = 1e-3
_SECONDS, _LEAST = 2.0, 7
_OURS, _THEIRS = 5e-6, 1e-3  # allowed errors, relative to 1 + |expected|
_ROWS, _IMAGE = (262144, 64), (32, 56, 56, 256)


@dataclass(frozen=True)
class Case:
    """One shape, channels last; mask is None, "random" or "prefix", half of the rows each."""

    name: str
    shape: tuple[int, ...]
    mask: str | None = None
    inference: bool = False


CASES = (
    Case("rows", _ROWS),
    Case("rows, half padded", _ROWS, "random"),
    Case("rows, padded at the end", _ROWS, "prefix"),
    Case("image", _IMAGE),
    Case("rows, inference", _ROWS, inference=True),
    Case("image, inference", _IMAGE, inference=True),
)
# How many times as fast as Keras's own layer, at least.
_TARGETS = {
    "tensorflow": {
        "rows": 1.5,
        "rows, half padded": 1.8,
        "rows, padded at the end": 2.5,
        "image": 1.0,
    },
    "jax": {"rows": 2.0, "rows, half padded": 2.5, "image": 2.0},
    "torch": {"rows": 5.0, "rows, half padded": 5.0, "image": 5.0},
}


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure the Keras layer on the CPU.")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; writes nothing")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # a backend's process
    options = parser.parse_args()
    if options.part is not None:
        options.part.write_text(json.dumps({c.name: measure(c) for c in CASES}))
        return
    record: dict[str, Any] = {
        "command": " ".join(["python", "benchmarks/run_keras.py", *sys.argv[1:]]),
        "machine": describe_machine(len(os.sched_getaffinity(0))),
        "versions": describe_versions("keras", "tensorflow-cpu", "jax", "torch"),
        "backends": {
            name: _measure_backend(name) for name in BACKENDS if options.backend in (None, name)
        },
    }
    text = _write_markdown(record)
    print(text)
    if options.backend is None:
        (RESULTS / "keras.json").write_text(json.dumps(record, indent=2) + "\n")
        (RESULTS / "keras.md").write_text(text)


def _measure_backend(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        environment = os.environ | {"KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__, "--part", str(part)], env=environment, check=True)
        return json.loads(part.read_text())


def measure(case: Case) -> dict[str, Any]:
    """Both layers' figures.

    Raises:
        RuntimeError: a result is wrong; a wrong result has no speed.
    """
    import keras

    from batchnorm.benchmark.keras_steps import make_step
    from batchnorm.keras import BatchNormalization

    rng = np.random.default_rng(0)
    x, dy = (rng.normal(0.5, 2.0, case.shape).astype("float32") for _ in range(2))
    mask = None
    if case.mask is not None:
        rows = case.shape[:-1]
        mask = (
            rng.random(rows) < 0.5 if case.mask == "random" else np.arange(rows[0]) < rows[0] // 2
        )
        dy[~mask] = 0.0  # as a masked loss has it: Keras's layer does not ignore it (S8)
    expected = _solve(case, x, dy, mask)
    steps = {}
    for name, layer in (
        ("ours", BatchNormalization()),
        ("keras", keras.layers.BatchNormalization()),
    ):
        layer.build(case.shape)
        given = [None if a is None else keras.ops.convert_to_tensor(a) for a in (x, dy, mask)]
        steps[name] = make_step(layer, *given, inference=case.inference)
        _check(case, name, steps[name](), expected, mask)
    times = take_turns(steps, _SECONDS, _LEAST)
    size = x.nbytes * (2 if case.inference else 8)
    found = {name: summarize(seen, size) for name, seen in times.items()}
    print(f"{keras.backend.backend()}, {case.name}: {found}", file=sys.stderr, flush=True)
    return found


def _solve(case: Case, x: np.ndarray, dy: np.ndarray, mask: Any) -> tuple[Any, Any]:
    """y and dx in float64, on fresh statistics and parameters."""
    x = x.reshape(-1, x.shape[-1]).astype(np.float64)
    if case.inference:
        return x / np.sqrt(1.0 + EPS), None
    g = dy.reshape(x.shape).astype(np.float64)
    real = np.ones(len(x), bool) if mask is None else mask.reshape(-1)
    mean, var = x[real].mean(0), x[real].var(0)
    rstd = 1.0 / np.sqrt(var + EPS)
    x -= mean
    x *= rstd
    along = (g[real] * x[real]).mean(0)
    g -= g[real].mean(0)
    g -= x * along
    g *= rstd
    g[~real] = 0.0
    return x, g


def _check(case: Case, name: str, found: Any, expected: Any, mask: Any) -> None:
    import keras

    real = slice(None) if mask is None else mask.reshape(-1)
    for a, b, rows in zip(found[:2], expected, (slice(None) if name == "ours" else real, real),
                          strict=False):  # fmt: skip
        if b is None:
            continue
        a = np.asarray(keras.ops.convert_to_numpy(a)).reshape(b.shape)
        off = float(np.max(np.abs(a - b)[rows] / (1.0 + np.abs(b[rows]))))
        if not off <= (_OURS if name == "ours" else _THEIRS):
            raise RuntimeError(f"{case.name}, {name}: off by {off:.1e}; no speed without accuracy")


def _write_markdown(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [
        "# Keras on the CPU",
        "",
        f"`{record['command']}` on {machine['cores']} cores of {machine['processor']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Medians in milliseconds, float32, variants in turns.",
        "",
        "| backend | case | ours | Keras's own | times as fast | wanted |",
        "|---|---|---|---|---|---|",
    ]
    for backend, cases in record["backends"].items():
        for name, found in cases.items():
            ours, theirs = found["ours"]["ms"], found["keras"]["ms"]
            wanted = _TARGETS[backend].get(name, 1.0)
            lines.append(
                f"| {backend} | {name} | {ours} | {theirs} | {theirs / ours:.2f} | {wanted} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
