"""The example of many processes, run by its own command."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[2] / "examples" / "digits_ddp.py"


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("options", "steps", "bound"), [([], 20, 1e-4), (["--double", "--steps", "50"], 50, 1e-9)]
)
def test_two_processes_train_like_one(options: list[str], steps: int, bound: float) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", str(EXAMPLE), *options],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(rf"2 processes: loss (\S+) to (\S+) in {steps} steps", done.stdout)
    assert float(found[2]) < (0.3 if steps == 50 else 0.4) * float(found[1])  # it learns
    apart = re.search(r"loss (\S+), parameters and statistics (\S+)", done.stdout)
    assert float(apart[1]) < bound
    assert float(apart[2]) < bound
