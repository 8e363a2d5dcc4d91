"""The tests, as parts in processes of their own, longest first, and one summary.

python tests/run.py                      # what `make test` runs: the table's cover on slow paths
python tests/run.py --full-effort        # the same in `make test-all`: JAX compiles as for users
python tests/run.py --rest               # what `make test-all` runs besides
python tests/run.py --rest --share 3     # a third of it
python tests/run.py "Keras on JAX" -x    # a part, with arguments for pytest

What a part needs of its environment is set here. A part's output appears when it ends.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent
JAX = {"JAX_PLATFORMS": "cpu"}
# Compilers take most of the time of tests in JAX. Their full effort is left to `make test-all`.
QUICK = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
# So is the newer of XLA's two generators of loops, which takes twice the time of the older; from
# JAX 0.12 on there is no other.
OLD_LOOPS = {"XLA_FLAGS": "--xla_cpu_use_fusion_emitters=false"}
TENSORFLOW = {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
KERAS_JAX = {"KERAS_BACKEND": "jax"} | JAX
KERAS_TORCH = {"KERAS_BACKEND": "torch"}
INTERPRETED = {"TRITON_INTERPRET": "1"}
NARROW = "tests/torch/test_narrow_devices.py"
KERAS = ["tests/keras", "src/batchnorm/keras"]


class Part(NamedTuple):
    """Tests of one process: where they are, what it needs, and about how many seconds it takes."""

    paths: list[str]
    environment: dict[str, str]
    seconds: int


PARTS: dict[str, Part] = {
    "torch": Part(["tests/torch", "src/batchnorm/torch", f"--ignore={NARROW}"], {}, 275),
    # Both register a device with torch, for good.
    "table on torch": Part(["tests/conformance/test_conformance.py", NARROW], {}, 170),
    "JAX": Part(["tests/jax", "src/batchnorm/jax"], JAX, 165),
    "table on JAX": Part(["tests/conformance/test_jax_conformance.py"], JAX, 42),
    "ranks": Part(["tests/sync"], {}, 97),
    "tools": Part(["tests/tools", "src/batchnorm/tools"], {}, 142),
    "kernels": Part(["tests/kernels", "--ignore=tests/kernels/gpu"], {}, 55),
    "GPU kernels, interpreted": Part(["tests/kernels/gpu"], INTERPRETED, 99),
    "Keras on TensorFlow": Part(KERAS, TENSORFLOW, 110),
    "Keras on JAX": Part(KERAS, KERAS_JAX, 110),
    "Keras on torch": Part(KERAS, KERAS_TORCH, 45),
}
REST = "all the rest"  # so that no test is forgotten
OWN = ("tests/torch", "tests/jax", "tests/sync", "tests/tools", "tests/keras", "tests/kernels")
SOURCES = tuple(f"src/batchnorm/{name}" for name in ("torch", "jax", "tools", "keras"))
TABLES = tuple(f"tests/conformance/test_{name}conformance.py" for name in ("", "jax_"))
PARTS[REST] = Part(
    ["tests", "src", *(f"--ignore={path}" for path in (*OWN, *SOURCES, *TABLES))], {}, 180
)


_NO_TESTS = 5  # pytest's exit status


class Outcome(NamedTuple):
    """The result of a part."""

    name: str
    status: int
    output: str
    seconds: float

    @property
    def line(self) -> str:
        """For the summary."""
        counts = re.findall(r"(\d+) (passed|failed|skipped|error)", self.output[-3000:])
        said = ", ".join(f"{n} {what}" for n, what in counts) or "no tests"
        verdict = "" if self.status == 0 else f"  FAILED (pytest's exit status {self.status})"
        return f"{self.name:<30} {self.seconds:5.0f} s  {said}{verdict}"


@lru_cache
def _has_old_loops() -> bool:
    command = [sys.executable, "-c", "import jax; jax.devices()"]
    return (
        subprocess.run(command, env=os.environ | JAX | OLD_LOOPS, capture_output=True).returncode
        == 0
    )


def run(name: str, choice: str, quick: bool, arguments: list[str]) -> Outcome:
    """Run a part."""
    part, start = PARTS[name], time.perf_counter()
    taken = ("KERAS_BACKEND", "TRITON_INTERPRET")
    environment = {k: v for k, v in os.environ.items() if k not in taken} | part.environment
    # Threads of OpenMP that wait would take the processor from the part beside this one.
    environment.setdefault("OMP_WAIT_POLICY", "passive")
    if quick and part.environment != TENSORFLOW:
        environment |= QUICK | (OLD_LOOPS if _has_old_loops() else {})
    environment["BATCHNORM_TESTS"] = choice
    command = [sys.executable, "-m", "pytest", "-q", *arguments, *part.paths]
    done = subprocess.run(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    seconds = time.perf_counter() - start
    status = 0 if choice != "some" and done.returncode == _NO_TESTS else done.returncode
    return Outcome(name, status, done.stdout.decode(errors="replace"), seconds)


def main() -> int:
    """Run what the command line asks for; 1 if a part failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("parts", nargs="*", metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--rest", action="store_true", help="the tests that are left out else")
    parser.add_argument("--share", type=int, default=1, help="of --rest: one test in so many")
    parser.add_argument("--full-effort", action="store_true", help="of JAX's compilers")
    parser.add_argument("--workers", type=int, default=2, help="parts at the same time")
    known, arguments = parser.parse_known_args()
    unknown = [name for name in known.parts if name not in PARTS]
    if unknown:
        parser.error(f"no part is called {unknown[0]!r}; there are: {', '.join(PARTS)}")
    os.environ["BATCHNORM_SHARE"] = str(known.share)
    chosen = sorted(known.parts or PARTS, key=lambda name: -PARTS[name].seconds)
    choice, quick = "rest" if known.rest else "some", not known.rest and not known.full_effort
    start, outcomes = time.perf_counter(), []
    with ThreadPoolExecutor(known.workers) as pool:
        for future in as_completed(pool.submit(run, n, choice, quick, arguments) for n in chosen):
            outcome = future.result()
            outcomes.append(outcome)
            print(f"\n=== {outcome.name}\n{outcome.output}", flush=True)
    print("\n=== summary", *(outcome.line for outcome in outcomes), sep="\n")
    failed = [outcome.name for outcome in outcomes if outcome.status != 0]
    minutes = (time.perf_counter() - start) / 60
    print(
        f"{len(outcomes)} parts in {minutes:.1f} minutes, {len(failed)} failed", *failed, sep="\n"
    )
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
