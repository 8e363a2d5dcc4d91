"""Random cases beside the table's, drawn from a number: `random-17` is always the same case.

python -m conformance torch random 2000 17     # 2000 of them, from number 17 on
python -m conformance torch random-17
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np

from cases import Case

_PREFIX = "random-"
_HALF = ("float16", "bfloat16")
_MOST = 6000  # elements
# With fewer rows the deviation may by chance be so small that S3 promises nothing.
_ROWS_AT_OFFSETS = 64


def random_case(name: str) -> Case | None:
    """The case of this name, or None if it is no name of a random one."""
    if not name.startswith(_PREFIX):
        return None
    return _draw(name, np.random.default_rng(int(name.removeprefix(_PREFIX))))


def names(count: int, first: int) -> list[str]:
    """`count` names, from number `first` on."""
    return [f"{_PREFIX}{number}" for number in range(first, first + count)]


def _draw(name: str, rng: np.random.Generator) -> Case:
    def pick(*choices: Any) -> Any:
        return choices[rng.integers(len(choices))]

    shape = _shape(rng)
    axis = _axis(shape, rng)
    axes = {a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,))}
    rows = math.prod(n for a, n in enumerate(shape) if a not in axes)
    mode = pick("train", "train", "train", "eval", "frozen")
    ghost = _ghost(shape, axes, rng)
    dtype = pick("float32", "float32", "float64", *_HALF)
    masks = ("half", "samples", "prefix", "own_rank", "row_of_ones", "channelwise", "all", "empty")
    mask = pick("none", "none", "half", *masks, "one_row", "two_rows")
    if rows == 0 and mask in ("one_row", "two_rows"):
        mask = "half"
    if rows // (shape[0] // ghost if ghost else 1) == 1 and mask == "none" and not ghost:
        mask = "all"  # torch refuses a single value unless something says that it is meant
    renorm = pick(None, None, None, {}, {"rmax": 1.2, "rmin": 0.8, "dmax": 0.3})
    gamma = rng.random() < 0.8
    adjusted = ghost is None and rng.random() < 0.15
    parted = ghost is None and not adjusted and mask != "none" and 0 not in axes
    case = Case(
        name,
        shape,
        axis,
        mask,
        mask_dtype=pick("bool", "bool", "int8", "uint8", "int32", "uint64", "int64"),
        dtype=dtype,
        mode=mode,
        eps=pick(1e-5, 1e-3, 1.0),
        gamma=gamma,
        beta=gamma and rng.random() < 0.8,  # torch has no beta alone
        decay=pick(0.9, 0.9, 0.99, 0.0, 1.0, None),
        ghost=ghost,
        renorm=renorm,
        adjusted=adjusted,
        residual=rng.random() < 0.2,
        activation=pick(None, None, None, "relu", "leaky_relu"),
        padded_output=pick("normalize", "normalize", "zero"),
        debias=pick(False, False, False, True),
        steps=pick(0, 1, 7, 7),
        update=pick(True, True, True, True, False),
        passes=pick(1, 1, 1, 2, 3) if parted else 1,
    )
    case = replace(case, passes=min(case.passes, max(shape[0], 1)))
    return replace(case, data=_data(case, rows, rng))


def _shape(rng: np.random.Generator) -> tuple[int, ...]:
    """Of rank 2 to 5; sizes around those of vectors and pieces, and 0 and 1 at times."""
    rank, left, shape = int(rng.integers(2, 6)), _MOST, []
    for _ in range(rank):
        small, large = int(rng.integers(1, 7)), int(rng.choice([8, 15, 16, 17, 33, 64, 129, 300]))
        size = 0 if rng.random() < 0.02 else large if rng.random() < 0.25 else small
        shape.append(min(size, max(left, 1)))
        left //= max(shape[-1], 1)
    return tuple(int(n) for n in rng.permutation(shape))


def _axis(shape: tuple[int, ...], rng: np.random.Generator) -> int | tuple[int, ...]:
    rank = len(shape)
    if rank > 2 and rng.random() < 0.2:
        found = rng.choice(rank, 2, replace=False)
        return tuple(int(a) - (rank if rng.random() < 0.3 else 0) for a in found)
    return int(rng.choice([1, 1, -1, rng.integers(rank)]))


def _ghost(shape: tuple[int, ...], axes: set[int], rng: np.random.Generator) -> int | None:
    if 0 in axes or rng.random() < 0.75 or shape[0] == 0:
        return None
    return int(rng.choice([v for v in range(1, shape[0] + 1) if shape[0] % v == 0]))


def _data(case: Case, rows: int, rng: np.random.Generator) -> str:
    """A kind of numbers for which the comparison's bounds hold."""
    kinds, half = ["normal", "normal", "tiny"], case.dtype in _HALF
    if case.activation is None or case.beta:  # else the sign of a rounding error decides
        kinds.append("constant")
    if case.mask not in ("none", "all"):
        kinds += ["nan_padding"] * 2
    few = case.mask in ("one_row", "two_rows", "channelwise", "empty")
    # For float64 the bounds ignore the rounding of the means before a step.
    exact = not half and (case.dtype == "float32" or case.renorm is None)
    if exact and rows >= 4 * _ROWS_AT_OFFSETS and case.ghost is None and not few:
        kinds += ["offset1e2", "offset1e4"] + ["offset1e6"] * (case.activation is None)
    if case.dtype != "float16" and case.renorm is None:  # else r is huge too
        kinds.append("huge")
    return str(rng.choice(kinds))
