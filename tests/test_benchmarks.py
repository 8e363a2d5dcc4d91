"""The benchmarks' variants run and are right: no other test calls them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.exhaustive
def test_variants_of_the_cpu_benchmark_are_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "cpu.json").read_text())["cases"]
    assert any("ours, reused buffers" in case["variants"] for case in cases.values())


@pytest.mark.parametrize(
    "name", ["overlap", "synchronization", "count_passes", "run_jax", "run_keras", "run_gpu"]
)
def test_programs_find_what_they_import(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]
