"""Reading in a process of its own, for formats whose parsers are large libraries in C and C++.

A damaged file can crash HDF5 or make it allocate without bound. There it ends the child: the
parent reports a damaged file. What comes back is a safetensors file, parsed strictly.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from batchnorm.tools.checkpoints import safetensors, serial
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.reading import Checkpoint, Entry, Format, read_here

__all__ = ["main", "read_isolated"]

# The working directory, where a downloaded `h5py.py` may lie, is no place to import from.
_CHILD = (
    "import sys; sys.path[:] = [place for place in sys.path if place]; "
    "from batchnorm.tools.checkpoints.isolated import main; sys.exit(main(sys.argv[1:]))"
)
_REFUSED = 3  # the exit status that goes with a message
# Memory of the libraries themselves, and a factor for copies of what is read.
_BASE, _COPIES = 3 << 30, 3


def read_isolated(path: Path, kind: Format, budget: Budget, seconds: float) -> Checkpoint:
    """`read_here` in a child with bounded memory and time."""
    command = [sys.executable, "-c", _CHILD, str(path), kind, str(budget.limit)]
    places = os.pathsep.join(place for place in sys.path if place)
    environment = os.environ | {"PYTHONPATH": places, "MALLOC_ARENA_MAX": "2"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, env=environment)
    except subprocess.TimeoutExpired as error:
        raise budget.error(f"reading it takes longer than {seconds:g} s.") from error
    if done.returncode == _REFUSED:
        raise budget.error(done.stderr.decode(errors="replace").strip())
    if done.returncode != 0:
        missing = b"ModuleNotFoundError" in done.stderr
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise budget.error(
            f"reading it needs a package: {last}; install it with: pip install 'batchnorm[files]'"
            if missing
            else "the file is damaged: its format's own library ended abnormally (status "
            f"{done.returncode})."
        )
    return _decode(path, kind, done.stdout)


def _decode(path: Path, kind: Format, data: bytes) -> Checkpoint:
    budget = Budget(path, max(1 << 31, 32 * len(data)))
    file = io.BytesIO(data)
    metadata = safetensors.read_metadata(file, budget)
    source = safetensors.read(file, budget)
    arrays = {name: source.load(name) for name in source.entries}
    layers = serial.unpack(arrays, metadata["layers"])
    found = json.loads(metadata["entries"])
    entries = {name: Entry(tuple(e["shape"]), e["dtype"]) for name, e in found.items()}
    notes, others = json.loads(metadata["notes"]), int(metadata["others"])
    return Checkpoint(path, kind, entries, layers, notes, others)


def _encode(checkpoint: Checkpoint) -> bytes:
    arrays, layers = serial.pack(checkpoint.layers)
    entries = {name: asdict(entry) for name, entry in checkpoint.entries.items()}
    notes = json.dumps(checkpoint.notes)
    metadata = {"layers": layers, "entries": json.dumps(entries), "notes": notes}
    metadata["others"] = str(checkpoint.others)
    return safetensors.encode(arrays, metadata)


def _limit_memory(limit: int) -> None:
    try:
        import resource
    except ImportError:  # Windows has no such limit; sizes are checked before reading all the same
        return
    bound = _BASE + _COPIES * limit
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    if hard != resource.RLIM_INFINITY:
        bound = min(bound, hard)
    resource.setrlimit(resource.RLIMIT_AS, (bound, hard))


def main(arguments: list[str]) -> int:
    """What the child does: read, and write the result to the standard output."""
    path, kind, limit = Path(arguments[0]), arguments[1], int(arguments[2])
    budget = Budget(path, limit)
    _limit_memory(limit)
    try:
        encoded = _encode(read_here(path, kind, budget))  # type: ignore[arg-type]
    except ValueError as error:
        sys.stderr.write(str(error).removeprefix(f"{path}: "))
        return _REFUSED
    sys.stdout.buffer.write(encoded)
    return 0
