"""Training both networks side by side, and measuring them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.demo import data
from batchnorm.demo.models import NORMS, PointNetwork

BATCH_SIZE = 64
MOST_EXTRA = 96
EXTRAS = (0, 8, 16, 32, 64, 96, 128)


@dataclass
class Measured:
    """What one kind of norm achieved, a value for each seed."""

    accuracy: list[list[float]] = field(default_factory=list)  # by epoch, share of test digits
    mean_error: list[float] = field(default_factory=list)  # worst channel, in standard deviations
    var_error: list[float] = field(default_factory=list)  # worst channel, relative
    moved: list[list[float]] = field(default_factory=list)  # logits, for each of EXTRAS
    seconds: list[float] = field(default_factory=list)  # of training, the median epoch


def run(
    seeds: int, epochs: int, advance: Callable[[], None], *, limit: int | None = None
) -> dict[str, Measured]:
    """Train and measure both kinds of network.

    Args:
        seeds: how many pairs of networks.
        epochs: passes over the training digits.
        advance: called after each epoch of a pair.
        limit: use that many training digits only.
    """
    training, testing = data.load_samples()
    training = training[:limit]
    results = {name: Measured() for name in NORMS}
    for seed in range(seeds):
        models = _pair(seed)
        _train_pair(models, training, testing, seed, epochs, results, advance)
        for name, model in models.items():
            mean_error, var_error = _statistics_error(model, training, seed)
            results[name].mean_error.append(mean_error)
            results[name].var_error.append(var_error)
            results[name].moved.append(_moved(model, testing[:32]))
    return results


def _train_pair(
    models: dict[str, PointNetwork],
    training: list[data.Sample],
    testing: list[data.Sample],
    seed: int,
    epochs: int,
    results: dict[str, Measured],
    advance: Callable[[], None],
) -> None:
    """Epoch by epoch in turn, so that both meet the same load on the machine."""
    optimizers = {n: torch.optim.Adam(m.parameters(), lr=3e-3) for n, m in models.items()}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for result in results.values():
        result.accuracy.append([])
    for epoch in range(epochs):
        for name, model in models.items():
            start = time.perf_counter()
            _train(model, optimizers[name], training, seed=1000 * seed + epoch)
            seconds[name].append(time.perf_counter() - start)
            results[name].accuracy[-1].append(_accuracy(model, testing))
        advance()
    for name, times in seconds.items():
        results[name].seconds.append(statistics.median(times))


def _pair(seed: int) -> dict[str, PointNetwork]:
    """One network of each kind, with the same initial weights."""
    torch.manual_seed(seed)
    models = {name: PointNetwork(norm) for name, norm in NORMS.items()}
    first = next(iter(models.values()))
    for model in models.values():
        model.load_state_dict(first.state_dict())
    return models


def _train(
    model: nn.Module, optimizer: torch.optim.Optimizer, samples: list[data.Sample], seed: int
) -> None:
    model.train()
    for batch in data.batches(samples, BATCH_SIZE, seed, MOST_EXTRA):
        optimizer.zero_grad()
        logits = model(batch.points, batch.mask)
        nn.functional.cross_entropy(logits, batch.labels).backward()
        optimizer.step()


@torch.no_grad()
def _accuracy(model: nn.Module, samples: list[data.Sample]) -> float:
    model.eval()
    batch = data.pad(samples)
    found = model(batch.points, batch.mask).argmax(dim=1)
    return (found == batch.labels).double().mean().item()


@torch.no_grad()
def _statistics_error(
    model: PointNetwork, samples: list[data.Sample], seed: int
) -> tuple[float, float]:
    """How far the first norm's statistics are from those of the real points.

    With the weights held still, so that there is a truth: the statistics start anew and average
    over one pass of padded batches (momentum=None); the truth is taken over every real point of
    the training set, in float64.
    """
    norm: Any = model.norm1
    norm.reset_running_stats()
    norm.momentum = None
    model.train()
    for batch in data.batches(samples, BATCH_SIZE, seed, MOST_EXTRA):
        model(batch.points, batch.mask)
    norm.momentum = 0.1
    points = torch.cat([s.points for s in samples]).double()
    x = points @ model.first.weight.double().T + model.first.bias.double()
    mean, var = x.mean(dim=0), x.var(dim=0)
    mean_error = ((norm.running_mean - mean).abs() / var.sqrt()).max()
    var_error = ((norm.running_var - var).abs() / var).max()
    return mean_error.item(), var_error.item()


@torch.no_grad()
def _moved(model: nn.Module, samples: list[data.Sample]) -> list[float]:
    """Largest change of one sample's training-mode logits as padding is added to its batch."""
    model.train()

    def logits(extra: int) -> Tensor:
        batch = data.pad(samples, extra)
        return model(batch.points, batch.mask)[0]

    still = logits(0)
    return [(logits(extra) - still).abs().max().item() for extra in EXTRAS]
