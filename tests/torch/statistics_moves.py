"""Measurements of what a transformation does to a layer's statistics, in words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm1d

Case = Callable[[BatchNorm1d, Tensor], str]
CASES: list[tuple[str, str, Case]] = []


def row(name: str, **cases: Case) -> None:
    """Add the cases of one row."""
    CASES.extend((name, case, run) for case, run in cases.items())


def moves(buffers: dict[str, Tensor], x: Tensor) -> str:
    """The number of times that statistics have moved by x, in words."""
    mean, batches = buffers["running_mean"], buffers["num_batches_tracked"]
    for n, words in enumerate(("stay", "move once", "move twice")):
        expected = (1 - 0.5**n) * x.detach().mean(-2)
        if bool((batches == n).all()) and torch.allclose(mean, expected, atol=1e-5):
            return words
    return f"mean {mean}, {batches} batches"


def moves_of(module: nn.Module, x: Tensor) -> str:
    return moves(dict(module.named_buffers()), x)


def after(run: Callable[[BatchNorm1d, Tensor], Any]) -> Case:
    """The words about the layer's own statistics after a run."""

    def case(layer: BatchNorm1d, x: Tensor) -> str:
        run(layer, x)
        return moves_of(layer, x)

    return case


def refusal(run: Callable[[BatchNorm1d, Tensor], Any], remedy: str) -> Case:
    """An error that names the remedy and leaves the statistics alone."""

    def case(layer: BatchNorm1d, x: Tensor) -> str:
        with pytest.raises(RuntimeError, match=rf"^BatchNorm1d: running statistics.*{remedy}"):
            run(layer, x)
        assert moves_of(layer, x) == "stay"
        return "error"

    return case


def clones(layer: nn.Module) -> dict[str, Tensor]:
    return {name: a.clone() for name, a in layer.named_buffers()}


def stacked(layer: nn.Module, n: int = 4) -> dict[str, Tensor]:
    return {name: torch.stack([a] * n) for name, a in layer.named_buffers()}


def slices(x: Tensor) -> Tensor:
    return torch.stack([x, x + 1, x + 2, x + 3])
