"""Steps of torch layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.problem import Problem

__all__ = ["EPS", "make_steps", "pack", "pick_layer"]

EPS = 1e-5
_LAYERS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


def pick_layer(rank: int) -> Any:
    """torch's class for inputs of this rank.

    Raises:
        ValueError: it has none.
    """
    if rank not in _LAYERS:
        raise ValueError(f"bench: torch has batch norms for 2 to 5 axes; got a shape of {rank}.")
    return _LAYERS[rank]


def pack(layer: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    """What torch offers for masks: the layer on the real rows, scattered into zeros.

    Args:
        layer: a `torch.nn.BatchNorm1d`.
    """

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        y = torch.zeros(rows.shape, dtype=x.dtype, device=x.device)
        return y.index_put_((mask,), layer(rows[mask])).movedim(-1, 1)

    return forward


def make_steps(problem: Problem) -> dict[str, Callable[[], Any]]:
    """This library's step and torch's, each returning y and, in training, dx."""
    from batchnorm.torch import BatchNorm

    layer = pick_layer(problem.x.ndim)
    ours = BatchNorm(problem.channels, EPS).train(not problem.inference)
    if problem.mask is None or problem.inference:
        theirs = layer(problem.channels, EPS).train(not problem.inference)
        return {
            "batchnorm": _make_step(ours, problem),
            f"torch.nn.{layer.__name__}": _make_step(theirs, problem),
        }
    mask = torch.from_numpy(problem.mask)
    packed = pack(nn.BatchNorm1d(problem.channels, EPS))
    return {
        "batchnorm": _make_step(ours, problem, mask),
        "torch on x[mask], scattered": _make_step(packed, problem, mask),
    }


def _make_step(forward: Any, problem: Problem, *masks: Tensor) -> Callable[[], Any]:
    x, dy = torch.from_numpy(problem.x), torch.from_numpy(problem.dy)
    if problem.inference:

        def infer() -> tuple[Tensor]:
            with torch.no_grad():
                return (forward(x),)

        return infer
    x = x.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor | None]:
        x.grad = None
        y = forward(x, *masks)
        y.backward(dy)
        return y.detach(), x.grad

    return step
