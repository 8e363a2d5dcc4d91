"""Several devices, which JAX must be told of before it starts: processes of their own (S14)."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def _start(*arguments: str, devices: int) -> subprocess.Popen[str]:
    flags = f"--xla_force_host_platform_device_count={devices}"
    return subprocess.Popen(
        [sys.executable, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_four_devices() -> None:
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=short")
    tests = _start("-m", "pytest", *options, str(HERE / "devices"), devices=4)
    report, _ = tests.communicate(timeout=400)
    assert tests.returncode == 0, report
    assert " passed" in report


def test_two_processes_agree_with_one() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    workers = [
        _start(str(HERE / "devices" / "process.py"), address, str(rank), devices=2)
        for rank in range(2)
    ]
    try:
        reports = [worker.communicate(timeout=120)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, report in zip(workers, reports, strict=True):
        assert worker.returncode == 0, report
        assert "agrees" in report
