"""The report of `recalibrate`."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Recalibrated", "Recalibration", "Untouched"]


@dataclass(frozen=True)
class Recalibrated:
    """A layer with new statistics.

    Args:
        name: its path in the model.
        rows: real rows behind them, in the channel that has most.
        uses: calls of the layer.
        skipped: calls of which a channel was left out, because it was not finite (S9).
        shift: largest change of a mean, in new standard deviations.
    """

    name: str
    rows: int
    uses: int
    skipped: int
    shift: float


@dataclass(frozen=True)
class Untouched:
    """A layer that keeps its statistics.

    Args:
        name: its path in the model.
        reason: for keeping them.
    """

    name: str
    reason: str


@dataclass(frozen=True)
class Recalibration:
    """The layers that `recalibrate` has changed, and those that it has not.

    Args:
        batches: number of batches that this process ran.
        changed: layers with new statistics.
        kept: layers with the old ones.
    """

    batches: int
    changed: tuple[Recalibrated, ...]
    kept: tuple[Untouched, ...]

    def __str__(self) -> str:
        """One line a layer."""
        total = len(self.changed) + len(self.kept)
        lines = [
            f"recalibrated {len(self.changed)} of {total} batch norms from {self.batches} batches"
        ]
        for layer in self.changed:
            skipped = f", {layer.skipped} not finite" if layer.skipped else ""
            lines.append(
                f"  {layer.name}: {layer.rows} rows in {layer.uses} calls{skipped}; "
                f"mean moved by up to {layer.shift:.2g} deviations"
            )
        lines += [f"  {layer.name}: kept, {layer.reason}" for layer in self.kept]
        return "\n".join(lines)
