"""A sample of the conformance table, which `batchnorm.verify` runs on a user's machine."""

from __future__ import annotations

from itertools import combinations, product
from typing import Any

from batchnorm.verification.cases import Case
from batchnorm.verification.pairwise import choose

# Each is a way of its own through the kernels.
_FAMILIES: dict[str, dict[str, Any]] = {
    "train": {},
    "eval": {"mode": "eval"},
    "frozen": {"mode": "frozen", "beta": False},
    "ghost": {"ghost": 2},
    "renorm": {"renorm": {"rmax": 1.1, "rmin": 0.9, "dmax": 0.2}},
    "leaky_relu": {"activation": "leaky_relu"},
    "residual_relu": {"residual": True, "activation": "relu"},
    "eval_relu": {"mode": "eval", "residual": True, "activation": "relu"},
    "zeroed": {"padded_output": "zero"},
    "zeroed_ghost": {"padded_output": "zero", "ghost": 4, "residual": True, "activation": "relu"},
    "plain": {"gamma": False, "beta": False, "decay": None},
    "no_update": {"update": False},
    "debias": {"debias": True, "steps": 1},
}
_TYPES = ("float32", "bfloat16", "float16", "float64")
# Rows of channels and channels of rows, shorter and longer than vectors and the kernels' pieces.
_LAYOUTS: dict[str, dict[str, Any]] = {
    "rows": {"shape": (16, 3)},
    "signal": {"shape": (8, 3, 5)},
    "image": {"shape": (8, 5, 9, 7)},
    "image_last": {"shape": (4, 5, 7, 19), "axis": -1},
    "wide": {"shape": (8, 133)},
    "long": {"shape": (4, 2, 1301)},
}
_MASKS = ("none", "samples", "prefix", "half", "own_rank")

# What costs digits, or all of them, where a sum or a mask is not as it should be; and what kernels
# leave to array code.
_HARD: dict[str, dict[str, Any]] = {
    **{
        f"{data}_{mask}": {"data": data, "mask": mask, "shape": (257, 3)}
        for data in ("offset1e4", "offset1e6", "constant", "huge", "tiny")
        for mask in ("none", "half")
    },
    "offset1e6_signal": {"data": "offset1e6", "shape": (16, 3, 67)},
    "offset1e6_renorm": {"data": "offset1e6", "shape": (256, 3), "mask": "half", "renorm": {}},
    "offset1e6_eval": {"data": "offset1e6", "shape": (257, 3), "mode": "eval"},
    "nan_padding": {"data": "nan_padding", "mask": "half"},
    "nan_padding_image": {"data": "nan_padding", "mask": "half", "shape": (4, 5, 9, 7)},
    "nan_padding_bfloat16": {"data": "nan_padding", "mask": "prefix", "dtype": "bfloat16"},
    "nan_value": {"data": "nan_value"},
    "empty": {"mask": "empty"},
    "empty_ghost": {"mask": "half_samples", "ghost": 2},
    "one_row": {"mask": "one_row"},
    "no_batch": {"shape": (0, 3)},
    "mask_int64": {"mask": "half", "mask_dtype": "int64"},
    "adjusted": {"adjusted": True, "mask": "half"},
    "channelwise": {"mask": "channelwise"},
    "two_axes": {"shape": (6, 2, 5, 3), "axis": (1, 3), "mask": "half"},
    "neighbours": {"shape": (6, 2, 5, 3), "axis": (1, 2), "mask": "half"},
    "passes": {"passes": 2, "mask": "half"},
    "passes_offset": {"passes": 4, "data": "offset1e6", "shape": (512, 3), "mask": "half"},
}


def _fits(layout: dict[str, Any], mask: str) -> bool:
    """False where a layout with one row axis has two kinds of mask alike."""
    return not (len(layout["shape"]) == 2 and mask in ("samples", "prefix"))


def _product() -> list[Case]:
    rows = product(_FAMILIES.items(), _TYPES, _LAYOUTS.items(), _MASKS)
    return [
        Case(f"{name}-{dtype}-{place}-{mask}", dtype=dtype, mask=mask, **layout, **family)
        for (name, family), dtype, (place, layout), mask in rows
        if _fits(layout, mask)
    ]


def _cover(cases: list[Case]) -> list[Case]:
    """Few cases in which every two of family, type, layout and mask meet that meet in `cases`."""
    pairs = {
        case.name: set(combinations(enumerate(case.name.split("-")), 2))  # the name has all four
        for case in cases
    }
    chosen = choose(pairs)
    return [case for case in cases if case.name in chosen]


def _quickly(cases: list[Case]) -> list[Case]:
    """Few cases that hold every family, type, layout and mask at least once."""
    chosen = choose({case.name: set(enumerate(case.name.split("-"))) for case in cases})
    return [case for case in cases if case.name in chosen]


HARD = [Case(name, **options) for name, options in _HARD.items()]
EVERY = _product()  # every family with every type, layout and mask
COVER = _cover(EVERY)
FEW = _quickly(COVER)
# For ways that compile each case.
SLOW_HARD = [
    case
    for case in HARD
    if case.name
    in (
        *("offset1e6_none", "offset1e6_half", "offset1e6_renorm", "constant_none", "huge_half"),
        *("nan_padding", "empty", "one_row", "adjusted", "channelwise", "passes_offset"),
    )
]
QUICK_HARD = [case for case in SLOW_HARD if case.name in ("offset1e6_half", "nan_padding")]
