"""Verdicts about the GPU's kernels on a device, kept in the user's cache folder.

A file may be anybody's, cut short or full of nonsense: whatever is not exactly a verdict of this
user's about the same versions is as good as none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import stat
import tempfile
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

from batchnorm.kernels.schedules import PASSES, SCHEDULE

__all__ = [
    "PASSED",
    "Subject",
    "Verdict",
    "describe",
    "describe_known",
    "find_setting",
    "make_subject",
    "name_schedule",
]

VARIABLE = "BATCHNORM_PROOF"
SETTINGS = ("once", "force", "skip")
_FORMAT = 1
_MOST_BYTES, _MOST_FILES, _LONGEST = 1 << 14, 64, 500


class Verdict(NamedTuple):
    """The outcome of a proof: the case that failed and its error, or two empty texts."""

    case: str
    error: str

    @property
    def passed(self) -> bool:
        """True if no case failed."""
        return not self.case


PASSED = Verdict("", "")


class Subject(NamedTuple):
    """The subject of a verdict; another one needs a proof of its own."""

    device: str
    driver: str
    torch: str
    triton: str
    batchnorm: str
    source: str  # a digest of the kernels' files
    schedule: str  # see `batchnorm.kernels.schedules`

    def read(self) -> Verdict | None:
        """The verdict of an earlier process, or None."""
        try:
            found = _read(_folder() / f"{self._digest()}.json")
        except OSError:
            return None
        return found[1] if found is not None and found[0] == self else None

    def write(self, verdict: Verdict) -> None:
        """Keep a verdict for later processes, if the folder can be written."""
        error = "".join(c for c in verdict.error if c.isprintable())[:_LONGEST]
        content = {
            "format": _FORMAT,
            "subject": self._asdict(),
            "verdict": verdict._replace(error=error)._asdict(),
        }
        name = ""
        try:
            folder = _folder()
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            number, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
            with os.fdopen(number, "w", encoding="ascii") as file:
                json.dump(content, file)
            Path(name).replace(folder / f"{self._digest()}.json")
        except OSError:  # the next process proves again
            with contextlib.suppress(OSError):
                Path(name).unlink()

    def _digest(self) -> str:
        return hashlib.sha256("\0".join(self).encode()).hexdigest()[:32]


def make_subject(device: str, driver: str) -> Subject:
    """The kernels of this installation on a device, in the schedule of this process."""
    return Subject(device, driver, *_installed(), SCHEDULE.name)


def find_setting() -> str:
    """BATCHNORM_PROOF: "once", "force" or "skip"; "" where it is not set.

    Raises:
        ValueError: it is something else.
    """
    found = os.environ.get(VARIABLE, "")
    if found not in ("", *SETTINGS):
        raise ValueError(f"{VARIABLE} must be one of {', '.join(SETTINGS)}; got {found!r}.")
    return found


def describe_known() -> list[str]:
    """A line for each device of which the cache has a verdict about this installation."""
    try:
        files = sorted(_folder().glob("*.json"))[:_MOST_FILES]
    except OSError:
        return []
    found = [pair for pair in map(_read, files) if pair is not None]
    return [
        f"{subject.device}{name_schedule(subject.schedule)}: {describe(verdict)}"
        for subject, verdict in found
        if subject[2:-1] == _installed()
    ]


def name_schedule(schedule: str) -> str:
    """An addition to a device's name: the default schedule has none."""
    return "" if schedule == PASSES else f" with {schedule}"


def describe(verdict: Verdict) -> str:
    """A verdict in words."""
    if verdict.passed:
        return "proved"
    return f"wrong in case {verdict.case} ({verdict.error}); plain array code serves it"


@lru_cache(maxsize=1)
def _installed() -> tuple[str, str, str, str]:
    """The versions that a verdict is about, and the digest of the kernels."""
    digest = hashlib.sha256()
    for path in sorted((Path(__file__).parent / "triton").glob("*.py")):
        digest.update(path.read_bytes())
    torch, triton, batchnorm = map(_version, ("torch", "triton", "batchnorm"))
    return torch, triton, batchnorm, digest.hexdigest()[:32]


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "unknown"


def _folder() -> Path:
    """The folder of verdicts by the XDG rules, which ignore a path that is not absolute."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not given.is_absolute():
        try:
            given = Path("~/.cache").expanduser()
        except RuntimeError as error:
            raise OSError("the home folder is unknown") from error
    return given / "batchnorm" / "proofs"


def _read(path: Path) -> tuple[Subject, Verdict] | None:
    """The content of a file, or None where it is not a verdict of this user's."""
    try:
        # Not through a link, and not waiting for the writer of a fifo.
        flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with os.fdopen(os.open(path, flags), "rb") as file:
            about = os.fstat(file.fileno())
            own = not hasattr(os, "geteuid") or about.st_uid == os.geteuid()
            if not (stat.S_ISREG(about.st_mode) and own and about.st_size <= _MOST_BYTES):
                return None
            content = json.loads(file.read(_MOST_BYTES).decode("ascii"))
    except (OSError, ValueError, RecursionError):
        return None
    return _parse(content)


def _parse(content: Any) -> tuple[Subject, Verdict] | None:
    if not isinstance(content, dict) or content.keys() != {"format", "subject", "verdict"}:
        return None
    number, subject, verdict = (content[key] for key in ("format", "subject", "verdict"))
    if type(number) is not int or number != _FORMAT:
        return None
    for record, kind in ((subject, Subject), (verdict, Verdict)):
        if not isinstance(record, dict) or record.keys() != set(kind._fields):
            return None
        if not all(type(a) is str and len(a) <= _LONGEST for a in record.values()):
            return None
        if not all(a.isprintable() for a in record.values()):
            return None
    found = Verdict(**verdict)
    if found.passed and found.error:
        return None
    return Subject(**subject), found
