"""Anchors of strided windows (S5): lengths have the arithmetic of convolutions."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from batchnorm.core.resolution import check_per_axis, find_anchors


@pytest.mark.parametrize(
    ("args", "outputs", "second"),
    [
        ((3,), 5, (1, 3)),  # all positions of the window
        ((3, 2), 3, (2, 4)),
        ((2, 2), 3, (2, 3)),
        ((3, 1, (1, 1)), 7, (1, 1)),
        ((3, 2, (1, 1)), 4, (2, 2)),
        ((3, 2, (0, 2)), 4, (2, 2)),
        ((3, 1, (1, 1), 2), 5, (1, 3)),
        ((1, 2, (2, 2)), 6, (2, -2)),  # exists for every sample
        ((5, 2, None), 4, (2, 2)),
        ((5, 3, None, 2), 3, (3, 3)),
        ((9,), 0, (1, 9)),
    ],
    ids=str,
)
def test_by_hand(args: Any, outputs: int, second: tuple[int, int]) -> None:
    found = find_anchors(*args)
    assert found.count(7) == outputs
    assert found.positions(1) == second


def test_prefixes_have_the_number_of_outputs_that_they_have_alone() -> None:
    rng = np.random.default_rng(0)
    for _ in range(300):
        window, stride, dilation = (int(n) for n in rng.integers(1, 6, 3))
        low, high = (int(n) for n in rng.integers(-1, 8, 2))
        anchors = find_anchors(window, stride, (low, high), dilation)
        outputs = [anchors.positions(o) for o in range(anchors.count(20))]
        for n in range(1, 21):
            alone = max((n + low + high - dilation * (window - 1) - 1) // stride + 1, 0)
            assert sum(last < n for _, last in outputs) == anchors.count(n) == alone


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
