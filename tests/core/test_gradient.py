"""Gradients against sums written out (S8)."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
import pytest

from batchnorm.core.gradient import gradient
from batchnorm.core.normalize import Affine
from batchnorm.numpy_namespace import XP

ROWS, CHANNELS = 6, 2
MASK = np.array([[True], [False], [True], [True], [False], [True]])


def draw(*shape: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).uniform(0.5, 1.5, shape)


def affine(given: tuple[bool, ...]) -> Affine:
    """Operations of which some are None."""
    shapes = [*[(1, CHANNELS)] * 4, *[(ROWS, CHANNELS)] * 2]
    arrays = [draw(*shape, seed=i) for i, shape in enumerate(shapes)]
    return Affine(*(a if g else None for a, g in zip(arrays, given, strict=True)))


def every(a: Any, default: float) -> np.ndarray:
    return np.broadcast_to(default if a is None else a, (ROWS, CHANNELS))


# gamma, beta, then renormalization and adjustment, of which each is there whole or not at all.
GIVEN = [(a, a, r, r, s, s) for a, r, s in product((False, True), repeat=3)]


@pytest.mark.parametrize("own", [False, True], ids=["constant statistics", "own statistics"])
@pytest.mark.parametrize("given", GIVEN, ids=str)
def test_gradients_are_the_sums_of_the_specification(given: tuple[bool, ...], own: bool) -> None:
    after = affine(given)
    dy, xhat = draw(ROWS, CHANNELS, seed=7), draw(ROWS, CHANNELS, seed=8)
    rstd = draw(1, CHANNELS, seed=9)
    count = np.full((1, CHANNELS), 4.0) if own else None
    found = gradient(dy, xhat, rstd, count, MASK, after, (0,), (0,), correction=1, xp=XP)

    gamma, r, s = (every(a, 1.0) for a in (after.gamma, after.r, after.s))
    d, t = every(after.d, 0.0), every(after.t, 0.0)
    real = [i for i in range(ROWS) if MASK[i, 0]]
    expected = np.zeros((ROWS, CHANNELS))
    for c in range(CHANNELS):
        z = [(xhat[i, c] * r[i, c] + d[i, c]) * s[i, c] + t[i, c] for i in real]
        g = [dy[i, c] * gamma[i, c] * s[i, c] * r[i, c] for i in real]
        mean = sum(g) / 4.0 if own else 0.0
        along = sum(a * xhat[i, c] for a, i in zip(g, real, strict=True)) / 3.0 if own else 0.0
        for a, i in zip(g, real, strict=True):
            expected[i, c] = rstd[0, c] * (a - mean - xhat[i, c] * along)
        dgamma = sum(dy[i, c] * a for i, a in zip(real, z, strict=True))
        np.testing.assert_allclose(found.dgamma[0, c], dgamma, rtol=1e-13)
        np.testing.assert_allclose(found.dbeta[0, c], sum(dy[i, c] for i in real), rtol=1e-13)
    np.testing.assert_allclose(found.dx, expected, rtol=1e-12, atol=1e-14)
