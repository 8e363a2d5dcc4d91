"""Layers that show which mask they had."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm, BatchNorm1d, padding_mask


def close(actual: Tensor, expected: Tensor, count: int = 64, depth: int = 1) -> None:
    """Equal up to the rounding of sums of `count` terms, through `depth` layers."""
    bound = 8 * depth * math.sqrt(count) * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def lengths(*sizes: int, total: int = 8) -> Tensor:
    """A mask (N, total) of samples that are real up to their lengths."""
    return torch.arange(total) < torch.tensor(sizes)[:, None]


def mean_of(layer: BatchNorm) -> Tensor:
    """The mean of a layer's last batch, with momentum 1."""
    return layer.running_mean


def last(num_features: int, cls: type = BatchNorm1d, **options) -> BatchNorm:
    """A layer whose running statistics are those of the last batch."""
    return cls(num_features, momentum=1.0, **options)


def seen_at(mask: Tensor, shape: tuple[int, ...], **options) -> Tensor:
    """The mask that a layer uses at this (N, 1, ...) shape: the places where a 1 moves its mean."""
    layer = last(1, BatchNorm)
    count = math.prod(shape)
    x = torch.eye(count, dtype=torch.float64).reshape(count, *shape)
    real = []
    for one in x:
        with padding_mask(mask, **options):
            layer(one)
        real.append(mean_of(layer).item() > 0)
    return torch.tensor(real).reshape(shape)[:, 0]


class Probe(nn.Module):
    """A layer in evaluation that notes which rows it takes as real: those with a gradient."""

    def __init__(self, channels: int = 1, axis: int = 1) -> None:
        super().__init__()
        self.norm = BatchNorm(channels, eps=0.0, axis=axis).eval()  # the identity

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        (dx,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
        self.real = (dx != 0).any(self.norm.axis)
        return y


def seen_by(norm_shape: tuple[int, ...], masks: object, axis: int = 1, **options) -> Tensor:
    """The mask that a layer uses for an input of this shape."""
    probe = Probe(norm_shape[axis], axis)
    with padding_mask(masks, **options):
        probe(torch.ones(norm_shape, requires_grad=True))
    return probe.real
