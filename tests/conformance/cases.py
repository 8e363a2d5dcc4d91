"""The conformance table: cases that every front end and every path must compute alike."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from batchnorm.verification.cases import (
    Case,
    Data,
    Result,
    State,
    make_data,
    split,
    split_arrays,
)

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
__all__ = [
    "CASES",
    "Case",
    "Data",
    "Result",
    "State",
    "make_data",
    "split",
    "split_arrays",
]
