"""Cases: a shape, the job to do on it, and the bytes that the job has to move."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

__all__ = ["Case", "count_bytes", "count_copied_bytes"]

ELEMENT = {"float32": 4, "bfloat16": 2}
LINE = 64  # bytes that memory hands out at a time


@dataclass(frozen=True)
class Case:
    """One shape and the job to do on it.

    Attributes:
        name: for `--case`, the JSON, the targets and messages.
        title: for readers.
        shape: of x.
        mode: "training" and "evaluation" are steps, forward and backward; "inference" is a
            forward pass in evaluation mode without gradients.
        axis: of the channels.
        eps: added to the variance.
        channels_last: x lies in memory with channels last (torch).
        dtype: of x and y; "float32" or "bfloat16".
        padded: share of rows that a mask excludes, or None for no mask.
        at_end: the padded rows are the last samples, instead of random rows.
        activation: applied after the normalization; None or "relu".
        residual: one is added before the activation.
        turns: a step is two calls, the second one with a sample less.
        reused: steps into kept memory are timed too.
        quick: `--quick` measures it.
        compiled: this library's layer is timed under torch.compile too.
        rival_compiled: and so is the framework's own layer.
        huge: the framework's own layer is timed with huge pages too.
        memory: the memory that a step takes is measured too.
        visits: so is this library's layer in the GPU's other schedule.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    mode: str = "training"
    axis: int = 1
    eps: float = 1e-5
    channels_last: bool = False
    dtype: str = "float32"
    padded: float | None = None
    at_end: bool = False
    activation: str | None = None
    residual: bool = False
    turns: bool = False
    reused: bool = False
    quick: bool = False
    compiled: bool = False
    rival_compiled: bool = False
    huge: bool = True
    memory: bool = False
    visits: bool = False

    @property
    def channels(self) -> int:
        """Number of channels."""
        return self.shape[self.axis]

    @property
    def inference(self) -> bool:
        """True for a forward pass without gradients."""
        return self.mode == "inference"

    @property
    def plain(self) -> bool:
        """True if the framework's own layer does the same by itself."""
        return self.padded is None and self.activation is None

    @property
    def bare(self) -> Case:
        """The case without mask, activation and residual."""
        return replace(self, padded=None, activation=None, residual=False)


def count_bytes(case: Case, mask: Any = None) -> int:
    """Bytes between memory and processor that the job cannot do without.

    A training step reads x for the moments; x, and writes y; dy and x for the sums; dy and x, and
    writes dx. With a mask only y and dx are whole, and so is x for y. Of the rest, lines that
    hold a real row count, and the mask itself, three times. In inference with zeros at padding y
    alone is whole.

    Args:
        case: the job.
        mask: numpy booleans, if its savings count; None counts every row.
    """
    passes: float = {"inference": 2, "evaluation": 6, "training": 8}[case.mode]
    if case.residual:  # the residual, y for its sign twice, and the residual's gradient
        passes += 4
    masks = 0
    if mask is not None:
        read = _share_of_lines(case, mask)
        passes = 1 + read if case.inference else 3 + 5 * read
        masks = int(mask.size) * (1 if case.inference else 3)
    if case.turns:
        passes *= 2 - 1 / case.shape[0]
    return int(passes * math.prod(case.shape) * ELEMENT[case.dtype]) + masks


def count_copied_bytes(case: Case) -> int:
    """Bytes that a copy of x reads and writes."""
    return 2 * math.prod(case.shape) * ELEMENT[case.dtype]


def _share_of_lines(case: Case, mask: Any) -> float:
    """Share of x's lines of memory that hold a real row."""
    if case.channels_last or len(case.shape) == 2:  # a row is lines of its own
        return float(mask.mean())
    together = LINE // ELEMENT[case.dtype]
    return float(mask.reshape(-1, together).any(axis=1).mean())
