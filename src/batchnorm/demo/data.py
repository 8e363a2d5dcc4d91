"""Handwritten digits as ragged sets of ink points, and padded batches of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_digits

FEATURES = 3
CLASSES = 10
_TEST_SIZE = 497


class Sample(NamedTuple):
    """One digit: its ink points (x, y, intensity), each about -1 to 1, and its class."""

    points: np.ndarray  # (n, 3) float32
    label: int


class Batch(NamedTuple):
    """Digits padded with zeros to one length."""

    points: np.ndarray  # (N, L, 3) float32
    mask: np.ndarray  # (N, L), True at ink points
    labels: np.ndarray  # (N,)


def load_samples() -> tuple[list[Sample], list[Sample]]:
    """The 1,797 digits that scikit-learn ships, for training and for testing."""
    digits = load_digits()
    samples = [
        Sample(_points(image), int(label))
        for image, label in zip(digits.images, digits.target, strict=True)
    ]
    order = np.random.default_rng(0).permutation(len(samples))
    shuffled = [samples[i] for i in order]
    return shuffled[_TEST_SIZE:], shuffled[:_TEST_SIZE]


def pad(samples: list[Sample], extra: int = 0, multiple: int = 1) -> Batch:
    """A batch as long as its longest sample and `extra` points more, rounded up to a multiple."""
    lengths = np.array([len(s.points) for s in samples])
    longest = -(-(int(lengths.max()) + extra) // multiple) * multiple
    points = np.zeros((len(samples), longest, FEATURES), np.float32)
    for row, sample in zip(points, samples, strict=True):
        row[: len(sample.points)] = sample.points
    mask = np.arange(longest) < lengths[:, None]
    return Batch(points, mask, np.array([s.label for s in samples]))


def batches(
    samples: list[Sample], size: int, seed: int, most_extra: int, multiple: int = 1
) -> Iterator[Batch]:
    """Shuffled batches whose padding varies.

    In a long-tailed data set the longest sample of a batch sets its length. Digits all have
    similar lengths, so a random number of padded points, up to `most_extra`, replaces that sample.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(samples))
    for start in range(0, len(order) - size + 1, size):
        chosen = [samples[i] for i in order[start : start + size]]
        yield pad(chosen, int(rng.integers(0, most_extra + 1)), multiple)


def _points(image: np.ndarray) -> np.ndarray:
    rows, columns = np.nonzero(image)
    values = [columns / 3.5 - 1.0, rows / 3.5 - 1.0, image[rows, columns] / 8.0 - 1.0]
    return np.stack(values, axis=1).astype(np.float32)
