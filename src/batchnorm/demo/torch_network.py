"""The experiment's networks in PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.demo.data import CLASSES, FEATURES, Batch
from batchnorm.demo.network import LEARNING_RATE, WIDTH, Framework
from batchnorm.torch import BatchNorm


class CountsPadding(nn.BatchNorm1d):
    """torch's layer, which takes no mask: it normalizes over all points, padding included."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Normalize x of shape (N, L, C); the mask is ignored."""
        return super().forward(x.flatten(0, -2)).view_as(x)


def masked_norm(channels: int) -> BatchNorm:
    """This library's layer over (N, L, C), which takes the mask."""
    return BatchNorm(channels, axis=-1)


class PointNetwork(nn.Module):
    """`Network`'s layers."""

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


class TorchNetwork:
    """A `Network`."""

    def __init__(self, model: PointNetwork) -> None:
        self.model = model
        self._optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)

    def train(self, batch: Batch) -> None:
        """One step."""
        self.model.train()
        self._optimizer.zero_grad()
        logits = self.model(*_tensors(batch))
        nn.functional.cross_entropy(logits, torch.from_numpy(batch.labels)).backward()
        self._optimizer.step()

    @torch.no_grad()
    def logits(self, batch: Batch, *, training: bool) -> np.ndarray:
        """Logits; the running statistics are put back."""
        before = {name: a.clone() for name, a in self.model.named_buffers()}
        self.model.train(training)
        found = self.model(*_tensors(batch)).numpy()
        for name, buffer in self.model.named_buffers():
            buffer.copy_(before[name])
        return found

    def first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias in front of the first norm."""
        first = self.model.first
        return first.weight.detach().numpy().T, first.bias.detach().numpy()

    @torch.no_grad()
    def batch_statistics(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """With momentum 1 the running statistics are those of the last batch."""
        norm: Any = self.model.norm1
        points, mask = _tensors(batch)
        norm.momentum = 1.0
        norm.train()(self.model.first(points), mask)
        norm.momentum = 0.1
        return norm.running_mean.numpy().copy(), norm.running_var.numpy().copy()


def make_pair(seed: int) -> tuple[TorchNetwork, TorchNetwork]:
    """A network for each norm, with the same initial weights."""
    torch.manual_seed(seed)
    theirs, ours = PointNetwork(CountsPadding), PointNetwork(masked_norm)
    ours.load_state_dict(theirs.state_dict())
    return TorchNetwork(theirs), TorchNetwork(ours)


def _tensors(batch: Batch) -> tuple[Tensor, Tensor]:
    return torch.from_numpy(batch.points), torch.from_numpy(batch.mask)


FRAMEWORK = Framework(("torch.nn", "batchnorm"), make_pair)
