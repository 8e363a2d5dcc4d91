"""Merging of moments by count (S14)."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.core.moments import Moments, centre, merge_moments, unbiased_factor
from batchnorm.core.normalize import normalized, rstd_of, rstd_of_running
from batchnorm.numpy_namespace import XP


@pytest.mark.parametrize("offset", [0.0, 1e6])
@pytest.mark.parametrize("sizes", [(5,), (3, 4), (1, 1, 1), (0, 4), (4, 0, 0), (7, 1, 0, 2)])
def test_merged_parts_equal_the_whole(sizes: tuple[int, ...], offset: float) -> None:
    rng = np.random.default_rng(0)
    parts = [rng.normal(offset, 1.0, (n, 3)) for n in sizes]
    moments = [centre(p, None, (0,), eps=1e-5, xp=XP).moments for p in parts]
    merged = merge_moments(Moments(*map(np.stack, zip(*moments, strict=True))), 0, XP)
    whole = np.concatenate(parts)
    assert merged.count.tolist() == [[len(whole)] * 3]
    # A mean at this offset is rounded to 1e-10; the variance sees that squared.
    np.testing.assert_allclose(merged.mean[0], whole.mean(axis=0), rtol=1e-15)
    np.testing.assert_allclose(merged.var[0], whole.var(axis=0), rtol=1e-9, atol=1e-18)


def test_merging_nothing_gives_zeros() -> None:
    empty = Moments(*(np.zeros((2, 3)) for _ in range(3)))
    assert [m.tolist() for m in merge_moments(empty, 0, XP)] == [[0.0] * 3] * 3


@pytest.mark.parametrize(
    ("correction", "expected"), [(0, [1.0, 1.0, 1.0, 1.0]), (1, [1.0, 1.0, 2.0, 1.25])]
)
def test_unbiased_factor_is_1_where_there_are_too_few_rows(
    correction: int, expected: list[float]
) -> None:
    with np.errstate(all="raise"):
        factor = unbiased_factor(np.array([0.0, 1.0, 2.0, 5.0]), correction, XP)
    assert factor.tolist() == expected


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e18])
def test_float32_moments_are_accurate_at_any_scale(scale: float) -> None:
    x = (np.random.default_rng(0).normal(size=(1000, 2)) * scale).astype(np.float32)
    found = centre(x, None, (0,), eps=1e-5, xp=XP).moments
    assert found.var.dtype == np.float32
    exact = x.astype(np.float64)
    np.testing.assert_allclose(found.var[0], exact.var(axis=0), rtol=5e-6)
    np.testing.assert_allclose(found.mean[0], exact.mean(axis=0), atol=5e-6 * scale)


@pytest.mark.parametrize("value", [0.0, 0.1, 123.4, 1e6, 1e18])
def test_a_constant_has_no_deviation_whatever_its_size(value: float) -> None:
    x = np.full((1000, 2), value, np.float32)
    centred = centre(x, None, (0,), eps=1e-5, xp=XP)
    xhat = normalized(centred, rstd_of(centred, eps=1e-5, correction=0, xp=XP))
    # Above 1e6 a part of the anchor's own rounding remains.
    assert np.abs(xhat).max() <= 5e-6 + (1e-3 if value > 1e6 else 0.0)
    assert (centred.var <= 1e-11 * np.square(np.float64(value))).all()


@pytest.mark.parametrize("kind", [np.float32, np.float64])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_a_constant_without_eps_is_multiplied_by_0(kind: type, value: float) -> None:
    centred = centre(np.full((4, 1), value, kind), None, (0,), eps=0.0, xp=XP)
    assert rstd_of(centred, eps=0.0, correction=0, xp=XP).item() == 0.0


@pytest.mark.parametrize("deviation", [2.0**-510, 2.0**-400, 1e-20, 1.0, 1e20])
def test_deviations_with_a_finite_reciprocal_count(deviation: float) -> None:
    centred = centre(np.array([[-deviation], [deviation]]), None, (0,), eps=0.0, xp=XP)
    rstd = rstd_of(centred, eps=0.0, correction=0, xp=XP)
    assert rstd.item() == pytest.approx(1.0 / deviation, rel=1e-12)


def test_smaller_ones_are_constants() -> None:
    centred = centre(np.array([[-(2.0**-513)], [2.0**-513]]), None, (0,), eps=0.0, xp=XP)
    assert rstd_of(centred, eps=0.0, correction=0, xp=XP).item() == 0.0


@pytest.mark.parametrize(
    ("var", "rstd"), [(0.0, 0.0), (2.0**-1022, 0.0), (2.0**-1020, 2.0**510), (0.25, 2.0)]
)
def test_reciprocal_of_running_deviations(var: float, rstd: float) -> None:
    assert rstd_of_running(np.array([var]), eps=0.0, xp=XP).item() == rstd
    assert np.isnan(rstd_of_running(np.array([np.nan]), eps=0.0, xp=XP)).all()
