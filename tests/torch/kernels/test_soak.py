"""A long run with changing shapes holds its memory."""

from __future__ import annotations

import random

import pytest
import torch

import batchnorm
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import recycling
from batchnorm.torch.kernels.recycling import LEAST, RECYCLER

pytestmark = pytest.mark.skipif(not recycling._SERVED, reason="not recycled on this system")
STEPS, PARTS = 100_000, 20
CHANNELS = 16
# Outputs above the size from which on they are recycled, and small ones.
LARGE = [(LEAST // 64 + 512 * i, CHANNELS) for i in range(20)]
SMALL = [(32 * (1 + i), CHANNELS) for i in range(10)] + [(4, CHANNELS, 8, 3 + i) for i in range(10)]


@pytest.fixture
def one_thread():
    """Memory does not depend on threads, whose barriers take most of the time on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def resident():
    return int(recycling._read("/proc/self/statm").split()[1]) * 4096


@pytest.mark.exhaustive
@pytest.mark.timeout(1200)
@pytest.mark.usefixtures("one_thread")
def test_memory_of_a_hundred_thousand_steps_of_changing_shapes():
    draw = random.Random(0)
    inputs = [torch.randn(shape, requires_grad=True) for shape in LARGE + SMALL]
    cotangents = [torch.randn_like(x) for x in inputs]
    layers = [BatchNorm(CHANNELS), BatchNorm(CHANNELS, activation="relu")]
    seen, held = [], []
    for _ in range(PARTS):
        kept = None
        for _ in range(STEPS // PARTS):
            # Most steps are small: a large one takes ten times as long.
            first, count = (0, len(LARGE)) if draw.random() < 0.15 else (len(LARGE), len(SMALL))
            at = first + draw.randrange(count)
            x = inputs[at]
            y = draw.choice(layers)(x)
            if draw.random() < 0.1:  # some outputs outlive the steps that follow
                kept = y.detach()
            y.backward(cotangents[at])
            if draw.random() < 0.5:
                x.grad = None
        del y, kept
        for x in inputs:
            x.grad = None
        assert RECYCLER.held[1] == 0
        seen.append(resident())
        held.append(RECYCLER.held[0])
    most = sum(x.nbytes for x in inputs)
    assert max(held) <= most + 3 * max(x.nbytes for x in inputs)
    # The first parts have met every shape; what they hold may come and go, and must not grow.
    early, late = seen[PARTS // 4 : PARTS // 2], seen[-PARTS // 4 :]
    assert max(late) < 1.05 * max(early), [f"{s / 2**20:.0f}" for s in seen]
    assert batchnorm.release_memory() == held[-1]
