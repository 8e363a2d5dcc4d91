"""The conformance table: cases that every front end and every path must compute alike."""

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
        wanted = self.axis if isinstance(self.axis, tuple) else (self.axis,)
        return tuple(sorted(a % len(self.shape) for a in wanted))

    @property
    def channels(self) -> tuple[int, ...]:
        return tuple(self.shape[a] for a in self.axes)


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
    s: np.ndarray | None
    t: np.ndarray | None
    dy: np.ndarray
    state: State


class Result(NamedTuple):
    """The results of a path."""

    y: np.ndarray
    dx: np.ndarray
    dgamma: np.ndarray | None
    dbeta: np.ndarray | None
    state: State
    dresidual: np.ndarray | None = None


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
        sizes = iter((*mask.shape, *(1,) * len(rows)))
        fitted = mask.reshape(
            [1 if a in case.axes else next(sizes) for a in range(len(case.shape))]
        )
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


_MASKS = ("all", "samples", "prefix", "half", "own_rank", "row_of_ones", "channelwise")
_RARE = ("empty", "one_row", "two_rows")
_SHAPES: dict[str, dict[str, Any]] = {
    "2d": {"shape": (16, 3)},
    "2d_last": {"shape": (16, 3), "axis": -1},
    "1d_signal": {"shape": (8, 3, 5)},
    "image": {"shape": (4, 3, 5, 7)},
    "image_last": {"shape": (4, 5, 7, 3), "axis": -1},
    "volume": {"shape": (2, 3, 4, 3, 2)},
    "first_axis": {"shape": (3, 16), "axis": 0},
    "two_axes": {"shape": (6, 2, 5, 3), "axis": (1, 3)},
    "two_axes_unsorted": {"shape": (6, 2, 5, 3), "axis": (-1, 1)},
    "odd_rows": {"shape": (1031, 2)},
    "one_channel": {"shape": (33, 1)},
    "many_channels": {"shape": (5, 129)},
}
# Longer than the pieces in which kernels work, and not a multiple of them.
_LONG: dict[str, dict[str, Any]] = {
    "long_signal": {"shape": (3, 2, 1301)},
    "long_sample": {"shape": (2, 1201)},
    "narrow_image": {"shape": (2, 5, 7, 9)},
}
_OPTIONS: dict[str, dict[str, Any]] = {
    "ghost2": {"ghost": 2},
    "ghost_whole": {"ghost": 8},
    "ghost1": {"ghost": 1},
    "renorm": {"renorm": {}},
    "renorm_clipped": {"renorm": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.2}},
    "renorm_ghost": {"renorm": {"rmax": 1.5}, "ghost": 4},
    "renorm_adjusted": {"renorm": {}, "adjusted": True},
    "adjusted": {"adjusted": True},
    "relu": {"activation": "relu"},
    "leaky_relu": {"activation": "leaky_relu"},
    "residual": {"residual": True},
    "residual_relu": {"residual": True, "activation": "relu"},
    "ghost_residual_relu": {"ghost": 2, "residual": True, "activation": "relu"},
    "zeroed": {"padded_output": "zero"},
    "zeroed_residual": {"padded_output": "zero", "residual": True},
    "zeroed_residual_relu": {"padded_output": "zero", "residual": True, "activation": "relu"},
    "zeroed_ghost": {"padded_output": "zero", "ghost": 2, "activation": "leaky_relu"},
    "zeroed_renorm": {"padded_output": "zero", "renorm": {}},
    "cumulative": {"decay": None},
    "decay0": {"decay": 0.0},
    "decay1": {"decay": 1.0},
    "no_affine": {"gamma": False, "beta": False},
    "no_bias": {"beta": False},
    "large_eps": {"eps": 10.0},
}


# Zero sizes of batch, inner and channel axes, alone and together; in pairs with masks, modes and
# options.
_Zero = tuple[str, tuple[int, ...], int | tuple[int, ...], dict[str, Any]]
_ZERO: list[_Zero] = [
    ("batch", (0, 3, 5), 1, {"mask": "all", "residual": True, "activation": "relu"}),
    ("batch", (0, 3, 5), 1, {"mask": "channelwise", "mode": "eval"}),
    ("batch", (0, 3, 5), 1, {"mask": "samples", "dtype": "float16", "ghost": 2}),
    ("batch_last", (0, 5, 3), -1, {"mask": "half", "decay": None}),
    ("inner", (4, 3, 0), 1, {"mask": "row_of_ones", "renorm": {}}),
    ("inner", (4, 3, 0), 1, {"mask": "channelwise"}),
    ("inner", (4, 3, 0), 1, {"mask": "half", "ghost": 2, "gamma": False, "beta": False}),
    ("inner_last", (4, 0, 3), -1, {"mask": "all"}),
    ("inner_last", (4, 0, 3), -1, {"mask": "samples", "mode": "eval"}),
    ("inner_last", (4, 0, 3), -1, {"mask": "own_rank", "ghost": 2, "renorm": {}}),
    ("channel", (4, 0, 5), 1, {}),
    ("channel", (4, 0, 5), 1, {"mask": "channelwise", "dtype": "float64"}),
    ("channel_last", (4, 5, 0), -1, {"mask": "half", "mode": "eval", "activation": "relu"}),
    ("channel_last", (4, 5, 0), -1, {"mask": "own_rank", "ghost": 2}),
    ("channel_last", (4, 5, 0), -1, {"mask": "samples", "renorm": {}, "mode": "frozen"}),
    ("ends", (0, 3, 0), 1, {"mask": "half", "adjusted": True}),
    ("rows_last", (0, 0, 3), -1, {"mask": "all", "mask_dtype": "int32", "mode": "frozen"}),
    ("tail", (4, 0, 0), -1, {"mask": "all", "decay": None}),
    ("all", (0, 0, 0), 1, {"mask": "prefix", "dtype": "bfloat16"}),
    ("between", (4, 2, 0, 3), (1, 3), {"mask": "all"}),
]


def _table() -> list[Case]:
    cases = [Case(f"{n}-unmasked", **kw) for n, kw in _SHAPES.items()]
    cases += [Case(f"{n}-{m}", mask=m, **kw) for n, kw in _SHAPES.items() for m in _MASKS]
    cases += [Case(f"1d_signal-{m}", mask=m) for m in _RARE]
    cases += [
        Case(f"{option}-{m}-{mode}", mask=m, mode=mode, **kw)
        for option, kw in _OPTIONS.items()
        for m in ("none", "half", "half_samples", "channelwise")
        for mode in ("train", "eval")
    ]
    cases += [
        Case(f"{option}-{m}", mask=m, **_OPTIONS[option])
        for option in ("renorm", "ghost2", "renorm_ghost")
        for m in _RARE
    ]
    cases += [Case(f"frozen-{m}", mask=m, mode="frozen") for m in ("none", "half", "empty")]
    cases += [
        Case(f"{mode}-{d}-{m}", data=d, mask=m, mode=mode, shape=(257, 3))
        for d in ("offset1e2", "offset1e4", "offset1e6", "constant", "huge", "tiny")
        for m in ("none", "half")
        for mode in ("train", "eval")
    ]
    cases += [
        Case(f"offset1e6-{option}", data="offset1e6", mask="half", shape=(256, 3), **kw)
        for option, kw in _OPTIONS.items()
    ]
    cases += [
        Case(f"nan_padding-{option}-{mode}", data="nan_padding", mask="half", mode=mode, **kw)
        for option, kw in ({"plain": {}} | _OPTIONS).items()
        for mode in ("train", "eval")
        if not kw.get("residual") or kw.get("padded_output") == "zero"
    ]
    cases += [
        Case(f"{dtype}-{m}-{mode}", dtype=dtype, mask=m, mode=mode)
        for dtype in ("float16", "bfloat16", "float64")
        for m in ("none", "half")
        for mode in ("train", "eval")
    ]
    cases += [
        Case(f"{name}-{dtype}-{m}", dtype=dtype, mask=m, **option, **kw)
        for name, kw in _LONG.items()
        for dtype in ("float16", "bfloat16", "float32", "float64")
        for m, option in (
            ("none", {}),
            ("half", {"activation": "leaky_relu"}),
            ("samples", {"residual": True, "activation": "relu"}),
            ("prefix", {"padded_output": "zero", "residual": True, "activation": "leaky_relu"}),
        )
    ]
    cases += [
        Case(f"zeroed-{n}-{m}-{mode}", mask=m, mode=mode, padded_output="zero", **_SHAPES[n])
        for n, m, mode in (
            ("2d", "half", "train"),
            ("2d_last", "half", "eval"),
            ("image", "prefix", "train"),
            ("image_last", "prefix", "eval"),
            ("volume", "row_of_ones", "train"),
            ("first_axis", "half", "train"),
            ("two_axes", "own_rank", "train"),
            ("two_axes_unsorted", "channelwise", "eval"),
            ("odd_rows", "half", "train"),
            ("odd_rows", "half", "eval"),
            ("one_channel", "samples", "train"),
            ("many_channels", "half", "train"),
        )
    ]
    cases += [
        Case(f"zeroed-{dtype}-{mode}", dtype=dtype, mask="half", mode=mode, padded_output="zero")
        for dtype in ("float16", "bfloat16", "float64")
        for mode in ("train", "eval", "frozen")
    ]
    cases += [
        Case(f"zeroed-{m}-{mode}", mask=m, mode=mode, padded_output="zero")
        for m in ("empty", "one_row", "all")
        for mode in ("train", "eval")
    ]
    cases += [
        Case(f"{dtype}-residual_relu", dtype=dtype, mask="half", residual=True, activation="relu")
        for dtype in ("float16", "bfloat16")
    ]
    cases += [
        Case(f"nan_value-{option}", data="nan_value", **kw)
        for option, kw in ({"plain": {}} | _OPTIONS).items()
        if option in ("plain", "ghost2", "renorm", "renorm_ghost", "cumulative")
    ]
    # Deviations below sqrt(eps), which renormalization bounds from below (S11).
    cases += [
        Case(f"low_stddev-{m}", data="low_stddev", renorm={}, eps=0.25, mask=m)
        for m in ("none", "half")
    ]
    cases += [
        Case(f"debias-{name}", debias=True, **kw)
        for name, kw in (
            ("none", {}),
            ("half", {"mask": "half"}),
            ("channelwise", {"mask": "channelwise"}),
            ("empty", {"mask": "empty"}),
            ("first", {"steps": 0}),
            ("first-renorm", {"steps": 0, "renorm": {}, "mask": "half"}),
            ("late", {"steps": 2**30, "decay": 0.99}),
            ("slow", {"steps": 2, "decay": 0.99999}),
            ("renorm", {"renorm": {}}),
            ("ghost2", {"ghost": 2, "mask": "half_samples"}),
            ("decay0", {"decay": 0.0}),
            ("decay1", {"decay": 1.0}),
            ("cumulative", {"decay": None}),
            ("nan_value", {"data": "nan_value"}),
            ("offset", {"data": "offset1e6", "shape": (256, 3), "steps": 1}),
            ("float64", {"dtype": "float64"}),
            ("eval", {"mode": "eval"}),
        )
    ]
    cases += [
        Case(f"no_update-{name}", update=False, **kw)
        for name, kw in (
            ("none", {}),
            ("half", {"mask": "half"}),
            ("ghost2", {"ghost": 2}),
            ("renorm", {"renorm": {}, "mask": "half"}),
            ("cumulative", {"decay": None}),
            ("debias", {"debias": True}),
            ("bfloat16", {"dtype": "bfloat16"}),
            ("residual_relu", {"residual": True, "activation": "relu"}),
        )
    ]
    cases += [
        Case(f"passes{passes}-{name}", passes=passes, **kw)
        for name, passes, kw in (
            ("none", 2, {}),
            ("half", 3, {"mask": "half"}),
            ("samples", 4, {"mask": "samples"}),
            ("one_row", 2, {"mask": "one_row"}),
            ("empty", 2, {"mask": "empty"}),
            ("channelwise", 2, {"mask": "channelwise"}),
            ("image_last", 2, {"shape": (4, 5, 7, 3), "axis": -1, "mask": "prefix"}),
            ("many_channels", 2, {"shape": (6, 129)}),
            ("ghost2", 2, {"ghost": 2}),
            ("ghost2-half_samples", 2, {"ghost": 2, "mask": "half_samples"}),
            ("renorm", 2, {"renorm": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.2}, "mask": "half"}),
            ("cumulative", 2, {"decay": None}),
            ("debias", 2, {"debias": True, "mask": "half"}),
            ("offset", 4, {"data": "offset1e6", "shape": (512, 3), "mask": "half"}),
            ("offset-renorm", 2, {"data": "offset1e6", "shape": (512, 3), "renorm": {}}),
            ("huge", 2, {"data": "huge", "shape": (64, 3)}),
            ("nan_value", 2, {"data": "nan_value"}),
            ("nan_padding", 2, {"data": "nan_padding", "mask": "half"}),
            ("float16", 2, {"dtype": "float16", "mask": "half"}),
            ("bfloat16", 2, {"dtype": "bfloat16"}),
            ("float64", 2, {"dtype": "float64", "mask": "half"}),
            ("eval", 2, {"mode": "eval"}),
            ("no_update", 2, {"update": False}),
        )
    ]
    cases += [
        Case(
            f"late_limits-{m}",
            late_limits=True,
            renorm={"rmax": 1.1, "rmin": 0.9, "dmax": 0.2},
            mask=m,
        )
        for m in ("none", "half")
    ]
    cases += [
        Case(f"single_value-{name}", shape=(1, 3), **kw)
        for name, kw in (
            ("beta", {"single_value": "beta"}),
            ("beta-renorm", {"single_value": "beta", "renorm": {}}),
            ("running", {"single_value": "running"}),
            ("running-adjusted", {"single_value": "running", "adjusted": True}),
            ("running-relu", {"single_value": "running", "activation": "relu"}),
        )
    ]
    cases += [Case("float64-offset", dtype="float64", data="offset1e6", mask="half")]
    cases += [
        Case(f"mask-{dtype}", mask="half", mask_dtype=dtype)
        for dtype in ("int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64")
    ]
    cases += [
        Case(f"zero-{name}-{kw.get('mask', 'none')}", shape=shape, axis=axis, **kw)
        for name, shape, axis, kw in _ZERO
    ]
    empty = Case("", shape=(0, 3))
    cases += [
        replace(empty, name="empty-train"),
        replace(empty, name="empty-eval", mode="eval"),
        replace(empty, name="empty-ghost", ghost=2),
        replace(empty, name="empty-renorm", renorm={}),
        replace(empty, name="empty-masked", mask="all"),
        replace(empty, name="empty-signal", shape=(4, 3, 0)),
        Case("size_one_axes", shape=(1, 3, 1, 5)),
        Case("one_value-masked", shape=(1, 3), mask="all"),
        Case("one_value-ghost", shape=(4, 3), ghost=1),
    ]
    return cases


CASES = _table()
assert len({case.name for case in CASES}) == len(CASES)
__all__ = ["CASES", "Case", "Data", "Result", "State", "make_data"]
