"""Cases that every front end and every path must compute alike, and their arrays."""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Case:
    """One row of the table; `name` tells its special feature."""

    name: str
    shape: tuple[int, ...] = (8, 3, 5)
    axis: int | tuple[int, ...] = 1
    mask: str = "none"
    mask_dtype: str = "bool"
    dtype: str = "float32"
    mode: str = "train"
    data: str = "normal"
    eps: float = 1e-5
    gamma: bool = True
    beta: bool = True
    decay: float | None = 0.9
    ghost: int | None = None
    renorm: dict[str, float] | None = None
    adjusted: bool = False
    residual: bool = False
    activation: str | None = None
    padded_output: str = "normalize"
    debias: bool = False
    steps: int = 7  # that the running statistics have seen
    update: bool = True  # False: batch statistics without an update (S20)
    passes: int = 1  # forward passes, over parts of x along axis 0, that are one step (S21)
    late_limits: bool = False  # of renormalization, set after construction (S11)
    single_value: str = "raise"  # torch's own option (S7)

    @property
    def zeroed(self) -> bool:
        """Padded rows of y are 0 (S4)."""
        return self.padded_output == "zero"

    @property
    def axes(self) -> tuple[int, ...]:
        """The channel axes, counted from the first axis."""
        wanted = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(a % len(self.shape) for a in wanted))

    @property
    def channels(self) -> tuple[int, ...]:
        """The sizes of the channel axes."""
        return tuple(self.shape[a] for a in self.axes)


def refuse_kernels(case: Case) -> str | None:
    """The reason why no kernel of any front end serves the case, or None."""
    if case.adjusted and case.mode == "train":
        return "an adjustment is array code"
    if case.mask == "channelwise":
        return "a mask that varies along channels is array code"
    if case.axes != tuple(range(case.axes[0], case.axes[-1] + 1)):
        return "channel axes that are apart are array code"
    return None


class State(NamedTuple):
    """Running statistics, float64, per channel; the last three with renormalization only."""

    mean: Any
    var: Any
    batches: Any
    stddev: Any = None
    renorm_mean: Any = None
    renorm_stddev: Any = None


class Data(NamedTuple):
    """Arrays of a case, float64 but exactly representable in its dtype (state: in float32)."""

    x: np.ndarray
    mask: np.ndarray | None  # as the user passes it
    real: np.ndarray  # of x's shape
    gamma: np.ndarray | None
    beta: np.ndarray | None
    residual: np.ndarray | None
    s: Any
    t: Any
    dy: np.ndarray
    state: State


class Result(NamedTuple):
    """The results of a path, float64 arrays; None where the case has no such result."""

    y: Any
    dx: Any
    dgamma: Any
    dbeta: Any
    state: State
    dresidual: Any = None


def split(case: Case, data: Data) -> list[tuple[Case, Data]]:
    """The case in its passes, each with its part of x; the running statistics are the same."""
    found = []
    for arrays in split_arrays(case, {f: getattr(data, f) for f in _PER_ROW}):
        shape = arrays["x"].shape
        found.append((replace(case, shape=shape, passes=1), data._replace(**arrays)))
    return found


_PER_ROW = ("x", "mask", "real", "residual", "s", "t", "dy")


def split_arrays(case: Case, arrays: dict[str, Any]) -> list[dict[str, Any]]:
    """Arrays of any library for each pass; those without x's axis 0 are the same in all."""
    if case.passes == 1:
        return [arrays]
    rows = case.shape[0]
    bounds = np.linspace(0, rows, case.passes + 1).astype(int).tolist()
    return [
        {f: a if a is None or a.shape[0] != rows else a[begin:end] for f, a in arrays.items()}
        for begin, end in pairwise(bounds)
    ]


def make_data(case: Case) -> Data:
    """The arrays of a case, always the same ones."""
    rng = np.random.default_rng(zlib.crc32(case.name.encode()))
    mask, real = _mask(case, rng)
    x = _x(case, rng)
    dy = rng.normal(size=case.shape)
    residual = rng.normal(size=case.shape)
    if case.data == "nan_padding":
        x[~real] = np.nan
        dy[~real] = np.nan
        residual[~real] = np.nan
    gamma = rng.uniform(0.5, 1.5, case.channels) * rng.choice([-1, 1], case.channels)
    shape = tuple(n if a in (0, *case.axes) else 1 for a, n in enumerate(case.shape))
    s, t = rng.uniform(0.5, 1.5, shape), rng.normal(size=(1, *case.shape[1:]))
    return Data(
        x=_rounded(x, case.dtype),
        mask=mask,
        real=real,
        gamma=_rounded(gamma, "float32") if case.gamma else None,
        beta=_rounded(rng.normal(size=case.channels), "float32") if case.beta else None,
        residual=_rounded(residual, case.dtype) if case.residual else None,
        s=_rounded(s, "float32") if case.adjusted else None,
        t=_rounded(t, "float32") if case.adjusted else None,
        dy=_rounded(dy, case.dtype),
        state=_state(case, x, rng),
    )


def _x(case: Case, rng: np.random.Generator) -> np.ndarray:
    x = rng.normal(size=case.shape)
    if case.data.startswith("offset"):
        return x + float(case.data.removeprefix("offset"))
    if case.data == "constant":
        x[...] = 0.1
    if case.data == "huge":
        x *= 3e17
    if case.data == "tiny":
        x *= 1e-15
    if case.data == "nan_value":  # at a real row of one channel
        x[(-1,) + (0,) * (x.ndim - 1)] = np.nan
    return x


def _state(case: Case, x: np.ndarray, rng: np.random.Generator) -> State:
    """Statistics as after a few training steps: near the data, for a meaningful evaluation."""
    offset = float(np.nanmean(x)) if x.size and not np.isnan(x).all() else 0.0
    if case.data == "huge":
        offset = 0.0

    def draw(low: float, high: float) -> np.ndarray:
        return _rounded(rng.uniform(low, high, case.channels), "float32")

    mean = _rounded(offset + draw(-0.5, 0.5), "float32")
    state = State(mean, draw(0.5, 2.0), case.steps)
    if case.renorm is None:
        return state
    near = _rounded(offset + draw(-0.5, 0.5), "float32")
    low, high = (0.1, 0.2) if case.data == "low_stddev" else (0.7, 1.4)
    return state._replace(stddev=draw(low, high), renorm_mean=near, renorm_stddev=draw(low, high))


def _mask(case: Case, rng: np.random.Generator) -> tuple[np.ndarray | None, np.ndarray]:
    rows = tuple(n for a, n in enumerate(case.shape) if a not in case.axes)
    if case.mask == "none":
        return None, np.ones(case.shape, bool)
    if case.mask == "channelwise":
        mask = rng.random(case.shape) < 0.6
        mask[(slice(None),) * case.axes[0] + (slice(1),)] = False  # one channel has no real row
    elif case.mask == "own_rank":
        mask = rng.random([1 if a in case.axes else n for a, n in enumerate(case.shape)]) < 0.5
    elif case.mask == "row_of_ones":
        sizes = [1 if a in case.axes or a == 0 else n for a, n in enumerate(case.shape)]
        mask = rng.random(sizes) < 0.7
    else:
        mask = _row_mask(case.mask, rows, rng)
    fitted = mask
    if mask.ndim < len(case.shape):
        left = iter((*mask.shape, *(1,) * len(rows)))
        fitted = mask.reshape([1 if a in case.axes else next(left) for a in range(len(case.shape))])
    real = np.broadcast_to(fitted, case.shape)
    if case.mask_dtype != "bool":
        mask = mask.astype(case.mask_dtype)
    return mask, real


def _row_mask(kind: str, rows: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    if kind == "samples":
        mask = rng.random(rows[:1]) < 0.6
        mask[: len(mask) // 4] = True
        return mask
    if kind == "prefix":  # ragged lengths along the last row axis
        lengths = rng.integers(0, rows[-1] + 1, rows[:-1])
        return np.arange(rows[-1]) < lengths[..., None]
    mask = np.zeros(rows, bool)
    if kind == "all":
        mask[...] = True
    elif kind == "half":
        mask = rng.random(rows) < 0.5
    elif kind == "one_row":
        mask.flat[mask.size // 2] = True
    elif kind == "two_rows":
        mask.flat[[0, mask.size - 1]] = True
    elif kind == "half_samples":  # with ghost batches: whole groups are empty
        mask[::2] = True
    else:
        assert kind == "empty", kind
    return mask


def _rounded(a: np.ndarray, dtype: str) -> np.ndarray:
    """`a` rounded to `dtype`, as float64; bfloat16 by dropping float32's last 16 bits."""
    if dtype == "bfloat16":
        bits = np.ascontiguousarray(a, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32).astype(np.float64).reshape(a.shape)
    return a.astype(dtype).astype(np.float64)
