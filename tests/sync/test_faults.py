"""A rank that fails, or runs something else, makes every other rank raise in time (S14)."""

from __future__ import annotations

import copy
import os
import re
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import nn

from batchnorm.torch import BatchNorm2d, SynchronizationError, convert_batchnorm
from processes import World, results
from torch_world import join, make_world, stop

pytestmark = pytest.mark.sample(2)

TIMEOUT = 2.0  # seconds, of the groups
SIZE = 3
BAD = 1  # the rank that misbehaves
LAYER = r"BatchNorm2d #\d+( \(\d+ channels, eps=|: cannot reach)"
GROUP = r"process group of 3 ranks \(0, 1, 2; gloo\)"
WAITED = (
    r"(forward|backward) pass: (waited for (rank [012]|the other ranks) of the process group"
    r"|the ranks of the process group .* do not agree on layer and options)"
    r"|cannot reach the other ranks, since"
)


class Outcome(NamedTuple):
    """The outcome of a test on one rank."""

    error: str | None  # the message of a SynchronizationError
    seconds: float  # from the call that raised to its end
    unchanged: bool  # the statistics of every layer that raised


@pytest.fixture(scope="module")
def patient() -> Iterator[World]:
    """Processes that all survive; each test forms a group of its own."""
    world = make_world(SIZE, TIMEOUT)
    yield world
    world.close()


@pytest.fixture
def world(patient: World) -> World:
    global _generation
    _generation += 1
    patient.values(regroup, _generation)
    return patient


_generation = 0


def regroup(generation: int) -> None:
    stop()
    join(generation)


def expect_errors(world: World, function, *arguments, ranks=range(SIZE)) -> list[Outcome]:
    """Assert that each of `ranks` raises in time, naming layer, group and the awaited rank."""
    answers = world.run(function, [(rank, *arguments) for rank in range(SIZE)])
    outcomes = results([answers[rank] for rank in ranks])
    for rank, outcome in zip(ranks, outcomes, strict=True):
        assert outcome.error is not None, f"rank {rank} went on"
        assert outcome.seconds < TIMEOUT + 1.0, rank
        assert outcome.unchanged, rank
        assert re.search(LAYER, outcome.error), outcome.error
        assert re.search(f"{GROUP}|process group is gone", outcome.error), outcome.error
        assert re.search(WAITED, outcome.error), outcome.error
    return outcomes


def attempt(layers: list[nn.Module], function) -> Outcome:
    """The outcome of `function`, which runs the layers."""
    before = [[b.clone() for b in layer.buffers()] for layer in layers]
    begin = time.monotonic()
    try:
        function()
    except SynchronizationError as error:
        seconds = time.monotonic() - begin
        after = [list(layer.buffers()) for layer in layers]
        same = all(
            torch.equal(a, b)
            for old, new in zip(before, after, strict=True)
            for a, b in zip(old, new, strict=True)
        )
        return Outcome(str(error), seconds, same)
    return Outcome(None, time.monotonic() - begin, False)


def batch(rank: int, channels: int = 4) -> torch.Tensor:
    generator = torch.Generator().manual_seed(rank)
    return torch.randn(2, channels, 3, 3, generator=generator, requires_grad=True)


def make(channels: int = 4, **options) -> BatchNorm2d:
    return BatchNorm2d(channels, synchronized=True, **options)


PATHS = pytest.mark.parametrize("fused", [None, False], ids=["kernels", "plain"])


# A rank that dies


def die_in_forward(rank: int, fused: bool | None) -> Outcome:
    layer = make(fused=fused)
    layer(batch(rank))  # a step that all of them make
    if rank == BAD:
        os._exit(7)
    return attempt([layer], lambda: layer(batch(rank)))


def die_in_backward(rank: int, fused: bool | None) -> Outcome:
    layer = make(fused=fused)
    y = layer(batch(rank))
    if rank == BAD:
        os._exit(7)
    return attempt([layer], y.square().sum().backward)


def notice_death(rank: int, fused: bool | None) -> Outcome:
    """Rank 0 has lost the connection before it begins the step; rank 2 waits for it first."""
    layer = make(fused=fused)
    layer(batch(rank))
    if rank == BAD:
        os._exit(7)
    if rank == 0:
        time.sleep(TIMEOUT / 4)
    return attempt([layer], lambda: layer(batch(rank)))


@PATHS
@pytest.mark.parametrize("function", [die_in_forward, die_in_backward, notice_death])
def test_a_rank_that_dies(function, fused) -> None:
    world = make_world(SIZE, TIMEOUT)
    world.values(join)
    try:
        outcomes = expect_errors(world, function, fused, ranks=(0, 2))
    finally:
        world.close()
    direction = "backward pass" if function is die_in_backward else "forward pass"
    assert all(f"{direction}: waited for rank {BAD} of" in o.error for o in outcomes)


# A rank that leaves a layer out


def skip(rank: int, fused: bool | None, channels: tuple[int, ...], steps: int) -> Outcome:
    """All ranks take some steps together; then one rank leaves the first of two layers out."""
    first, second = make(channels[0], fused=fused), make(channels[1], fused=fused)
    for _ in range(steps):
        first(batch(rank, channels[0]))
        second(batch(rank, channels[1]))

    def step() -> None:
        if rank != BAD:
            first(batch(rank, channels[0]))
        second(batch(rank, channels[1]))

    return attempt([first, second], step)


@pytest.mark.sample(3)
@PATHS
@pytest.mark.parametrize("steps", [0, 3], ids=["at_once", "later"])
@pytest.mark.parametrize("channels", [(4, 4), (4, 8), (8, 4)], ids=["alike", "small", "large"])
def test_a_rank_that_skips_a_layer(world, channels, steps, fused) -> None:
    outcomes = expect_errors(world, skip, fused, channels, steps)
    if steps == 0:  # told at once, not by the timeout
        assert all(outcome.seconds < TIMEOUT for outcome in outcomes)
        assert all("do not agree on layer" in outcome.error for outcome in outcomes)


def skip_backward(rank: int, fused: bool | None) -> Outcome:
    """One rank's loss does not depend on the first layer."""
    first, second = make(4, fused=fused), make(8, fused=fused)
    a, b = first(batch(rank, 4)), second(batch(rank, 8))
    loss = b.square().sum()
    if rank != BAD:
        loss = loss + a.square().sum()
    return attempt([first, second], loss.backward)


@PATHS
def test_a_rank_that_skips_a_backward_pass(world, fused) -> None:
    outcomes = expect_errors(world, skip_backward, fused, ranks=(0, 2))
    assert all("backward pass: waited for rank" in outcome.error for outcome in outcomes)


def skip_everything(rank: int) -> Outcome:
    layer = make()
    layer(batch(rank))
    if rank == BAD:
        return Outcome(None, 0.0, True)
    return attempt([layer], lambda: layer(batch(rank)))


def test_a_rank_that_never_comes(world) -> None:
    outcomes = expect_errors(world, skip_everything, ranks=(0, 2))
    assert all(f"waited for rank {BAD} of" in outcome.error for outcome in outcomes)


# A rank that is set up differently


def differ(rank: int, kind: str, fused: bool | None) -> Outcome:
    channels = 8 if rank == BAD and kind == "channels" else 4
    options = {"eps": 1e-3} if rank == BAD and kind == "eps" else {}
    if rank == BAD and kind == "momentum":
        options = {"momentum": 0.2}
    if rank == BAD and kind == "activation":
        options = {"activation": "relu"}
    if rank == BAD and kind == "virtual_batch_size":
        options = {"virtual_batch_size": 1}
    layer = make(channels, fused=fused, **options)
    return attempt([layer], lambda: layer(batch(rank, channels)))


@PATHS
@pytest.mark.parametrize(
    "kind", ["channels", "eps", "momentum", "activation", "virtual_batch_size"]
)
def test_a_rank_with_another_option(world, kind, fused) -> None:
    outcomes = expect_errors(world, differ, kind, fused)
    for outcome in outcomes:
        assert outcome.seconds < TIMEOUT  # told at once, not by the timeout
        assert "do not agree on layer and options: rank 0: BatchNorm2d" in outcome.error
        assert f"rank {BAD}: BatchNorm2d" in outcome.error


def change(rank: int, kind: str, fused: bool | None) -> Outcome:
    """All ranks take a step together; then one rank is changed."""
    layer, wider, channels = make(fused=fused), make(8, fused=fused), 4
    layer(batch(rank))
    if rank == BAD and kind == "channels":
        wider.name_for_ranks(layer._synchronizer.name)
        layer, channels = wider, 8
    if rank == BAD and kind == "eps":
        layer.eps = 1e-3
    mask = None
    if rank == BAD and kind == "mask":
        mask = torch.ones(2, 4, 3, 3, dtype=torch.bool)
        mask[0, 0, 0, 0] = False
    if rank == BAD and kind == "training":
        layer.eval()
    if rank == BAD and kind == "frozen":
        layer.freeze()
    if rank == BAD and kind in ("training", "frozen"):
        y = layer(batch(rank))  # sends no message, and returns
        return Outcome(None, 0.0, bool(torch.isfinite(y).all()))
    return attempt([layer], lambda: layer(batch(rank, channels), mask))


@pytest.mark.sample(5)
@PATHS
@pytest.mark.parametrize("kind", ["channels", "eps", "mask", "training", "frozen"])
def test_a_rank_that_changes_its_mind(world, kind, fused) -> None:
    ranks = (0, 2) if kind in ("training", "frozen") else range(SIZE)
    outcomes = expect_errors(world, change, kind, fused, ranks=ranks)
    assert any(f"waited for rank {BAD} of" in outcome.error for outcome in outcomes)


# A process group that is gone


def destroy(rank: int, given: bool, fused: bool | None) -> Outcome:
    group = None
    if given:
        group = dist.new_group(range(SIZE), timeout=timedelta(seconds=TIMEOUT))
    layer = make(fused=fused, process_group=group)
    layer(batch(rank))
    if rank == BAD:
        dist.destroy_process_group(group)
    return attempt([layer], lambda: layer(batch(rank)))


@PATHS
@pytest.mark.parametrize("given", [False, True], ids=["default", "given"])
def test_a_destroyed_group(world, given, fused) -> None:
    outcomes = expect_errors(world, destroy, given, fused)
    assert "cannot reach the other ranks" in outcomes[BAD].error
    # The first rank to notice names the rank that left; the other may see the first one's failure.
    assert any(f"waited for rank {BAD} of" in outcomes[r].error for r in (0, 2))
    assert all("waited for rank" in outcomes[r].error for r in (0, 2))


def use_after_failure(rank: int) -> tuple[str, str]:
    layer = make()
    first = skip_everything(rank)
    second = attempt([layer], lambda: layer(batch(rank)))
    return first.error, second.error


def test_a_group_that_has_failed_goes_on_failing(world) -> None:
    errors = world.run(use_after_failure, [(rank,) for rank in range(SIZE)])
    assert all(second is not None for _, second in results(errors))


# Going on from a checkpoint


def train(rank: int, fail_at: int | None, state: dict | None, steps: range) -> dict:
    """Some steps of training; on failure, the state at the latest checkpoint."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3))
    model = convert_batchnorm(model, synchronized=True)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(copy.deepcopy(state["optimizer"]))  # memory all ranks share
    saved = {}
    for step in steps:
        parts = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
        saved = {"step": step, **copy.deepcopy(parts)}
        if step == fail_at and rank == BAD:
            return saved  # its step never happens
        x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(10 * step + rank))
        optimizer.zero_grad()
        try:
            model(x).square().mean().backward()
        except SynchronizationError:
            return saved
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
    return {"model": model.state_dict()}


def test_training_goes_on_from_a_checkpoint(patient) -> None:
    def run(*arguments) -> list[dict]:
        global _generation
        _generation += 1
        patient.values(regroup, _generation)
        return results(patient.run(train, [(rank, *arguments) for rank in range(SIZE)]))

    undisturbed = run(None, None, range(6))
    broken = run(3, None, range(6))
    assert [state["step"] for state in broken] == [3] * SIZE
    again = run(None, broken[0], range(3, 6))
    for one, other in zip(undisturbed, again, strict=True):
        for name, value in one["model"].items():
            torch.testing.assert_close(other["model"][name], value, rtol=0, atol=0)
