"""The folding algebra on real linear maps (S19)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from batchnorm.core.fold import fold_into_next, fold_into_previous, inference_affine
from batchnorm.torch import BatchNorm
from batchnorm.torch.namespace import XP

# float64, sums of fewer than 100 products.
TOLERANCE = {"rtol": 1e-11, "atol": 1e-11}

MAPS: dict[str, tuple[nn.Module, tuple[int, ...], dict[str, int]]] = {
    "linear": (nn.Linear(4, 6), (5, 4), {}),
    "conv1d": (nn.Conv1d(4, 6, 3), (2, 4, 9), {}),
    "conv2d": (nn.Conv2d(4, 6, 3, stride=2), (2, 4, 9, 8), {}),
    "conv3d": (nn.Conv3d(4, 6, 2), (2, 4, 4, 5, 3), {}),
    "conv2d_without_bias": (nn.Conv2d(4, 6, 3, bias=False), (2, 4, 9, 8), {}),
    "conv2d_grouped": (nn.Conv2d(4, 6, 3, groups=2), (2, 4, 9, 8), {"groups": 2}),
    "conv2d_depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 9, 8), {"groups": 4}),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 6), {"axis": 1}),
    "transposed_grouped": (
        nn.ConvTranspose2d(4, 6, 3, groups=2),
        (2, 4, 5, 6),
        {"axis": 1, "groups": 2},
    ),
}


def trained(channels: int) -> BatchNorm:
    layer = BatchNorm(channels, dtype=torch.float64).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
            tensor.uniform_(0.5, 2.0, generator=generator)
    return layer


def affine_of(layer: BatchNorm) -> tuple[Any, Any]:
    return inference_affine(
        layer.running_mean, layer.running_var, layer.weight, layer.bias, eps=layer.eps, xp=XP
    )


def with_weights(linear: nn.Module, weight: Any, bias: Any) -> Any:
    parameters = {"weight": weight, "bias": bias}
    if linear.bias is None:
        linear.register_parameter("bias", nn.Parameter(torch.zeros_like(bias)))
    return lambda x: torch.func.functional_call(linear, parameters, (x,))


@pytest.mark.parametrize("name", MAPS)
def test_folding_into_the_map_before(name: str) -> None:
    linear, shape, where = MAPS[name]
    linear = linear.double()
    x = torch.randn(shape, dtype=torch.float64)
    before = linear(x)
    layer = trained(before.shape[1])
    folded = fold_into_previous(linear.weight, linear.bias, *affine_of(layer), **where, xp=XP)
    torch.testing.assert_close(with_weights(linear, *folded)(x), layer(before), **TOLERANCE)


@pytest.mark.parametrize("name", [name for name in MAPS if "transposed" not in name])
def test_folding_into_the_map_behind(name: str) -> None:
    linear, shape, where = MAPS[name]
    linear = linear.double()
    x = torch.randn(shape, dtype=torch.float64)
    layer = trained(shape[1])
    expected = linear(layer(x))
    folded = fold_into_next(linear.weight, linear.bias, *affine_of(layer), **where, xp=XP)
    torch.testing.assert_close(with_weights(linear, *folded)(x), expected, **TOLERANCE)


def test_folding_works_along_any_axis_of_the_weight() -> None:
    weight, bias = torch.randn(4, 6, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    x = torch.randn(5, 4, dtype=torch.float64)  # x @ weight: outputs on axis 1, as in Keras
    layer = trained(6)
    after = fold_into_previous(weight, bias, *affine_of(layer), axis=1, xp=XP)
    torch.testing.assert_close(x @ after.weight + after.bias, layer(x @ weight + bias), **TOLERANCE)
    layer = trained(4)
    before = fold_into_next(weight, bias, *affine_of(layer), axis=0, output_axis=1, xp=XP)
    torch.testing.assert_close(
        x @ before.weight + before.bias, layer(x) @ weight + bias, **TOLERANCE
    )


def test_groups_with_another_output_axis_are_refused() -> None:
    weight = torch.randn(4, 6, 3)
    with pytest.raises(ValueError, match="output_axis=1 and groups=2"):
        fold_into_next(
            weight, None, torch.ones(4), torch.ones(4), axis=0, output_axis=1, groups=2, xp=XP
        )
