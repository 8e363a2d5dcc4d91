"""Population statistics over ranks: of all batches together, or unchanged on every rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchnorm.tools import recalibrate
from batchnorm.torch import SynchronizationError
from processes import World

SIZES = ((2, 30), (7,))  # rows in the batches of each rank


def batches_of(rank: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(rank)
    return [torch.randn(n, 3, generator=generator) * (rank + 1) + rank for n in SIZES[rank]]


def run_rank(break_rank: int | None) -> tuple[Any, Any, str]:
    rank = dist.get_rank()
    layer = nn.BatchNorm1d(3)

    def call(model: nn.Module, batch: torch.Tensor) -> None:
        model(batch)
        if rank == break_rank:
            raise RuntimeError("no more data")

    error = ""
    try:
        recalibrate(layer, batches_of(rank), call=call, synchronized=True)
    except (RuntimeError, SynchronizationError) as raised:
        error = f"{type(raised).__name__}: {raised}"
    return layer.running_mean.tolist(), layer.running_var.tolist(), error


def test_all_ranks_get_the_statistics_of_all_batches(worlds: dict[int, World]) -> None:
    answers = worlds[2].values(run_rank, None)
    rows = torch.cat([batch for rank in range(2) for batch in batches_of(rank)]).double()
    for mean, var, error in answers:
        assert not error
        # Summed in float64, rounded to float32 once.
        assert mean == pytest.approx(rows.mean(0).tolist(), rel=2.0**-22, abs=1e-7)
        assert var == pytest.approx(rows.var(0).tolist(), rel=2.0**-22)


def test_a_rank_that_fails_leaves_all_ranks_unchanged(worlds: dict[int, World]) -> None:
    (mean, var, other), (*_, own) = worlds[2].values(run_rank, 1)
    assert (mean, var) == ([0.0] * 3, [1.0] * 3)
    assert own == "RuntimeError: no more data"
    assert "SynchronizationError: recalibrate: rank 1 of the process group of 2 ranks" in other
