"""A sample of the conformance table on the user's own machine, against float64."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.environment import find_config
from batchnorm.verification.messages import LONGEST, MARK
from batchnorm.verification.report import Check, Failure, Verification
from batchnorm.verification.ways import FRONT_ENDS, KERNELS

__all__ = ["Check", "Failure", "Progress", "Verification", "verify"]

# Gets the front end, the number of cases that have been run, and that of all.
Progress = Callable[[str, int, int], None]

_DEVICES = ("cpu", "cuda")
_BY_TIME = ("jax", "keras", "torch", KERNELS)  # the longest first


@names_errors("verify")
def verify(
    device: str = "cpu", *, quick: bool = False, progress: Progress | None = None
) -> Verification:
    """Run a sample of the conformance table on this machine, and compare with float64.

    Every kernel with every type, layout and mask, on a CPU with each instruction set that it has;
    then the front ends that are installed, their kernels and their array code. Each front end runs
    in a process of its own, so that nothing changes in this one, and a crash is a finding.

    Args:
        device: "cpu"; or "cuda", where torch's, JAX's and Keras's layers run on the GPU.
        quick: run fewer cases; every option, type, layout and mask is still in one of them.
        progress: called with a front end, the number of its cases that have run, and of all.

    Returns:
        A `Verification`: `passed`, `checks` with failures, `unchecked` with reasons; its text is
        a line for each, and `to_json()` the same for programs.

    Raises:
        ValueError: another device.

    Source: S1-S18; the tolerances are those of S3.

    >>> found = verify(quick=True)  # print it: a line for each way
    >>> found.passed, found.checks[0].front_end, found.checks[0].failures
    (True, 'kernels', ())
    """
    if device not in _DEVICES:
        raise ArgumentValueError(f"device must be 'cpu' or 'cuda'; got {device!r}.")
    start, checks, unchecked = time.perf_counter(), [], []
    running = _Running(device, quick, progress)
    for front_end, found in zip(FRONT_ENDS, running.run(FRONT_ENDS), strict=True):
        checks += [way.check(front_end) for way in found.ways]
        if found.unchecked is not None:
            unchecked.append((front_end, found.unchecked))
    seconds = time.perf_counter() - start
    return Verification(
        device, quick, _find_versions(), tuple(checks), tuple(unchecked), round(seconds, 1)
    )


def _find_versions() -> dict[str, str]:
    config = find_config()
    packages = {name: found or "not installed" for name, found in config["packages"].items()}
    return {"python": f"{config['python']} ({config['machine']}, {config['system']})"} | packages


def _absence(front_end: str, device: str) -> str | None:
    """The reason why a front end cannot be here, or None."""
    if front_end == KERNELS:
        return None if device == "cpu" else "the compiled kernels run on a CPU"
    return None if find_spec(front_end) else f"{front_end} is not installed"


@dataclass
class _Way:
    """The messages about one way so far."""

    name: str
    instructions: str
    cases: int
    ran: int = 0
    worst: float = 0.0
    failures: list[Failure] = field(default_factory=list)
    seconds: float = 0.0

    def check(self, front_end: str) -> Check:
        return Check(
            front_end,
            self.name,
            self.instructions,
            self.ran,
            round(self.worst, 4),
            tuple(self.failures),
            round(self.seconds, 2),
        )


@dataclass
class _Found:
    """The messages of a front end's process so far."""

    ways: list[_Way] = field(default_factory=list)
    unchecked: str | None = None
    done: int = 0
    at: tuple[int, str] | None = None  # the way and the case that are running
    finished: bool = False

    def take(self, message: dict[str, Any]) -> None:
        if "unchecked" in message:
            self.unchecked, self.finished = message["unchecked"], True
        elif "name" in message:
            self.ways.append(_Way(message["name"], message["instructions"], message["cases"]))
        elif "begin" in message:
            self.at = message["way"], message["begin"]
        elif "end" in message:
            way = self.ways[message["way"]]
            way.ran += 1
            way.seconds += message["seconds"]
            way.worst = max(way.worst, message.get("worst", 0.0))
            if "error" in message:
                way.failures.append(Failure(message["end"], message["error"]))
            self.done, self.at = self.done + 1, None
        self.finished = self.finished or "finished" in message

    def end(self, status: int, said: str) -> None:
        """Note a process that ended before its last message."""
        if self.finished:
            return
        error = f"the process ended {_describe_end(status)}{': ' if said else ''}{said}"[:LONGEST]
        if self.at is None:
            self.unchecked = error
        else:
            way = self.ways[self.at[0]]
            way.ran += 1
            way.failures.append(Failure(self.at[1], error))


class _Running:
    """The processes of the front ends, two at a time."""

    def __init__(self, device: str, quick: bool, progress: Progress | None) -> None:
        self._device, self._quick, self._progress = device, quick, progress
        self._lock, self._processes = threading.Lock(), list[subprocess.Popen[str]]()
        self._stopped = False

    def run(self, front_ends: Sequence[str]) -> list[_Found]:
        """Run the checks of all, the longest first; what was found is in their own order."""
        by_time = sorted(front_ends, key=_BY_TIME.index)
        with ThreadPoolExecutor(2) as pool:
            futures = {name: pool.submit(self._run, name) for name in by_time}
            try:
                return [futures[name].result() for name in front_ends]
            except BaseException:
                with self._lock:
                    self._stopped = True
                    for process in self._processes:
                        process.kill()
                raise

    def _run(self, front_end: str) -> _Found:
        reason = _absence(front_end, self._device)
        if reason is not None:
            return _Found(unchecked=reason)
        found = _Found()
        with (
            tempfile.TemporaryFile("w+", errors="replace") as errors,
            self._start(front_end, errors) as process,
        ):
            for message in _messages(process):
                found.take(message)
                if self._progress is not None and "end" in message:
                    with self._lock:
                        total = sum(way.cases for way in found.ways)
                        self._progress(front_end, found.done, total)
            status = process.wait()
            errors.seek(0)
            lines = [line for line in errors.read().splitlines() if line.strip()]
            found.end(status, lines[-1].strip() if lines else "")
        return found

    def _start(self, front_end: str, errors: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "batchnorm.verification.process", front_end]
        command += [self._device, "quick" if self._quick else "whole"]
        with self._lock:
            if self._stopped:
                raise CancelledError
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                errors="replace",
                env=_environment(self._device),
            )
            self._processes.append(process)
        return process


def _messages(process: subprocess.Popen[str]) -> Iterator[dict[str, Any]]:
    assert process.stdout is not None
    for line in process.stdout:
        _, mark, text = line.partition(MARK)
        if mark:
            yield json.loads(text)


def _environment(device: str) -> dict[str, str]:
    """The environment of a front end's process: this one's modules, and the device."""
    found = os.environ | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    found |= {"JAX_PLATFORMS": device, "BATCHNORM_PROOF": "skip"}  # this is the proof
    found.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    if device == "cpu":
        found["CUDA_VISIBLE_DEVICES"] = ""
    return found


def _describe_end(status: int) -> str:
    if status >= 0:
        return f"with status {status}"
    try:
        return f"by {signal.Signals(-status).name}"
    except ValueError:
        return f"by signal {-status}"
