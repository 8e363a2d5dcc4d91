"""Padding is inert (S5): masked equals packed, for all examples that hypothesis generates."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from batchnorm.torch import BatchNorm

# Masked and packed rows are summed in different blocks: a few roundings of float64, over
# deviations that are at least sqrt(eps) = 3e-3 of the unit they are compared in.
TOLERANCE = 1e-10


class Problem(NamedTuple):
    x: Tensor  # (N, L, C)
    mask: Tensor  # (N, L)
    dy: Tensor
    padding: float


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    n, length, channels = (draw(st.integers(1, 6)) for _ in range(3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    offset = draw(st.sampled_from([0.0, 1.0, -1e3, 1e6]))
    x = torch.randn(n, length, channels, generator=generator, dtype=torch.float64) + offset
    dy = torch.randn(n, length, channels, generator=generator, dtype=torch.float64)
    mask = torch.rand(n, length, generator=generator) < draw(st.floats(0, 1))
    padding = draw(st.sampled_from([0.0, 1e18, float("nan"), float("inf")]))
    return Problem(x, mask, dy, padding)


class Step(NamedTuple):
    y: Tensor
    dx: Tensor
    state: list[Tensor]


def step(x: Tensor, dy: Tensor, mask: Tensor | None, **options: object) -> Step:
    layer = BatchNorm(x.shape[-1], axis=-1, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.weight.uniform_(0.5, 2.0, generator=torch.Generator().manual_seed(1))
    x = x.clone().requires_grad_()
    y = layer(x, mask)
    y.backward(dy)
    state = [layer.weight.grad, layer.bias.grad, *layer.buffers()]
    return Step(y.detach(), x.grad, state)


OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "renorm": {"renorm": True},
    "relu": {"activation": "relu"},
}


@pytest.mark.parametrize("option", OPTIONS)
@given(problem=problems())
def test_masked_equals_packed(option: str, problem: Problem) -> None:
    x, mask, dy, padding = problem
    x = torch.where(mask[..., None], x, padding)
    dy = torch.where(mask[..., None], dy, padding)
    masked = step(x, dy, mask, **OPTIONS[option])
    # A packed batch of one row is refused without a mask, and an all-true mask means none (S7).
    every = torch.ones(int(mask.sum()), dtype=torch.bool)
    packed = step(x[mask], dy[mask], every, **OPTIONS[option])
    scale = 1.0 + float(packed.y.abs().max()) if packed.y.numel() else 1.0
    close(masked.y[mask], packed.y, scale)
    close(masked.dx[mask], packed.dx, 400.0)  # rstd is at most 1 / sqrt(eps)
    assert (masked.dx[~mask] == 0).all()
    for found, expected in zip(masked.state, packed.state, strict=True):
        close(found, expected, 1.0 + float(expected.abs().max()))


def close(found: Tensor, expected: Tensor, scale: float) -> None:
    torch.testing.assert_close(found, expected, rtol=0.0, atol=TOLERANCE * scale)


@given(problem=problems(), data=st.data())
def test_ghost_groups_each_equal_their_packed_rows(problem: Problem, data: st.DataObject) -> None:
    x, mask, _, _ = problem
    sizes = [v for v in range(1, len(x) + 1) if len(x) % v == 0]
    size = data.draw(st.sampled_from(sizes))
    layer = BatchNorm(
        x.shape[-1], axis=-1, dtype=torch.float64, affine=False, virtual_batch_size=size
    )
    y = layer(x, mask)
    groups = len(x) // size
    for g in range(groups):
        rows, real = x[g::groups], mask[g::groups]
        alone = BatchNorm(x.shape[-1], axis=-1, dtype=torch.float64, affine=False)
        packed = alone(rows[real], torch.ones(int(real.sum()), dtype=torch.bool))
        close(y[g::groups][real], packed, 1.0 + float(x.shape[1] * size))
