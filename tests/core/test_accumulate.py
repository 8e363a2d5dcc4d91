"""Merging the moments of passes (S21), and weights from the first step on (S23)."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchnorm.core.accumulate import average_of_step, contribution, merge_passes
from batchnorm.core.config import Options
from batchnorm.core.merge import Parts
from batchnorm.core.moments import centre
from batchnorm.core.running import (
    LONG_RUNNING,
    Running,
    Scalars,
    average_groups,
    debiased_decay,
    update_running,
)
from batchnorm.numpy_namespace import XP

DTYPES = st.sampled_from([np.float32, np.float64])
ROUNDING = {np.float32: 2.0**-24, np.float64: 2.0**-53}


def parts_of(x: np.ndarray) -> Parts:
    centred = centre(x, None, (0,), eps=1e-5, xp=XP)
    return contribution(average_groups(centred, None, XP), False, False, XP)


def merge(*parts: Parts) -> Parts:
    return merge_passes(
        Parts(*(np.stack(column) for column in zip(*parts, strict=True))), False, XP
    )


def moments(parts: Parts) -> tuple[np.ndarray, ...]:
    count, anchor, shift, scale, power = (np.asarray(a, np.float64) for a in parts)
    return count, anchor + shift, power * scale**2


@given(
    sizes=st.lists(st.integers(0, 40), min_size=3, max_size=5),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    dtype=DTYPES,
    seed=st.integers(0, 2**16),
)
def test_merging_is_associative_and_does_not_depend_on_order(sizes, offset, dtype, seed):
    rng = np.random.default_rng(seed)
    batches = [(rng.normal(size=(n, 2)) * (1 + n) + offset).astype(dtype) for n in sizes]
    parts = [parts_of(x) for x in batches]
    ways = [
        merge(*parts),
        merge(merge(*parts[:2]), *parts[2:]),
        merge(parts[0], merge(*parts[1:])),
        merge(*reversed(parts)),
    ]
    first, *others = (moments(way) for way in ways)
    # Far below the rounding of x, 0.03 at 1e6, a variance is noise: rows of one value.
    var_of = np.maximum(first[2], 1e-3)
    std = np.sqrt(var_of)
    tol = 100 * ROUNDING[dtype]  # of a handful of merges, each of a dozen roundings
    for count, mean, var in others:
        np.testing.assert_array_equal(count, first[0])
        np.testing.assert_array_less(np.abs(mean - first[1]), tol * std)
        np.testing.assert_array_less(np.abs(var - first[2]), tol * var_of)


@given(sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6), seed=st.integers(0, 2**16))
def test_passes_move_what_their_concatenation_does(sizes, seed):
    rng = np.random.default_rng(seed)
    batches = [rng.normal(size=(n, 3)) + 1e6 for n in sizes]
    running = Running(np.zeros((1, 3)), np.ones((1, 3)), np.asarray(4))
    options = Options(unbiased=True)
    found = [
        update_running(running, average_of_step(parts, False, XP), options, (0, 1), XP)
        for parts in (merge(*map(parts_of, batches)), parts_of(np.concatenate(batches)))
    ]
    for a, b in zip(*found, strict=True):
        if a is not None:
            np.testing.assert_allclose(a, b, rtol=1e-9)
    assert found[0].batches == 4 + (sum(sizes) > 0)


@pytest.mark.parametrize("where", [0, 1, 2])
def test_a_pass_that_is_not_finite_keeps_its_channel_from_moving(where):
    rng = np.random.default_rng(0)
    batches = rng.normal(size=(3, 4, 2))
    batches[where, 0, 0] = np.nan
    merged = merge(*map(parts_of, batches))
    assert average_of_step(merged, False, XP).usable.tolist() == [[False, True]]


@given(decay=st.floats(1e-6, 1 - 1e-9), steps=st.integers(1, 60))
def test_weights_are_exact_for_every_decay(decay, steps):
    exact = Fraction(decay)
    expected = float((1 - exact) / (1 - exact**steps))
    scalar = 1 - debiased_decay(decay, steps, Scalars)
    assert scalar == pytest.approx(expected, rel=1e-9, abs=1e-15)
    for dtype in (np.float32, np.float64):
        found = 1 - debiased_decay(decay, np.asarray(steps, dtype), XP)
        assert float(found) == pytest.approx(expected, abs=8 * ROUNDING[dtype])


def test_ends_of_the_range():
    for t in (1, 2, 1000, LONG_RUNNING):
        array = np.asarray(t, np.float32)
        assert debiased_decay(0.0, t, Scalars) == debiased_decay(0.0, array, XP) == 0.0
        assert debiased_decay(1.0, t, Scalars) == debiased_decay(1.0, array, XP) == 1.0
    assert debiased_decay(0.9, 1, Scalars) == 0.0
    assert debiased_decay(0.9, LONG_RUNNING, Scalars) == 0.9
    with np.errstate(divide="ignore"):
        for end in (0.0, 1.0):  # as an array, whose value a tracer does not know
            found = debiased_decay(np.asarray(end, np.float32), np.asarray(5, np.float32), XP)
            assert float(found) == end


def test_ghost_groups_of_all_passes_are_averaged():
    rng = np.random.default_rng(0)
    passes = [rng.normal(size=(5, groups, 2)) * 3 for groups in (2, 3)]
    parts = []
    for x in passes:
        average = average_groups(centre(x, None, (0,), eps=1e-5, xp=XP), 1, XP)
        parts.append(contribution(average, True, True, XP))
    stacked = Parts(*(np.stack(column) for column in zip(*parts, strict=True)))
    step = average_of_step(merge_passes(stacked, True, XP), True, XP)
    groups = np.concatenate(passes, axis=1)
    expected = groups.mean(0).mean(0), groups.var(0, ddof=1).mean(0)
    np.testing.assert_allclose(step.of(step.centred.mean, XP).ravel(), expected[0], rtol=1e-9)
    np.testing.assert_allclose(step.of(step.centred.var, XP).ravel(), expected[1], rtol=1e-9)
    assert step.centred.count.ravel().tolist() == [1.0, 1.0]
