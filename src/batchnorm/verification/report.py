"""The report of `batchnorm.verify`."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any

__all__ = ["Check", "Failure", "Verification"]


@dataclass(frozen=True)
class Failure:
    """A case whose result is wrong.

    Attributes:
        case: its name; the words are the options, the type, the layout and the mask.
        error: which result is wrong and by how much, or the exception.
    """

    case: str
    error: str


@dataclass(frozen=True)
class Check:
    """The cases of one way from x to y.

    Attributes:
        front_end: "kernels" (the compiled ones on NumPy arrays), "torch", "jax" or "keras".
        way: the name of the way.
        instructions: the instruction set of the compiled kernels, or "".
        cases: the number of those that ran; a crash keeps others from running.
        worst: the largest error as a part of what the specification allows, of cases that passed.
        failures: those that did not.
        seconds: the time that they took.
    """

    front_end: str
    way: str
    instructions: str
    cases: int
    worst: float
    failures: tuple[Failure, ...]
    seconds: float


@dataclass(frozen=True)
class Verification:
    """The checks of a machine, and their findings.

    Attributes:
        device: "cpu" or "cuda".
        quick: only a part of the sample was run.
        versions: of Python and of the packages.
        checks: a row for each way.
        unchecked: pairs of a front end and the reason why it was not checked.
        seconds: the time of everything.
    """

    device: str
    quick: bool
    versions: dict[str, str]
    checks: tuple[Check, ...]
    unchecked: tuple[tuple[str, str], ...]
    seconds: float

    @property
    def passed(self) -> bool:
        """True if something was checked, and nothing was wrong."""
        return bool(self.checks) and not any(check.failures for check in self.checks)

    def to_json(self) -> str:
        """The report for programs; the fields are those of these classes, and `passed`."""
        found: dict[str, Any] = {"passed": self.passed, **asdict(self)}
        found["unchecked"] = [{"front_end": f, "reason": r} for f, r in self.unchecked]
        return json.dumps(found, indent=2)

    def __str__(self) -> str:
        lines = [self._line(check) for check in self.checks]
        for check in self.checks:
            where = f"{check.front_end}, {check.way} {check.instructions}".rstrip()
            lines += [f"wrong: {where}: {f.case}: {f.error}" for f in check.failures]
        lines += [f"not checked: {front_end}: {reason}" for front_end, reason in self.unchecked]
        return "\n".join(lines)

    @staticmethod
    def _line(check: Check) -> str:
        name = f"{check.front_end:<8} {check.way:<28} {check.instructions:<9}"
        wrong = f"{len(check.failures)} wrong" if check.failures else "all right"
        return f"{name} {check.cases:>4} cases, {wrong}, worst {check.worst:.2g} of the bound"
