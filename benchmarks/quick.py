"""The targets' cases in about a minute, and the verdict on each target.

    python benchmarks/quick.py      # what `make bench-quick` runs

The same cases and variants as `make bench` has, in fewer rounds; of large results each eighth
channel is checked. It writes nothing.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from cases import select_cases
from judging import judge, print_targets
from run import measure_all
from targets import HEADLINES, JAX_HEADLINES


def main() -> None:
    """Measure and print."""
    record = measure_all(select_cases([], quick=True), quick=True)
    entries = judge(record, HEADLINES) + judge(_measure_jax(), JAX_HEADLINES)
    print_targets(entries)


def _measure_jax() -> dict[str, Any]:
    """The record of JAX's cases, in a process of its own: its threads would be in torch's way."""
    with tempfile.TemporaryDirectory() as folder:
        part = Path(folder) / "jax.json"
        program = Path(__file__).parent / "run_jax.py"
        command = [sys.executable, program, "--quick", "--output", part]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        record: dict[str, Any] = json.loads(part.read_text())
        return record


if __name__ == "__main__":
    main()
