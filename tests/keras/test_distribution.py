"""Synchronized statistics over replicas and devices equal those of one batch (S14).

Several workers and ranks, processes each, are tested in tests/sync.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

PROGRAM = Path(__file__).parent / "distributed.py"
KINDS = {
    "tensorflow": ["mirrored", "mirrored_fit", "unsynchronized", "ghost", "blocks"],
    "jax": ["data_parallel", "named_axis"],
}
BACKEND = keras.backend.backend()
if BACKEND not in KINDS:
    pytest.skip("torch has one device a process", allow_module_level=True)


@pytest.mark.exhaustive  # half a minute; processes are tests of tests/sync
def test_devices_of_one_process() -> None:
    """Runs in a process of its own, since devices are counted at the start."""
    done = subprocess.run(
        [sys.executable, str(PROGRAM), *KINDS[BACKEND]],
        env=os.environ | {"KERAS_BACKEND": BACKEND},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-4000:]
