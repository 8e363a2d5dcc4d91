"""A problem's tensors in torch, and layers with its parameters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem
from batchnorm.torch import BatchNorm

__all__ = ["Job", "pick_layer", "place"]

_LAYERS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


@dataclass(frozen=True, eq=False)
class Job:
    """A problem's tensors, in memory that torch allocated, and the layers on them.

    Attributes:
        problem: the source of the tensors.
        device: of the tensors.
        fused: option of this library's layers.
        x, dy, residual, mask, real: as in `Problem`.
    """

    problem: Problem
    device: str
    fused: bool | None
    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    real: Tensor | None

    @property
    def case(self) -> Case:
        """The problem's case."""
        return self.problem.case

    def load(self, layer: Any) -> Any:
        """The layer with the problem's parameters and statistics, in the case's mode."""
        layer = layer.to(self.device)
        p = self.problem
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(p.gamma))
            layer.bias.copy_(torch.from_numpy(p.beta))
            layer.running_mean.copy_(torch.from_numpy(p.mean))
            layer.running_var.copy_(torch.from_numpy(p.var))
        return layer.train(self.case.mode == "training")

    def ours(self, padded_output: str = "normalize") -> BatchNorm:
        """This library's layer."""
        case = self.case
        layer = BatchNorm(
            case.channels,
            case.eps,
            axis=1,
            activation=case.activation,
            padded_output=padded_output,
            fused=self.fused,
        )
        return self.load(layer)

    def theirs(self) -> Any:
        """torch's own layer."""
        case = self.case
        return self.load(pick_layer(len(case.shape))(case.channels, case.eps))


def pick_layer(rank: int) -> Any:
    """torch's layer for inputs of that rank.

    Raises:
        ValueError: there is none.
    """
    if rank not in _LAYERS:
        raise ValueError(f"bench: torch has batch norms for 2 to 5 axes; got a shape of {rank}.")
    return _LAYERS[rank]


def place(problem: Problem, device: str, fused: bool | None) -> Job:
    """The problem's tensors on a device.

    Args:
        problem: the source of the tensors.
        device: of the tensors.
        fused: option of this library's layers.
    """
    case = problem.case
    memory = torch.channels_last if case.channels_last else torch.contiguous_format
    dtype = getattr(torch, case.dtype)

    def copy(a: Any) -> Any:
        if a is None:
            return None
        made = torch.empty(a.shape, dtype=dtype, device=device, memory_format=memory)
        return made.copy_(torch.from_numpy(a))

    mask = real = None
    if problem.mask is not None:
        mask = torch.tensor(problem.mask, device=device)
        real = mask.unsqueeze(1)
    x, dy, residual = (copy(a) for a in (problem.x, problem.dy, problem.residual))
    return Job(problem, device, fused, x, dy, residual, mask, real)
