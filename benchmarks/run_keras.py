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
from cases import KERAS_CASES
from judging import RESULTS
from publish import write_pages
from report_others import write_keras

BACKENDS = ("tensorflow", "jax", "torch")
_SECONDS, _LEAST = 2.0, 7  # of taking turns for a case, and rounds at least


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description="Measure the Keras layer on the CPU.")
    parser.add_argument("--backend", choices=BACKENDS, help="only this one; writes nothing")
    parser.add_argument("--part", type=Path, help=argparse.SUPPRESS)  # a backend's process
    options = parser.parse_args()
    if options.part is not None:
        options.part.write_text(json.dumps({c.name: _measure(c) for c in KERAS_CASES}))
        return
    packages = ("keras", "tensorflow-cpu", "jax", "torch")
    record = describe_run("benchmarks/run_keras.py", count_cores(), *packages)
    record["backends"] = {
        name: _measure_backend(name) for name in BACKENDS if options.backend in (None, name)
    }
    print(write_keras(record))
    if options.backend is None:
        write_record(record, RESULTS / "keras.json")
        write_pages(RESULTS)


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


if __name__ == "__main__":
    main()
