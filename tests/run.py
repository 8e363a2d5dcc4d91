"""All tests, in processes of their own what needs its own environment, and one summary.

python tests/run.py -n 2 --dist worksteal     # arguments go to every pytest
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
KERAS = ["tests/keras", "src/batchnorm/keras"]
PARTS: dict[str, tuple[list[str], dict[str, str]]] = {
    "all but the parts below": ([], {}),
    "GPU kernels, interpreted": (["tests/kernels/gpu"], {"TRITON_INTERPRET": "1"}),
    "Keras on TensorFlow": (KERAS, {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}),
    "Keras on JAX": (KERAS, {"KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"}),
    "Keras on torch": (KERAS, {"KERAS_BACKEND": "torch"}),
}


def main() -> int:
    """Run every part; 1 if one of them failed."""
    clean = {k: v for k, v in os.environ.items() if k not in ("KERAS_BACKEND", "TRITON_INTERPRET")}
    summary, failed = [], False
    for name, (paths, extra) in PARTS.items():
        print(f"\n=== {name}", flush=True)
        start = time.perf_counter()
        command = [sys.executable, "-m", "pytest", *sys.argv[1:], *paths]
        found = subprocess.run(command, cwd=ROOT, env=clean | extra).returncode
        outcome = "passed" if found == 0 else f"FAILED (pytest's exit status {found})"
        failed = failed or found != 0
        summary.append(f"{name:<24} {outcome} in {time.perf_counter() - start:.0f} s")
    print("\n=== summary", *summary, sep="\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
