"""A small point network, its batch norm layers exchangeable."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from batchnorm.demo.data import CLASSES, FEATURES
from batchnorm.torch import BatchNorm

WIDTH = 64


class CountsPadding(nn.BatchNorm1d):
    """torch's layer over all points, padding included, as it is used today."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x of shape (N, L, C); the mask is ignored."""
        return super().forward(x.flatten(0, -2)).view_as(x)


def masked_norm(channels: int) -> BatchNorm:
    """This library's layer over (N, L, C), which takes the mask."""
    return BatchNorm(channels, axis=-1)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "torch.nn": CountsPadding,
    "batchnorm": masked_norm,
}


class PointNetwork(nn.Module):
    """Two layers for each point, a maximum over the real points, a classifier.

    The maximum leaves padding out whichever norm is used, so that the norm is all that differs.
    """

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.first, self.norm1 = nn.Linear(FEATURES, WIDTH), norm(WIDTH)
        self.second, self.norm2 = nn.Linear(WIDTH, WIDTH), norm(WIDTH)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, points: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, 10) of points (N, L, 3), real where mask (N, L) is True."""
        x = torch.relu(self.norm1(self.first(points), mask))
        x = torch.relu(self.norm2(self.second(x), mask))
        return self.head(x.masked_fill(~mask[..., None], 0.0).amax(dim=1))
