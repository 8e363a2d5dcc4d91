"""Synchronized layers in blocks: several passes as one step, and passes without an update."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.torch import BatchNorm, BatchNorm1d, accumulate_statistics, keep_statistics
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
    + [pytest.param(o, True, marks=pytest.mark.exhaustive) for o in (OPTIONS["plain"], {})],
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


def train_in_parallel(rank: int, size: int, synchronized: bool) -> tuple[dict, dict, list[Tensor]]:
    """A step of two micro-batches: statistics, the expected ones, and gradients."""
    torch.manual_seed(0)
    norm = BatchNorm1d(3, synchronized=synchronized, momentum=0.5)
    model = nn.Sequential(nn.Linear(4, 3), norm)
    whole, parallel = copy.deepcopy(norm), DistributedDataParallel(model)
    generator = torch.Generator().manual_seed(rank)
    first, last = torch.randn(2, 6, 4, generator=generator)
    with accumulate_statistics(parallel):
        with parallel.no_sync():
            parallel(first).square().sum().backward()
        parallel(last).square().sum().backward()
    found = copy.deepcopy(norm.state_dict())
    with keep_statistics():  # here rank 0 sends its buffers to all, as always
        parallel(last + 1.0)
    assert norm.num_batches_tracked == 1
    whole(model[0](torch.cat([first, last])))
    return found, whole.state_dict(), [p.grad for p in model.parameters()]


@pytest.mark.parametrize("synchronized", [False, True])
def test_distributed_data_parallel(worlds, synchronized):
    found = results(worlds[2].run(train_in_parallel, [(r, 2, synchronized) for r in range(2)]))
    for state, expected, gradients in found:
        torch.testing.assert_close(state, expected)
        torch.testing.assert_close(gradients, found[0][2])
