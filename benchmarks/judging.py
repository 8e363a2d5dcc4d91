"""Figures of a run's record, and the verdict on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Record = dict[str, Any]
Found = tuple[float, str] | None  # a figure, and the case that it is of
RESULTS = Path(__file__).parent / "results"
HUGE = ", huge pages"

# Four copies of 64 MiB in 12 ms. Where copies are faster, arithmetic is the limit of a step, and
# its time over theirs says how fast memory is.
FAST_COPY = 4 * 2 * (64 << 20) / 12e-3 / 1e9  # GB/s


@dataclass(frozen=True)
class Target:
    """A figure, and its least value, or its greatest where `at_most`.

    Attributes:
        what: the figure, for readers.
        bound: least, or greatest.
        find: the figure in a record; None where it was not measured.
        at_most: the bound is the greatest.
        fast: the bound where the copies of `case` are faster than `FAST_COPY`.
        case: whose copies decide that, and stand beside the figure; "" for those of the case that
            `find` tells.
    """

    what: str
    bound: float
    find: Callable[[Record], Found]
    at_most: bool = False
    fast: float | None = None
    case: str = ""

    def judge(self, record: Record) -> Record:
        """The target as the JSON has it; `measured` and `met` are None for cases left out."""
        found = self.find(record)
        value, where = (None, "") if found is None else found
        copy = copy_speed(record, self.case or where)
        fast = self.fast is not None and copy is not None and copy > FAST_COPY
        bound = self.fast if fast else self.bound
        entry: Record = {"what": self.what, "floor": bound, "at most": self.at_most}
        if value is None:
            return entry | {"measured": None, "where": "", "met": None}
        met = value <= bound if self.at_most else value >= bound
        entry |= {"measured": float(f"{value:.3g}"), "where": "" if self.case else where}
        return entry | {"met": met, "copy, GB/s": copy}


def quotient(record: Record, case: str, above: str, below: str) -> float | None:
    """The time of one variant of a case over that of another; None if not measured."""
    variants = record["cases"].get(case, {}).get("variants", {})
    if above not in variants or below not in variants:
        return None
    return float(variants[above]["ms"] / variants[below]["ms"])


def copy_speed(record: Record, case: str) -> float | None:
    """GB/s of a copy of x in the same run as a case."""
    variants = record["cases"].get(case, {}).get("variants", {})
    return variants["copy"]["GB/s"] if "copy" in variants else None


def trips(record: Record, case: str, variant: str = "ours") -> float | None:
    """The time of a variant over that of one copy of x."""
    return record["cases"].get(case, {}).get("variants", {}).get(variant, {}).get("trips")


def judge(record: Record, targets: Iterable[Target]) -> list[Record]:
    """Every target."""
    return [target.judge(record) for target in targets]


def print_targets(entries: Iterable[Record]) -> None:
    """One line each: ok, short, or not measured; then the number of those that are short."""
    entries = list(entries)
    for e in entries:
        measured = "" if e["measured"] is None else f"{e['measured']:g}"
        copy = e.get("copy, GB/s")
        beside = "" if copy is None else f"copy {copy:.3g} GB/s"
        what = e["what"] + (f" ({e['where']})" if e["where"] else "")
        print(f"{state(e):<13}{what:<74}{sign(e)} {e['floor']:<8g}{measured:<10}{beside}")
    short = sum(e["met"] is False for e in entries)
    missing = sum(e["met"] is None for e in entries)
    print(f"{len(entries)} targets: {short} short, {missing} not measured")


def state(entry: Record) -> str:
    """The verdict in words."""
    return {True: "ok", False: "short", None: "not measured"}[entry["met"]]


def sign(entry: Record) -> str:
    """The relation that a target asks for."""
    return "≤" if entry["at most"] else "≥"


def of(case: str, above: str, below: str = "ours") -> Callable[[Record], Found]:
    """The quotient of two variants of a case."""

    def find(record: Record) -> Found:
        value = quotient(record, case, above, below)
        return None if value is None else (value, case)

    return find


def worst(names: Iterable[str], above: str, below: str = "ours") -> Callable[[Record], Found]:
    """The least quotient of two variants over some cases."""

    def find(record: Record) -> Found:
        found = [(quotient(record, name, above, below), name) for name in names]
        return min(((value, name) for value, name in found if value is not None), default=None)

    return find


def most(names: Iterable[str], above: str, below: str) -> Callable[[Record], Found]:
    """The greatest quotient of two variants over some cases."""

    def find(record: Record) -> Found:
        found = [(quotient(record, name, above, below), name) for name in names]
        return max(((value, name) for value, name in found if value is not None), default=None)

    return find


def over_copies(names: Iterable[str], copies: int) -> Callable[[Record], Found]:
    """The greatest time over that of some copies of x, of all these cases."""

    def find(record: Record) -> Found:
        found = [(trips(record, name), name) for name in names]
        known = ((value / copies, name) for value, name in found if value is not None)
        return max(known, default=None)

    return find


def of_pass(name: str) -> Callable[[Record], Found]:
    """The greatest time of a pass over that of a copy of one array, without a mask."""

    def find(record: Record) -> Found:
        passes = record.get("passes", {})
        cases = [case for case in passes if "mask" not in case]
        found = [(passes[case]["over a copy"][name], passes[case]["title"]) for case in cases]
        return max(found, default=None)

    return find


def of_memory(record: Record) -> Found:
    """The greatest peak of a step's memory over that of torch's, in place if it can."""
    found = []
    for name, case in record["cases"].items():
        if memory := case.get("memory"):
            rival = min(m["peak"] for variant, m in memory.items() if variant != "ours")
            found.append((memory["ours"]["peak"] / rival, name))
    return max(found, default=None)


def against_flax(case: str) -> Callable[[Record], Found]:
    """Layer against layer and function against function, the worse one.

    The surroundings cost as much as a small step: nnx's state, linen's dictionaries.
    """

    def find(record: Record) -> Found:
        pairs = (("flax nnx", "ours"), ("flax linen", "ours, function"))
        found = [quotient(record, case, above, below) for above, below in pairs]
        known = [value for value in found if value is not None]
        return (min(known), case) if known else None

    return find


def of_accuracy(record: Record) -> Found:
    """The error of y where the mean is a million deviations."""
    errors = record.get("accuracy", {}).get("1e+06")
    return None if errors is None else (errors["ours"], "")
