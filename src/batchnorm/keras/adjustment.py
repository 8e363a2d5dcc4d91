"""The arrays that an adjustment returns (S13)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.core.errors import ArgumentValueError


def missing_axes(name: str, shape: Sequence[Any], x: Sequence[Any]) -> int:
    """The number of axes of size 1 to put before an array of this shape to give it x's rank.

    Sizes may be None where they are unknown.

    Raises:
        ValueError: the shape does not broadcast against x's.
    """
    missing = len(x) - len(shape)
    sizes = (*(1,) * missing, *shape)
    if missing < 0 or any(
        None not in (m, n) and m not in (1, n) for m, n in zip(sizes, x, strict=True)
    ):
        raise ArgumentValueError(
            f"the adjustment's {name} must broadcast against x of shape {tuple(x)}; got "
            f"shape {tuple(shape)}."
        )
    return missing
