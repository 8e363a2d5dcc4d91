"""The experiment's interface to a framework."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, Protocol

import numpy as np

from batchnorm.demo.data import Batch

WIDTH = 64
LEARNING_RATE = 3e-3


class Network(Protocol):
    """Two layers for each point, a maximum over the real points, a classifier; and its optimizer.

    A norm follows each of the two layers. The maximum leaves padding out with either norm, so the
    networks differ only in the norm.
    """

    def train(self, batch: Batch) -> None:
        """One step."""
        ...

    def logits(self, batch: Batch, *, training: bool) -> np.ndarray:
        """Logits (N, 10); by the batch's own statistics where `training`. Changes nothing."""
        ...

    def first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight (3, 64) and bias (64,) in front of the first norm."""
        ...

    def batch_statistics(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """Mean and variance, each (64,), that the first norm finds in a training step's batch."""
        ...


class Framework(NamedTuple):
    """A framework's side of the experiment.

    Attributes:
        names: of the two norms, the framework's own first.
        make_pair: from a seed, a network for each norm, with the same initial weights.
        multiple: padded lengths are multiples of it; more than 1 where each length is compiled.
    """

    names: tuple[str, str]
    make_pair: Callable[[int], tuple[Network, Network]]
    multiple: int = 1
