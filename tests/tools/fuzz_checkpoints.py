"""Mutated checkpoints of every format: each must give states, or the one error.

python tests/tools/fuzz_checkpoints.py 12000 --seed 0
"""

from __future__ import annotations

import argparse
import io
import multiprocessing
import random
import re
import shutil
import struct
import sys
import tempfile
import time
import zipfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from files import WRITERS

from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.reading import detect, read_here

LIMIT = 8 << 20
SECONDS = 20
# Beyond this above what the libraries take, memory is not what the limit allows: a file is read
# into memory once, a header becomes up to 32 times as many bytes of objects, copies are made.
MOST_MEMORY = 8 * LIMIT
ISOLATED = ("weights.h5", "keras", "orbax")
_EXTREMES = (0, 1, *((1 << n) - 1 for n in (7, 8, 16, 31, 32, 63, 64)), 1 << 40)


@dataclass
class Report:
    """What became of the mutated files.

    Args:
        outcomes: number of files by format and outcome: "read", "refused", or "contained" where
            the format's own library died or never returned, in its process, and the reader said so.
        problems: any other outcome.
        memory: largest growth of a process by reading one file, in bytes.
        slowest: the longest time that one file took, in seconds.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: int = 0
    slowest: float = 0.0

    def total(self, outcome: str) -> int:
        return sum(n for (_, found), n in self.outcomes.items() if found == outcome)

    @property
    def read(self) -> int:
        return self.total("read")

    @property
    def refused(self) -> int:
        return self.total("refused")


def fuzz(folder: Path, cases: int, seed: int) -> Report:
    """Mutate and read `cases` files, in a process that may die of it."""
    seeds = folder / "seeds"
    seeds.mkdir()
    for name, write in WRITERS.items():
        write(seeds / f"seed.{name}")
    report, victim = Report(), _Victim()
    target = folder / "case"
    for case in range(cases):
        name = list(WRITERS)[case % len(WRITERS)]
        rng = random.Random(f"{seed} {case}")
        _remove(target)
        _mutate(seeds / f"seed.{name}", target, rng)
        start = time.perf_counter()
        outcome, memory = victim.read(target)
        report.slowest = max(report.slowest, time.perf_counter() - start)
        report.memory = max(report.memory, memory)
        if outcome in ("died", "hung") and name in ISOLATED:
            outcome = _read_properly(target)
        report.outcomes[name, outcome.partition(":")[0]] += 1
        if outcome not in ("read", "refused", "contained") or memory > MOST_MEMORY:
            report.problems.append(f"case {case} ({name}, seed {seed}): {outcome}, {memory} bytes")
    victim.stop()
    return report


class _Victim:
    """A process that reads one file after another, and is replaced when it dies."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self._process.start()
        theirs.close()
        self._connection.recv()  # it has imported everything

    def read(self, path: Path) -> tuple[str, int]:
        """The outcome, and by how many bytes the process has grown."""
        self._connection.send(str(path))
        if not self._connection.poll(SECONDS):
            self._replace()
            return "hung", 0
        try:
            outcome, memory = self._connection.recv()
        except EOFError:
            self._replace()
            return "died", 0
        return outcome, memory

    def _replace(self) -> None:
        self.stop()
        self._start()

    def stop(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.join()
        self._connection.close()


def _serve(connection: Connection) -> None:
    import h5py  # noqa: F401  (their memory is not the files')
    import tensorstore  # noqa: F401

    connection.send("ready")
    while True:
        path = Path(connection.recv())
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _peak_memory()
        try:
            budget = Budget(path, LIMIT)
            read_here(path, detect(path, budget), budget)
            outcome = "read"
        except CheckpointError as error:
            outcome = "refused" if "\n" not in str(error) else f"a message of lines: {error}"
        except BaseException as error:
            outcome = f"escaped: {error!r:.200}"
        connection.send((outcome, _peak_memory() - before))


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _read_properly(path: Path) -> str:
    """What a user sees of a file of which the format's library dies or does not return."""
    try:
        read_checkpoint(path, limit=LIMIT, seconds=SECONDS)
    except CheckpointError:
        return "contained"
    except Exception as error:
        return f"escaped: {error!r:.200}"
    return "read"  # what an earlier file had left behind was the reason


def _mutate(source: Path, target: Path, rng: random.Random) -> None:
    if source.is_dir():
        shutil.copytree(source, target)
        files = sorted(p for p in target.rglob("*") if p.is_file())
        # Most of the files are not looked at.
        chosen = target / "_METADATA" if rng.random() < 0.3 else rng.choice(files)
        chosen.write_bytes(_mutate_bytes(chosen.read_bytes(), rng))
        return
    data = source.read_bytes()
    repack = data[:2] == b"PK" and rng.random() < 0.7  # past the archive's own check sums
    target.write_bytes(_mutate_member(data, rng) if repack else _mutate_bytes(data, rng))


def _mutate_member(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    large = [name for name, content in members.items() if len(content) > 8]
    chosen = rng.choice(large)
    members[chosen] = _mutate_bytes(members[chosen], rng)
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, size = _place(len(content), rng), rng.randrange(1, 64)
        choice = rng.randrange(7)
        if choice == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            content[at] = rng.randrange(256)
        elif choice == 2:
            value, width = rng.choice(_EXTREMES), rng.choice((2, 4, 8))
            layout = rng.choice("<>") + {2: "H", 4: "I", 8: "Q"}[width]
            content[at : at + width] = struct.pack(layout, value & ((1 << 8 * width) - 1))
        elif choice == 3:
            del content[at : at + size]
        elif choice == 4:
            content[at:at] = content[_place(len(content), rng) :][:size]
        elif choice == 5:
            content[at : at + size] = rng.randbytes(size)
        elif rng.random() < 0.3:
            del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


def _place(size: int, rng: random.Random) -> int:
    """Anywhere, but rather at the ends, where headers and directories are."""
    where = rng.random()
    if where < 0.4:
        return rng.randrange(min(size, 512))
    return size - 1 - rng.randrange(min(size, 512)) if where < 0.6 else rng.randrange(size)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _lines(report: Report) -> Iterator[Any]:
    yield f"{'format':<12} {'read':>7} {'refused':>8} {'contained':>10}"
    for name in WRITERS:
        counts = [report.outcomes[name, outcome] for outcome in ("read", "refused", "contained")]
        yield f"{name:<12} {counts[0]:>7} {counts[1]:>8} {counts[2]:>10}"
    yield f"largest growth {report.memory / 1e6:.1f} MB, slowest {report.slowest:.2f} s"
    yield f"{len(report.problems)} problems"
    yield from report.problems


def main() -> int:
    """Run as a command; 1 if there was a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = fuzz(Path(folder), arguments.cases, arguments.seed)
    print(*_lines(report), sep="\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
