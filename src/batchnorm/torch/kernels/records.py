"""One step of the kernels, and the tensors of its backward step, as records."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.running import Running
from batchnorm.torch.kernels.decision import Decision
from batchnorm.torch.ranks.synchronizer import Participation


class KernelStep:
    """All that the kernels need for a step beside the tensors that gradients flow to.

    Attributes:
        decision: about such steps.
        mask, running: the tensors as `arrange` returns them, or None.
        state: the per-channel tensors as the kernels take them.
        options: as in Options.
        batch: normalize by the batch's own statistics.
        update: move the running ones.
        residual: one is added before the activation.
        part: of a step whose statistics are merged with other ranks', or None.
        remembered: for recomputation, since renormalization applies.
        simple: on the CPU, of x alone (no mask, residual, renormalization or other ranks), without
            activation.
        written: of a simple step, the statistics that it moves.
        y: the output, if it is filled before autograd records it; or None.
        kept: the kernels' record for the backward step.
    """

    __slots__ = (
        "batch",
        "decision",
        "kept",
        "mask",
        "options",
        "part",
        "remembered",
        "residual",
        "running",
        "simple",
        "state",
        "update",
        "written",
        "y",
    )

    def __init__(
        self,
        decision: Decision,
        mask: Tensor | None,
        running: Running | None,
        state: Any,
        options: config.Options,
        batch: bool,
        update: bool,
        residual: bool,
        part: Participation | None = None,
    ) -> None:
        self.decision = decision
        self.mask = mask
        self.running = running
        self.state = state
        self.options = options
        self.batch = batch
        self.update = update
        self.residual = residual
        self.part = part
        self.remembered = self.simple = False
        self.written: list[Tensor] = []
        self.y: Tensor | None = None
        self.kept: Any = None

    @property
    def renormalizes(self) -> bool:
        """True if renormalization applies (S11)."""
        return self.options.renorm is not None and self.batch and self.running is not None


class Rows(NamedTuple):
    """Tensors of x's shape that a backward step reads, and the mask; y only if it is needed."""

    dy: Tensor
    x: Tensor
    y: Tensor | None
    mask: Tensor | None


class Gradients(NamedTuple):
    """Gradients of a step, None where they are not wanted."""

    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None


class Wanted(NamedTuple):
    """Which gradients a backward step computes; weight's and bias's by their types."""

    x: bool
    weight: torch.dtype | None
    bias: torch.dtype | None
    residual: bool  # where it is not dy itself (`changes_dy`)


def changes_dy(options: config.Options, masked: bool) -> bool:
    """True if a step's residual gets another gradient than dy (S4, S18)."""
    return options.activation is not None or (masked and options.zero_padding)
