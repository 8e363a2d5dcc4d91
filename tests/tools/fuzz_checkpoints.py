"""Checkpoints of every format, mutated or made by an adversary: each must give states or a
CheckpointError, and no other file may be opened. Each is read twice, for its batch norms and for
all arrays.

python tests/tools/fuzz_checkpoints.py 3000 --seed 0
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import re
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from adversaries import ADVERSARIES
from adversaries_stored import SECRET
from files import WRITERS
from mutations import mutate
from watching import Watch

from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint, serial
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.reading import detect, read_here

LIMIT = 32 << 20
SECONDS = 20
# The memory that the limit allows above that of the libraries: a file is read into memory once, a
# header becomes up to 32 times as many bytes of objects, copies are made.
MOST_MEMORY = 4 * LIMIT
ADVERSARIAL = 0.2  # the share of files made by an adversary; the others are mutated
ISOLATED = ("weights.h5", "keras", "orbax")


@dataclass
class Report:
    """The outcomes of the fuzzed files.

    Args:
        outcomes: number of files by format and outcome: "read", "refused", or "contained" where
            the format's own library died or never returned, in its process, and the reader said so.
        made: number of files by the adversary who made them, and outcome.
        problems: any other outcome.
        memory: largest growth of a process by reading one file, in bytes.
        slowest: the longest time that one file took, in seconds, and which it was.
    """

    outcomes: Counter[tuple[str, str]] = field(default_factory=Counter)
    made: Counter[tuple[str, str]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    memory: int = 0
    slowest: tuple[float, str] = (0.0, "none")

    def total(self, outcome: str) -> int:
        return sum(n for (_, found), n in self.outcomes.items() if found == outcome)

    @property
    def read(self) -> int:
        return self.total("read")

    @property
    def refused(self) -> int:
        return self.total("refused")


def fuzz(folder: Path, cases: int, seed: int, names: Sequence[str] = tuple(WRITERS)) -> Report:
    """Write files of every format in turn, and read them in a process that may crash.

    Args:
        folder: an empty one.
        cases: number of files, of all formats together.
        seed: of everything random.
        names: of the formats.
    """
    seeds = folder / "seeds"
    seeds.mkdir()
    for name in names:
        WRITERS[name](seeds / f"seed.{name}")
    report, victim = Report(), _Victim()
    place = folder / "place"
    for case in range(cases):
        name = names[case % len(names)]
        rng = random.Random(f"{seed} {case}")
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        maker = _write(name, seeds, place / "case", rng)
        what = f"case {case} ({name}, {maker or 'mutated'}, seed {seed})"
        outcome, memory = _read(victim, place, name, report, what)
        report.outcomes[name, outcome.partition(":")[0]] += 1
        if maker:
            report.made[maker, outcome.partition(":")[0]] += 1
        if outcome not in ("read", "refused", "contained") or memory > MOST_MEMORY:
            report.problems.append(f"{what}: {outcome}, {memory} bytes")
    victim.stop()
    return report


def _write(name: str, seeds: Path, target: Path, rng: random.Random) -> str:
    """Write one file, and return the name of the adversary who made it, if any."""
    if rng.random() < ADVERSARIAL:
        maker = rng.choice(ADVERSARIES[name])
        maker(target, rng)
        return maker.__name__
    mutate(seeds / f"seed.{name}", target, rng)
    return ""


def _read(victim: _Victim, place: Path, name: str, report: Report, what: str) -> tuple[str, int]:
    watch = Watch(place.glob("away*"))
    start = time.perf_counter()
    outcome, memory = victim.read(place / "case")
    report.slowest = max(report.slowest, (time.perf_counter() - start, what))
    report.memory = max(report.memory, memory)
    if outcome in ("died", "hung") and name in ISOLATED:
        outcome = _read_properly(place / "case")
    opened = watch.opened()
    watch.close()
    return (f"opened: {opened}" if opened else outcome), memory


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
        """The outcome, and the growth of the process in bytes."""
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
            found = read_here(path, detect(path, budget), budget)
            arrays = [a for state in found.layers for a in (state.mean, state.var, state.gamma)]
            arrays += _all_arrays(path)
            secret = any(a is not None and (a == SECRET).any() for a in arrays)
            outcome = "a secret" if secret else "read"
        except CheckpointError as error:
            outcome = "refused" if "\n" not in str(error) else f"a message of lines: {error}"
        except BaseException as error:
            outcome = f"escaped: {error!r:.200}"
        connection.send((outcome, _peak_memory() - before))


def _all_arrays(path: Path) -> list[Any]:
    """Arrays in no batch norm, as the parent gets them; none where reading all is refused."""
    budget = Budget(path, LIMIT)
    try:
        found = read_here(path, detect(path, budget), budget, everything=True)
    except CheckpointError as error:
        if "\n" in str(error):
            raise RuntimeError(f"a message of lines: {error}") from None
        return []
    answer = memoryview(b"".join(serial.encode(found)))[1:]
    try:
        contents = serial.decode(answer, budget).contents
    except CheckpointError as error:
        raise RuntimeError(f"an answer that is not understood: {error}") from None
    return [] if contents is None else list(contents.others.values())


def _peak_memory() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024  # type: ignore[index]


def _read_properly(path: Path) -> str:
    """The user's result for a file on which the format's library crashes or never returns."""
    try:
        for everything in (False, True):
            read_checkpoint(path, limit=LIMIT, seconds=SECONDS, everything=everything)
    except CheckpointError:
        return "contained"
    except Exception as error:
        return f"escaped: {error!r:.200}"
    return "read"  # the crash came from memory that an earlier file had damaged


def _lines(report: Report) -> Iterator[Any]:
    yield f"{'format':<12} {'read':>7} {'refused':>8} {'contained':>10}"
    for name in sorted({name for name, _ in report.outcomes}):
        counts = [report.outcomes[name, outcome] for outcome in ("read", "refused", "contained")]
        yield f"{name:<12} {counts[0]:>7} {counts[1]:>8} {counts[2]:>10}"
    yield ""
    for maker in sorted({maker for maker, _ in report.made}):
        counts = [report.made[maker, outcome] for outcome in ("read", "refused", "contained")]
        yield f"{maker:<28} {counts[0]:>5} {counts[1]:>5} {counts[2]:>5}"
    yield f"largest growth {report.memory / 1e6:.1f} MB"
    yield f"slowest {report.slowest[0]:.2f} s, {report.slowest[1]}"
    yield f"{len(report.problems)} problems"
    yield from report.problems


def main() -> int:
    """Run as a command; 1 if there was a problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", type=int, help="number of files of each format")
    parser.add_argument("--format", action="append", choices=WRITERS, help="only this one")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        names = arguments.format or list(WRITERS)
        report = fuzz(Path(folder), arguments.cases * len(names), arguments.seed, names)
    print(*_lines(report), sep="\n")
    return int(bool(report.problems))


if __name__ == "__main__":
    sys.exit(main())
