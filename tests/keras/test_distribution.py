"""Synchronized statistics over replicas, workers and devices equal those of one batch (S14)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

HERE = Path(__file__).parent
PROGRAMS = {
    "tensorflow": ["mirrored", "mirrored_fit", "unsynchronized", "ghost"],
    "jax": ["data_parallel", "named_axis"],
    "torch": [],
}[keras.backend.backend()]


def start(program: str, *arguments: str, **extra: str) -> subprocess.Popen[str]:
    """A program of `distributed.py`, in a process of its own: devices are counted at the start."""
    return subprocess.Popen(
        [sys.executable, str(HERE / "distributed.py"), program, *arguments],
        env=os.environ | {"KERAS_BACKEND": keras.backend.backend()} | extra,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(*processes: subprocess.Popen[str]) -> None:
    """Wait for all; none is left running where one fails."""
    try:
        for process in processes:
            output, _ = process.communicate(timeout=300)
            assert process.returncode == 0, output[-4000:]
    finally:
        for process in processes:
            process.kill()
            process.communicate()


@pytest.mark.parametrize("program", PROGRAMS)
def test_devices_of_one_process(program: str) -> None:
    finish(start(program))


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="needs tf.distribute")
def test_two_workers() -> None:
    ports = free_ports(2)
    workers = ", ".join(f'"127.0.0.1:{port}"' for port in ports)
    processes = [
        start(
            "workers",
            TF_CONFIG=f'{{"cluster": {{"worker": [{workers}]}}, '
            f'"task": {{"type": "worker", "index": {index}}}}}',
        )
        for index in range(2)
    ]
    finish(*processes)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="needs torch.distributed")
def test_two_ranks() -> None:
    address = f"tcp://127.0.0.1:{free_ports(1)[0]}"
    finish(*(start("ranks", address, str(rank)) for rank in range(2)))


def free_ports(count: int) -> list[int]:
    import socket

    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports
