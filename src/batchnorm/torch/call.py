"""The record of a call."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from batchnorm.core import config
from batchnorm.core.layout import Layout
from batchnorm.core.running import Running
from batchnorm.torch.ranks.synchronizer import Participation


class Parameters(NamedTuple):
    """gamma and beta, each per channel or None."""

    weight: Tensor | None
    bias: Tensor | None


class Mode(NamedTuple):
    """What a call does about statistics (S15).

    own_statistics: normalize by the batch's own; training: with ghost batches, renormalization
    and adjustment; update: move the running ones.
    """

    own_statistics: bool
    training: bool
    update: bool


class Call(NamedTuple):
    """A call whose arguments are checked.

    Attributes:
        x, mask, parameters, residual, running: its tensors.
        layout: of x, with the ghost batches that apply.
        options: as in Options.
        adjustment: the one that applies, or None (S13).
        mode: what it does about statistics.
        owner: whose name error messages carry.
        part: how it takes part in synchronization, or None (S14).
    """

    x: Tensor
    mask: Tensor | None
    parameters: Parameters
    residual: Tensor | None
    running: Running | None
    layout: Layout
    options: config.Options
    adjustment: config.Adjustment | None
    mode: Mode
    owner: str
    part: Participation | None

    @property
    def batch(self) -> bool:
        """Whether x is normalized by its own statistics."""
        return self.mode.own_statistics or self.running is None
