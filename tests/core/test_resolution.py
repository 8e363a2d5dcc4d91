"""Anchors of strided windows (S5): lengths have the arithmetic of convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.core.resolution import check_per_axis, find_anchors


@pytest.mark.parametrize(
    ("args", "anchors"),
    [
        ((3,), [2, 3, 4, 5, 6]),  # the window's last position
        ((3, 2), [2, 4, 6]),
        ((2, 2), [1, 3, 5]),
        ((3, 1, (1, 1)), [0, 1, 2, 3, 4, 5, 6]),
        ((3, 2, (1, 1)), [0, 2, 4, 6]),
        ((3, 2, (0, 2)), [0, 2, 4, 6]),
        ((3, 2, (2, 0)), [0, 2, 4, 6]),
        ((3, 1, (1, 1), 2), [2, 3, 4, 5, 6]),
        ((1, 2, (2, 2)), [0, 0, 0, 2, 4, 6]),  # two windows before, of padding alone
        ((5, 2, None), [0, 2, 4, 6]),
        ((5, 3, None, 2), [0, 3, 6]),
        ((9,), []),
    ],
    ids=str,
)
def test_by_hand(args: Any, anchors: list[int]) -> None:
    found = find_anchors(*args)
    assert [found.anchor(o) for o in range(found.count(7))] == anchors
    assert [0] * found.clipped + [*range(7)][found.start :: found.stride] == anchors


def test_prefixes_have_the_number_of_outputs_that_they_have_alone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        window, stride, dilation = (int(n) for n in rng.integers(1, 6, 3))
        low, high = (int(n) for n in rng.integers(-1, 8, 2))
        anchors = find_anchors(window, stride, (low, high), dilation)
        outputs = range(anchors.count(20))
        for n in range(1, 21):
            alone = max((n + low + high - dilation * (window - 1) - 1) // stride + 1, 0)
            assert sum(anchors.anchor(o) < n for o in outputs) == anchors.count(n) == alone


@pytest.mark.parametrize(
    ("value", "error", "message"),
    [
        (2.0, TypeError, "window must be an int or one for each axis; got 2.0"),
        (True, TypeError, "window must be an int"),
        ("33", TypeError, "window must be an int"),
        ((3, None), TypeError, "window must be an int"),
        ((3,), ValueError, r"window must be an int or have one for each of the 2 axes .*\(3,\)"),
        ((), ValueError, "window must be an int or have one for each of the 2 axes"),
        ((3, 0), ValueError, r"window must be at least 1; got \(3, 0\)"),
        (-1, ValueError, "window must be at least 1; got -1"),
    ],
)
def test_sizes_that_are_none(value: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        check_per_axis("window", value, 2)


@pytest.mark.parametrize("value", [3, np.int64(3), (3, 3), [3, np.int8(3)]])
def test_sizes(value: Any) -> None:
    assert check_per_axis("window", value, 2) == (3, 3)
