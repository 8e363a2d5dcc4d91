"""Running statistics by hand (S9-S12)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.core.config import Options, Renorm
from batchnorm.core.moments import centre
from batchnorm.core.running import (
    Running,
    average_groups,
    derive_renorm,
    renorm_correction,
    update_running,
)
from batchnorm.numpy_namespace import XP


def step(x: Any, running: Running, options: Options, mask: Any = None) -> Running:
    centred = centre(np.asarray(x, float), mask, (0,), eps=options.eps, xp=XP)
    return update_running(running, average_groups(centred, None, XP), options, (0, 1), XP)


def start(mean: float = 10.0, var: float = 4.0, batches: int | None = None) -> Running:
    count = None if batches is None else np.asarray(batches)
    return Running(np.array([[mean]]), np.array([[var]]), count)


def test_decay_weighs_the_old_value() -> None:
    new = step([[1.0], [3.0]], start(), Options(decay=0.75))
    assert (new.mean.item(), new.var.item()) == (0.75 * 10 + 0.25 * 2, 0.75 * 4 + 0.25 * 1)


def test_unbiased_variance_divides_by_one_less() -> None:
    assert step([[1.0], [3.0]], start(), Options(decay=0.0, unbiased=True)).var.item() == 2.0


def test_unbiased_variance_of_one_row_is_the_biased_one() -> None:
    assert step([[3.0]], start(), Options(decay=0.0, unbiased=True)).var.item() == 0.0


def test_cumulative_average_of_three_batches_is_their_mean() -> None:
    running = start(mean=99.0, var=99.0, batches=0)
    for value in (1.0, 2.0, 6.0):
        running = step([[value - 1], [value + 1]], running, Options(decay=None))
    assert running.batches == 3
    assert running.mean.item() == pytest.approx(3.0, rel=1e-15)
    assert running.var.item() == pytest.approx(1.0, rel=1e-15)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e200])
def test_batch_that_overflows_changes_nothing(bad: float) -> None:
    with np.errstate(all="ignore"):
        new = step([[bad], [-bad]], start(batches=5), Options(decay=0.5))
    assert (new.mean.item(), new.var.item(), new.batches) == (10.0, 4.0, 5)


def test_batch_without_real_rows_changes_nothing() -> None:
    mask = np.zeros((2, 1), bool)
    new = step([[1.0], [3.0]], start(batches=5), Options(decay=None), mask)
    assert (new.mean.item(), new.var.item(), new.batches) == (10.0, 4.0, 5)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_one_bad_ghost_group_keeps_the_others_out(bad: float) -> None:
    x = np.array([[[1.0], [bad]], [[3.0], [1.0]]])  # (v, groups, C)
    running = Running(np.array([[[10.0]]]), np.array([[[4.0]]]), np.asarray(5))
    with np.errstate(all="ignore"):
        average = average_groups(centre(x, None, (0,), eps=1e-5, xp=XP), 1, XP)
        new = update_running(running, average, Options(decay=0.5), (0, 1, 2), XP)
    assert (new.mean.item(), new.var.item(), new.batches) == (10.0, 4.0, 5)


def test_one_updated_channel_counts_the_batch() -> None:
    mask = np.array([[True, False], [True, False]])
    running = Running(np.zeros((1, 2)), np.ones((1, 2)), np.asarray(0))
    new = step([[1.0, 1.0], [3.0, 3.0]], running, Options(decay=0.0), mask)
    assert (new.mean.tolist(), new.batches) == ([[2.0, 0.0]], 1)


def test_renormalization_keeps_a_moving_standard_deviation() -> None:
    running = Running(*(np.array([[a]]) for a in (0.0, 1.0)))
    running = running._replace(
        stddev=np.array([[3.0]]), renorm_mean=np.array([[4.0]]), renorm_stddev=np.array([[5.0]])
    )
    new = step([[0.0], [2.0]], running, Options(eps=0.0, decay=0.5, renorm=Renorm(0.75)))
    # The batch has mean 1 and deviation 1.
    assert (new.mean.item(), new.stddev.item(), new.var.item()) == (0.5, 2.0, 4.0)
    assert (new.renorm_mean.item(), new.renorm_stddev.item()) == (3.25, 4.0)


def test_renormalization_compares_with_no_less_than_the_root_of_eps() -> None:
    centred = centre(np.array([[0.0], [2.0]]), None, (0,), eps=4.0, xp=XP)
    zeros = np.zeros((1, 1))
    running = Running(zeros, zeros, None, zeros, zeros, zeros)
    average = average_groups(centred, None, XP)
    r, d = renorm_correction(average, running, Renorm(), eps=4.0, xp=XP)
    assert r.item() == pytest.approx(np.sqrt(5.0) / 2.0, rel=1e-15)
    assert d.item() == 0.5


def test_renormalization_never_stores_a_negative_variance() -> None:
    zeros = np.zeros((1, 1))
    running = Running(zeros, zeros, None, zeros, zeros, np.ones((1, 1)))
    new = step([[0.0], [2.0]], running, Options(eps=0.5, decay=1.0, renorm=Renorm()))
    assert (new.stddev.item(), new.var.item()) == (0.0, 0.0)


def test_renormalization_starts_from_the_running_statistics() -> None:
    mean, stddev = derive_renorm(np.array([10.0]), np.array([3.0]), eps=1.0, xp=XP)
    assert (mean.item(), stddev.item()) == (10.0, 2.0)
