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
from pathlib import Path
from typing import Any

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.machine import count_cores
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import describe_run, measure, write_record

RESULTS = Path(__file__).parent / "results"
BACKENDS = ("tensorflow", "jax", "torch")
_SECONDS, _LEAST = 2.0, 7  # of taking turns for a case, and rounds at least
_ROWS, _IMAGE = (262144, 64), (32, 56, 56, 256)
_SMALL, _MIDDLE = (32, 64), (2048, 64)


def _make_case(name: str, shape: tuple[int, ...], mode: str = "training", **mask: Any) -> Case:
    return Case(name, name, shape, mode, axis=-1, eps=1e-3, **mask)


CASES = (
    _make_case("rows", _ROWS),
    _make_case("rows, half padded", _ROWS, padded=0.5),
    _make_case("rows, padded at the end", _ROWS, padded=0.5, at_end=True),
    _make_case("image", _IMAGE),
    _make_case("small", _SMALL),
    _make_case("small, half padded", _SMALL, padded=0.5),
    _make_case("middle", _MIDDLE),
    _make_case("rows, inference", _ROWS, "inference"),
    _make_case("image, inference", _IMAGE, "inference"),
)
# Times as fast as Keras's own layer, at least.
_TARGETS = {
    "tensorflow": {
        "rows": 1.5,
        "rows, half padded": 1.8,
        "rows, padded at the end": 2.5,
        "image": 1.0,
        "small": 0.8,
        "small, half padded": 0.8,
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
        options.part.write_text(json.dumps({c.name: _measure(c) for c in CASES}))
        return
    packages = ("keras", "tensorflow-cpu", "jax", "torch")
    record = describe_run("benchmarks/run_keras.py", count_cores(), *packages)
    record["backends"] = {
        name: _measure_backend(name) for name in BACKENDS if options.backend in (None, name)
    }
    text = _write_markdown(record)
    print(text)
    if options.backend is None:
        write_record(record, RESULTS / "keras.json")
        (RESULTS / "keras.md").write_text(text)


def _measure_backend(name: str) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "part.json"
        environment = os.environ | {"KERAS_BACKEND": name, "TF_CPP_MIN_LOG_LEVEL": "3"}
        subprocess.run([sys.executable, __file__, "--part", str(part)], env=environment, check=True)
        return json.loads(part.read_text())


def _measure(case: Case) -> dict[str, Any]:
    """Both layers' figures, on this process's backend."""
    from batchnorm.benchmark.keras_steps import make_variants

    problem = make_problem(case)
    found = measure(problem, make_variants(problem), _SECONDS, _LEAST)
    print(f"{os.environ['KERAS_BACKEND']}, {case.name}: {found}", file=sys.stderr, flush=True)
    return found


def _write_markdown(record: dict[str, Any]) -> str:
    machine, versions = record["machine"], record["versions"]
    lines = [
        "# Keras on the CPU",
        "",
        f"`{record['command']}` on {machine['cores']} cores of {machine['processor']}; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
        + ". Medians in milliseconds, float32, variants in turns.",
        "",
        "| backend | case | ours | Keras's own | times as fast | wanted | ours, kernels demanded |",
        "|---|---|---|---|---|---|---|",
    ]
    for backend, cases in record["backends"].items():
        for name, found in cases.items():
            ours, theirs = found["ours"]["ms"], found["keras"]["ms"]
            wanted = _TARGETS[backend].get(name, 1.0)
            kernels = found.get("ours, kernels", {}).get("ms", "")
            lines.append(
                f"| {backend} | {name} | {ours} | {theirs} | {theirs / ours:.2f} | {wanted} "
                f"| {kernels} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
