"""Tests on several devices, in a process of their own: JAX must know devices at its start (S14)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

DEVICES = Path(__file__).parent / "devices"


@pytest.mark.parametrize("choice", ["some", pytest.param("rest", marks=pytest.mark.exhaustive)])
def test_four_devices(choice: str) -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
    tests = subprocess.run(
        [sys.executable, "-m", "pytest", *options, str(DEVICES)],
        env=os.environ
        | {
            "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
            "JAX_PLATFORMS": "cpu",
            "BATCHNORM_TESTS": choice,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=400,
    )
    assert tests.returncode == 0, tests.stdout
    assert " passed" in tests.stdout
