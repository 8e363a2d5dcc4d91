"""Merging over up to thousands of ranks, simulated in one process (S3, S14)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from batchnorm.core.moments import Moments, merge_moments
from batchnorm.numpy_namespace import XP
from batchnorm.torch.namespace import HOST_OVER_RANKS, OVER_RANKS
from batchnorm.torch.ranks import synchronizer
from batchnorm.torch.ranks.synchronizer import merge_vectors

TOLERANCE = 5e-6  # S3, relative to the standard deviation, for mean and (relative) variance
CHANNELS = 8
SIZES = [2, 16, 128, 1024, 4096]


def make_ranks(size: int, kind: str, offset: float) -> list[np.ndarray]:
    """Each rank's float32 rows, of unequal numbers, some 0; `kind` tells how ranks differ."""
    rng = np.random.default_rng(size)
    counts = rng.integers(0, 40, size)
    counts[0] = 40
    if kind == "drifting":  # ranks differ by many times their own deviation
        centres = offset + 10 * rng.normal(size=(size, CHANNELS))
    else:
        centres = np.full((size, CHANNELS), offset)
    return [
        (c + rng.normal(size=(n, CHANNELS))).astype(np.float32)
        for n, c in zip(counts, centres, strict=True)
    ]


def message(rows: np.ndarray) -> np.ndarray:
    """A rank's message: count, means, variances in float64."""
    wide = rows.astype(np.float64)
    if len(rows) == 0:
        return np.zeros(2 * CHANNELS + 1)
    return np.concatenate([[len(rows)], wide.mean(0), wide.var(0)])


def exact(ranks: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Mean and variance of all rows, centred twice in extended precision."""
    rows = np.concatenate(ranks).astype(np.longdouble)
    mean = rows.mean(0)
    mean = mean + (rows - mean).mean(0)
    return mean, np.square(rows - mean).mean(0)


def merge(ranks: list[np.ndarray]) -> np.ndarray:
    parts = torch.from_numpy(np.stack([message(rows) for rows in ranks]))
    return merge_vectors(parts, CHANNELS, False).numpy()


def errors(ranks: list[np.ndarray]) -> tuple[float, float]:
    """Of the mean in standard deviations, of the variance relatively."""
    count, mean, var = np.split(merge(ranks), [1, 1 + CHANNELS])
    true_mean, true_var = exact(ranks)
    assert count == sum(map(len, ranks))
    off = np.abs(mean - true_mean) / np.sqrt(true_var), np.abs(var - true_var) / true_var
    return float(off[0].max()), float(off[1].max())


@pytest.mark.parametrize("offset", [0.0, 1e3, 1e6])
@pytest.mark.parametrize("kind", ["alike", "drifting"])
@pytest.mark.parametrize("size", SIZES)
def test_merge_error_stays_within_tolerance(size: int, kind: str, offset: float) -> None:
    of_mean, of_var = errors(make_ranks(size, kind, offset))
    assert of_mean < TOLERANCE / 100  # float64 leaves room for everything that follows
    assert of_var < TOLERANCE / 100


def test_averaging_local_moments_would_not() -> None:
    """A merge without counts and spread fails, which shows that the test above can fail."""
    ranks = [rows for rows in make_ranks(128, "drifting", 1e3) if len(rows)]
    _, true_var = exact(ranks)
    averaged = np.mean([rows.astype(np.float64).var(0) for rows in ranks], axis=0)
    assert (np.abs(averaged - true_var) / true_var).max() > 0.5


def test_float32_messages_would_not() -> None:
    ranks = make_ranks(4096, "alike", 1e6)
    true_mean, true_var = exact(ranks)
    parts = np.stack([message(rows) for rows in ranks]).astype(np.float32).astype(np.float64)
    found = merge_vectors(torch.from_numpy(parts), CHANNELS, False).numpy()
    off = np.abs(found[1 : 1 + CHANNELS] - true_mean) / np.sqrt(true_var)
    assert off.max() > TOLERANCE


@pytest.mark.parametrize("size", [*SIZES, 3, 1023])
def test_order_is_a_fixed_tree_over_ranks(size: int) -> None:
    """The same bits as a loop that adds two numbers at a time, on any machine and thread count."""
    ranks = make_ranks(size, "alike", 1e6)
    parts = np.stack([message(rows) for rows in ranks])
    weighted = parts[:, :1] / parts[:, 0].sum() * parts[:, 1 : 1 + CHANNELS]
    terms = list(weighted)
    while len(terms) > 1:
        half = len(terms) // 2
        rest = terms[2 * half :]
        terms = [terms[i] + terms[half + i] for i in range(half)] + rest
    before = torch.get_num_threads()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        assert np.array_equal(merge(ranks)[1 : 1 + CHANNELS], terms[0])
    torch.set_num_threads(before)


@pytest.mark.parametrize("pooled", [False, True])
@pytest.mark.parametrize("size", [3, 1024])
def test_numpy_and_torch_merge_to_the_same_bits(size: int, pooled: bool) -> None:
    """Ranks on a GPU merge in torch, those on a CPU in numpy."""
    parts = np.stack([message(rows) for rows in make_ranks(size, "drifting", 1e6)])
    on_host = synchronizer._merge_rows(parts, CHANNELS, pooled, HOST_OVER_RANKS)
    rows = torch.from_numpy(parts)
    elsewhere = synchronizer._merge_rows(rows, CHANNELS, pooled, OVER_RANKS)
    for one, other in zip(on_host, elsewhere, strict=True):
        assert np.array_equal(one, other.numpy())


@pytest.mark.parametrize("size", [16, 4096])
def test_a_tree_of_merges_is_as_exact(size: int) -> None:
    """Merge within nodes of 16 ranks, then the nodes, as a hierarchy of groups would."""
    ranks = make_ranks(size, "alike", 1e6)
    parts = np.stack([message(rows) for rows in ranks])
    counts = parts[:, :1] + np.zeros(CHANNELS)
    level = Moments(counts, parts[:, 1 : 1 + CHANNELS], parts[:, 1 + CHANNELS :])
    while len(level.count) > 1:
        nodes = Moments(*(a.reshape(16, -1, CHANNELS) for a in level))
        level = merge_moments(nodes, 0, XP)
    true_mean, true_var = exact(ranks)
    assert (np.abs(level.mean[0] - true_mean) / np.sqrt(true_var)).max() < TOLERANCE / 100
    assert (np.abs(level.var[0] - true_var) / true_var).max() < TOLERANCE / 100
