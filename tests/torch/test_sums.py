"""Sums of a fixed order (S17), as sums and under every transformation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck, gradgradcheck
from torch.func import jacfwd, jacrev, vmap

from batchnorm.torch import BatchNorm, sums


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the fixed tree of additions for inputs of any size."""
    monkeypatch.setattr(sums, "SERIAL", 2)


def normalize(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    layer = BatchNorm(3, track_running_stats=False, dtype=torch.float64)
    return torch.func.functional_call(layer, {"weight": weight, "bias": bias}, (x,))


def arguments() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = ((5, 3, 2), (3,), (3,))
    return tuple(
        torch.randn(size, generator=generator, dtype=torch.float64).requires_grad_()
        for size in sizes
    )


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (8, 3), (1023, 2), (5, 1, 9), (2, 3, 4, 5)])
@pytest.mark.parametrize("axes", [(0,), (0, -1)])
@pytest.mark.usefixtures("always")
def test_sum_is_the_sum(shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    x = torch.randint(-100, 100, shape).double()
    found = sums.sum_axes(x, tuple(a % len(shape) for a in axes))
    assert torch.equal(found, x.sum(dim=axes, keepdim=True))


def test_sum_leaves_its_argument_alone() -> None:
    x = torch.ones(2**17, 1)
    sums.sum_axes(x, (0,))
    assert (x == 1).all()


def test_empty_sum_is_zero() -> None:
    assert sums.sum_axes(torch.zeros(0, 3), (0,)).tolist() == [[0.0, 0.0, 0.0]]


def test_large_sum_is_accurate() -> None:
    x = torch.rand(2**20, 1)
    assert abs(sums.sum_axes(x, (0,)).item() / x.double().sum().item() - 1) < 2**-22


@pytest.mark.usefixtures("always")
def test_derivatives_of_first_and_second_order() -> None:
    assert gradcheck(normalize, arguments())
    assert gradgradcheck(normalize, arguments())


@pytest.mark.usefixtures("always")
def test_forward_and_reverse_mode_agree() -> None:
    reverse, forward = (jac(normalize, (0, 1))(*arguments()) for jac in (jacrev, jacfwd))
    for a, b in zip(reverse, forward, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.usefixtures("always")
def test_vmap_equals_a_loop() -> None:
    _, weight, bias = arguments()
    xs = torch.randn(4, 5, 3, 2, dtype=torch.float64)
    found = vmap(normalize, (0, None, None))(xs, weight, bias)
    expected = torch.stack([normalize(x, weight, bias) for x in xs])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
