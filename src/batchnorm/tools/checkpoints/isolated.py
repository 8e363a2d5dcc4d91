"""Reading in a process of its own, whose memory and time are bounded from outside.

A damaged file can crash the library that parses it, make it allocate without bound, or keep it
busy for ever. Only the child ends then, and the parent reports a damaged file. The child's answer
is parsed strictly (`serial.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from threading import Timer
from typing import Any

from batchnorm.tools.checkpoints import serial
from batchnorm.tools.checkpoints.limits import RAISE_SECONDS, Budget
from batchnorm.tools.checkpoints.source import Checkpoint

__all__ = ["read_isolated"]

# Nothing is imported from the working directory, where a downloaded `h5py.py` may lie.
_CHILD = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; "
    "from batchnorm.tools.checkpoints.child import main; sys.exit(main(sys.argv[1:]))"
)
_ONE_THREAD = ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS")
_PIECE = 1 << 20
_OUT_OF_TIME = -24  # ended by SIGXCPU, which Windows does not have


def read_isolated(
    budget: Budget, seconds: float, stream: Any = None, *, everything: bool = False
) -> Checkpoint:
    """`read_here` in a child with bounded memory and time.

    Args:
        budget: of the file, whose path it has.
        seconds: after which the child is ended.
        stream: the file itself, with a descriptor or as bytes, instead of its path.
        everything: load all arrays.
    """
    source = "path" if stream is None else "stream"
    arguments = [str(budget.path), source, str(budget.limit), str(seconds)]
    arguments += ["everything"] if everything else []
    # A child that is killed cannot remove its temporary files.
    with tempfile.TemporaryDirectory(prefix="batchnorm-") as place:
        if isinstance(stream, bytes):
            held = Path(place) / "held"
            held.write_bytes(stream)
            with held.open("rb") as file:
                answer, status = _run(arguments, place, file, budget, seconds)
        else:
            answer, status = _run(arguments, place, stream, budget, seconds)
    if answer[:1] == serial.REFUSED:
        raise budget.error(answer[1:].decode(errors="replace"))
    if status != 0 or answer[:1] != serial.READ:
        raise budget.error(
            f"the file is damaged: its format's own library ended abnormally (status {status})."
        )
    return serial.decode(memoryview(answer)[1:], budget)


def _run(
    arguments: list[str], place: str, stream: Any, budget: Budget, seconds: float
) -> tuple[bytearray, int]:
    """The child's answer and exit status; `place` is the folder for its temporary files."""
    most, start = serial.most_bytes(budget), time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-c", _CHILD, *arguments],
        stdin=subprocess.DEVNULL if stream is None else stream,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=_environment(place),
    ) as child:
        assert child.stdout is not None
        timer = Timer(seconds, child.kill)
        timer.start()
        try:
            answer = bytearray()
            while len(answer) <= most and (piece := child.stdout.read(_PIECE)):
                answer += piece
            if len(answer) > most:
                child.kill()
            status = child.wait()
        except BaseException:
            child.kill()
            raise
        finally:
            timer.cancel()
    late = time.monotonic() - start >= seconds or status == _OUT_OF_TIME
    if status != 0 and late:
        raise budget.error(f"reading it takes longer than {seconds:g} s; {RAISE_SECONDS}")
    return answer, status


def _environment(place: str) -> dict[str, str]:
    places = os.pathsep.join(entry for entry in sys.path if entry)
    environment = os.environ | {"PYTHONPATH": places, "MALLOC_ARENA_MAX": "2", "TMPDIR": place}
    return environment | dict.fromkeys(_ONE_THREAD, "1")
