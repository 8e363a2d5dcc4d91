"""Training both networks side by side, and measuring them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib import import_module

import numpy as np

from batchnorm.demo import data
from batchnorm.demo.network import Framework, Network

BATCH_SIZE = 64
MOST_EXTRA = 96
EXTRAS = (0, 8, 16, 32, 64, 96, 128)


@dataclass
class Measured:
    """Results of one kind of norm, one value per seed."""

    accuracy: list[list[float]] = field(default_factory=list)  # by epoch, share of test digits
    mean_error: list[float] = field(default_factory=list)  # worst channel, in standard deviations
    var_error: list[float] = field(default_factory=list)  # worst channel, relative
    moved: list[list[float]] = field(default_factory=list)  # logits, for each of EXTRAS
    seconds: list[float] = field(default_factory=list)  # of training, the median epoch


FRAMEWORKS = ("torch", "jax", "keras")


def load_framework(name: str) -> Framework:
    """One of `FRAMEWORKS`; imports it."""
    found: Framework = import_module(f"batchnorm.demo.{name}_network").FRAMEWORK
    return found


def run(
    framework: Framework,
    seeds: int,
    epochs: int,
    advance: Callable[[], None],
    *,
    limit: int | None = None,
    most_extra: int = MOST_EXTRA,
) -> dict[str, Measured]:
    """Train and measure both kinds of network.

    Args:
        framework: the framework of the networks.
        seeds: number of pairs of networks.
        epochs: passes over the training digits.
        advance: called after each epoch of a pair.
        limit: use that many training digits only.
        most_extra: largest number of padded points beyond a batch's longest digit.
    """
    training, testing = data.load_samples()
    training = training[:limit]
    results = {name: Measured() for name in framework.names}
    for seed in range(seeds):
        networks = dict(zip(framework.names, framework.make_pair(seed), strict=True))

        def batches(number: int) -> Iterator[data.Batch]:
            return data.batches(training, BATCH_SIZE, number, most_extra, framework.multiple)

        _train_pair(networks, batches, testing, seed, epochs, results, advance)
        for name, network in networks.items():
            mean_error, var_error = _statistics_error(network, training, batches(seed))
            results[name].mean_error.append(mean_error)
            results[name].var_error.append(var_error)
            results[name].moved.append(_moved(network, testing[:32]))
    return results


def _train_pair(
    networks: dict[str, Network],
    batches: Callable[[int], Iterator[data.Batch]],
    testing: list[data.Sample],
    seed: int,
    epochs: int,
    results: dict[str, Measured],
    advance: Callable[[], None],
) -> None:
    """Train both in turn, epoch by epoch, so that both meet the same load on the machine."""
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    everything = data.pad(testing)
    for result in results.values():
        result.accuracy.append([])
    for epoch in range(epochs):
        for name, network in networks.items():
            start = time.perf_counter()
            for batch in batches(1000 * seed + epoch):
                network.train(batch)
            seconds[name].append(time.perf_counter() - start)
            right = network.logits(everything, training=False).argmax(axis=1) == everything.labels
            results[name].accuracy[-1].append(float(right.mean()))
        advance()
    for name, times in seconds.items():
        results[name].seconds.append(statistics.median(times))


def _statistics_error(
    network: Network, samples: list[data.Sample], batches: Iterator[data.Batch]
) -> tuple[float, float]:
    """The errors of the first norm's statistics against those of the real points.

    The weights are fixed, so that true statistics exist: those over every real point of the
    training set, in float64. The statistics of padded batches are averaged over one pass.
    """
    found = [network.batch_statistics(batch) for batch in batches]
    found_mean, found_var = (np.mean(a, axis=0) for a in zip(*found, strict=True))
    weight, bias = (a.astype(np.float64) for a in network.first_layer())
    x = np.concatenate([s.points for s in samples]).astype(np.float64) @ weight + bias
    mean, var = x.mean(axis=0), x.var(axis=0)
    mean_error = np.abs(found_mean - mean) / np.sqrt(var)
    return float(mean_error.max()), float((np.abs(found_var - var) / var).max())


def _moved(network: Network, samples: list[data.Sample]) -> list[float]:
    """Largest change of one sample's training-mode logits as padding is added to its batch."""

    def logits(extra: int) -> np.ndarray:
        return network.logits(data.pad(samples, extra), training=True)[0]

    still = logits(0)
    return [float(np.abs(logits(extra) - still).max()) for extra in EXTRAS]
