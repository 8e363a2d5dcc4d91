"""The results of a search for leaks as plain records."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any, Literal

import numpy as np

from batchnorm.tools.text import format_number, list_names, plural, printable

__all__ = ["Leak", "LeakFindings", "Mode", "Movement"]

Mode = Literal["evaluation", "training"]


@dataclass(frozen=True)
class Leak:
    """A layer whose real outputs depend on padding, though its real inputs do not.

    Args:
        name: its path in the model; empty for the model itself.
        kind: the name of its class.
        modes: "evaluation", or "training", where batch norms use the batch's statistics, or both.
        amounts: largest absolute difference of its real outputs, in each of the modes.
        relative: the first of them, relative to the size of the outputs.
        between: for code of the layer that is in no layer of its own: the layers called before
            and after it, either empty at the edge; else None.
        norm: the batch norm whose output at padding the layer reads; empty if it is another cause.
        cause: one sentence.
        remedy: one sentence.
    """

    name: str
    kind: str
    modes: tuple[Mode, ...]
    amounts: tuple[float, ...]
    relative: float
    between: tuple[str, str] | None
    norm: str
    cause: str
    remedy: str

    @property
    def title(self) -> str:
        """The name for people, with the class."""
        return f"{self.name} ({self.kind})" if self.name else self.kind

    @property
    def movement(self) -> str:
        """By how much, and when, for people."""
        pairs = zip(self.amounts, self.modes, strict=True)
        return "moves by " + ", ".join(f"{format_number(a, 2)} in {mode}" for a, mode in pairs)

    @property
    def amount(self) -> float:
        """The difference in the first of the modes."""
        return self.amounts[0]


@dataclass(frozen=True, eq=False)
class Movement:
    """A call of a layer, and by how much its real outputs move from one run to the other.

    Unlike a `Leak` this includes what the layers before it leak.

    Args:
        name: the layer's path in the model.
        kind: the name of its class.
        call: number of the call, from 0, for layers that run several times.
        inner: it called other layers.
        leaks: the modes in which the layer leaks by itself; most often none.
        amount: largest absolute difference; None where positions could not be told.
        relative: the same, relative to the size of the outputs.
        profile: float64, the largest relative difference for each distance to the end of the
            sample, in positions of the input; empty where a layer has no positions.
    """

    name: str
    kind: str
    call: int
    inner: bool
    leaks: tuple[Mode, ...]
    amount: float | None
    relative: float | None
    profile: Any


@dataclass(frozen=True, eq=False)
class LeakFindings:
    """The fields of `Leaks`, which documents them, and the questions that its views ask."""

    source: str
    leaks: tuple[Leak, ...]
    sensitive: tuple[Leak, ...]
    layers: tuple[Movement, ...]
    moved: float
    before: tuple[int, ...]
    after: tuple[int, ...]
    modes: tuple[Mode, ...]
    tolerance: float

    @property
    def ok(self) -> bool:
        """True if no layer leaks."""
        return not self.leaks

    @property
    def first(self) -> Leak | None:
        """The first leak in the order of execution, in evaluation if there is one; or None."""
        return self.leaks[0] if self.leaks else None

    @property
    def shown(self) -> Mode:
        """The mode of `layers` and `moved`: evaluation, unless leaks show in training only."""
        return self.leaks[0].modes[0] if self.leaks else "evaluation"

    def groups(self) -> list[tuple[bool, list[Leak]]]:
        """Neighbouring leaks with the same remedy; True for those that count, then the others."""
        return [
            (counts, list(group))
            for counts, leaks in ((True, self.leaks), (False, self.sensitive))
            for _, group in groupby(leaks, key=lambda leak: leak.remedy)
        ]

    @property
    def compared(self) -> int:
        """Number of calls whose real outputs were compared."""
        return sum(layer.relative is not None for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """Plain types only; numbers that are not finite become None."""
        return {
            "source": self.source,
            "ok": self.ok,
            "before": list(self.before),
            "after": list(self.after),
            "modes": list(self.modes),
            "tolerance": self.tolerance,
            "shown": self.shown,
            "moved": _number(self.moved),
            "leaks": [_plain(asdict(leak)) for leak in self.leaks],
            "sensitive": [_plain(asdict(leak)) for leak in self.sensitive],
            "layers": [
                {
                    "name": layer.name,
                    "kind": layer.kind,
                    "call": layer.call,
                    "leaks": list(layer.leaks),
                    "amount": _number(layer.amount),
                    "relative": _number(layer.relative),
                    "profile": [_number(value) for value in np.asarray(layer.profile).tolist()],
                }
                for layer in self.layers
            ],
        }

    def summarize(self) -> str:
        """One sentence."""
        sizes = f"{_sizes(self.before)} → {_sizes(self.after)} positions"
        head = f"{printable(self.source)}, {sizes}, {plural(self.compared, 'layer call')} compared"
        if self.first is None:
            return f"{head}: no leak"
        count = plural(len(self.leaks), "layer")
        verb = "leaks" if len(self.leaks) == 1 else "leak"
        return f"{head}: {count} {verb}, first {printable(self.first.title)}"

    def __str__(self) -> str:
        lines = [self.summarize()]
        for counts, group in self.groups():
            for leak in group:
                line = f"{printable(leak.title)} {leak.movement}. {leak.cause}"
                lines.append(f"  {'leak' if counts else 'note'}  {line}")
            lines.append(f"        {group[0].remedy}")
        lost = [layer.name for layer in self.layers if layer.relative is None and not layer.inner]
        if lost:
            lines.append(
                f"  note  not compared, positions unknown: {list_names(sorted(set(lost)))}"
            )
        return "\n".join(lines)


def _sizes(sizes: tuple[int, ...]) -> str:
    return " × ".join(f"{size:,}" for size in sizes)


def _plain(leak: dict[str, Any]) -> dict[str, Any]:
    leak["relative"] = _number(leak["relative"])
    leak["amounts"] = [_number(amount) for amount in leak["amounts"]]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in leak.items()}


def _number(value: float | None) -> float | None:
    return float(value) if value is not None and np.isfinite(value) else None
