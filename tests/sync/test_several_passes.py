"""Synchronized layers in blocks: several passes as one step, and passes without an update."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from batchnorm.torch import BatchNorm, accumulate_statistics, keep_statistics
from processes import results

OPTIONS = {
    "kernels": {},
    "plain": {"fused": False},
    "ghost": {"virtual_batch_size": 2, "fused": False},
    "renorm": {"renorm": True},
    "debias": {"debias": True},
}


def part(rank: int, micro: int) -> tuple[Tensor, Tensor]:
    """A rank's micro-batch, of a size of its own, and its mask."""
    generator = torch.Generator().manual_seed(10 * rank + micro)
    x = torch.randn(2 + 2 * rank, 3, 8, generator=generator) * (1 + micro) + 1e4
    return x, torch.rand(len(x), 8, generator=generator) < 0.8


def accumulate(rank: int, size: int, option: dict, compiled: bool) -> tuple[dict, dict]:
    """The statistics by one merge at the end, and by a merge in each pass."""
    torch._dynamo.reset()
    found = []
    for synchronized in (True, False):
        layer = BatchNorm(3, synchronized=synchronized, momentum=0.5, **option)
        call = torch.compile(layer, backend="aot_eager") if compiled else layer
        parts = [part(rank, micro) for micro in range(3)]
        if not synchronized:  # what all ranks see, in one process
            parts = [part(r, micro) for micro in range(3) for r in range(size)]
        with accumulate_statistics(layer):
            for x, mask in parts:
                call(x, mask)
        found.append(layer.state_dict())
    return tuple(found)


@pytest.mark.parametrize(
    ("option", "compiled"),
    [(option, False) for option in OPTIONS.values()]
    + [(OPTIONS["plain"], True), pytest.param({}, True, marks=pytest.mark.exhaustive)],
    ids=[*OPTIONS, "compiled", "compiled-default"],
)
def test_a_merge_in_each_pass_is_one_at_the_end(worlds, option, compiled):
    world = worlds[2]
    given = [(rank, 2, option, compiled) for rank in range(2)]
    for merged, alone in results(world.run(accumulate, given)):
        torch.testing.assert_close(merged, alone, rtol=5e-6, atol=1e-6)


def keep(rank: int, size: int) -> tuple[Tensor, Tensor, dict]:
    layer = BatchNorm(3, synchronized=True)
    x, _ = part(rank, 0)
    with keep_statistics():
        y = layer(x)
    kept = {name: a.clone() for name, a in layer.state_dict().items()}
    return y.detach(), layer(x).detach(), kept


def test_ranks_merge_without_an_update_too(worlds):
    for y, again, kept in results(worlds[2].run(keep, [(rank, 2) for rank in range(2)])):
        assert torch.equal(y, again)
        assert kept["num_batches_tracked"] == 0
        assert not kept["running_mean"].any()
