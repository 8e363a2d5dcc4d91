"""The cases of the CPU benchmarks."""

from __future__ import annotations

from dataclasses import replace

from batchnorm.benchmark.case import Case

ROWS = (262144, 64)
IMAGE = (32, 256, 56, 56)
DEEP = (64, 512, 14, 14)
VOLUME = (8, 64, 16, 64, 64)

_LARGE = (
    Case("rows", "(262144, 64)", ROWS, reused=True, compiled=True, memory=True),
    Case(
        "channels-last", "(32, 256, 56, 56), channels last", IMAGE, channels_last=True, reused=True
    ),
    Case("channels-first", "(32, 256, 56, 56)", IMAGE, reused=True, compiled=True, memory=True),
    Case("deep", "(64, 512, 14, 14)", DEEP, reused=True),
    Case("volume", "(8, 64, 16, 64, 64)", VOLUME, reused=True),
)
_SMALL = tuple(
    replace(case, compiled=True, rival_compiled=True, huge=False)
    for case in (
        Case("small", "(32, 64)", (32, 64)),
        Case("small-128", "(128, 256)", (128, 256)),
        Case("small-512", "(512, 128)", (512, 128)),
        Case("small-image", "(16, 64, 8, 8)", (16, 64, 8, 8)),
        Case("one-row", "(1, 4096), evaluation", (1, 4096), mode="evaluation"),
    )
)
_IN_TURN = (
    Case("turns", "(32, 64), (31, 64) in turn", (32, 64), "inference", turns=True, huge=False),
)
_IN_CACHE = (Case("in-cache", "(32, 64, 28, 28)", (32, 64, 28, 28), reused=True),)
_OTHER_SHAPES = (
    Case("wide", "(4096, 1024)", (4096, 1024)),
    Case("three-channels", "(65536, 3)", (65536, 3)),
    Case("bfloat16", "(32, 256, 56, 56), bfloat16", IMAGE, dtype="bfloat16"),
)
_MASKED = (
    Case("mask-50", "(262144, 64), 50 % padded", ROWS, padded=0.5, compiled=True),
    Case("mask-end", "(262144, 64), second half padded", ROWS, padded=0.5, at_end=True),
    Case("mask-image", "(32, 256, 56, 56), 50 % padded", IMAGE, padded=0.5),
    Case("mask-image-end", "(32, 256, 56, 56), second half padded", IMAGE, padded=0.5, at_end=True),
    Case("mask-volume", "(8, 64, 16, 64, 64), 50 % padded", VOLUME, padded=0.5),
    Case(
        "mask-volume-end",
        "(8, 64, 16, 64, 64), second half padded",
        VOLUME,
        padded=0.5,
        at_end=True,
    ),
    Case("mask-0", "(262144, 64), 0 % padded", ROWS, padded=0.0),
    Case("mask-95", "(262144, 64), 95 % padded", ROWS, padded=0.95),
)
_INFERENCE = tuple(
    replace(
        case,
        name=f"inference-{case.name}",
        mode="inference",
        reused=False,
        memory=False,
        compiled=case.name == "rows",
    )
    for case in _LARGE
)
_ZEROED = tuple(
    Case(f"zeroed-{name}", title, shape, "inference", padded=0.5, at_end=at_end, huge=False)
    for name, title, shape, at_end in (
        ("rows", "(262144, 64), 50 % padded", ROWS, False),
        ("rows-end", "(262144, 64), second half padded", ROWS, True),
        ("image", "(32, 256, 56, 56), 50 % padded", IMAGE, False),
        ("volume", "(8, 64, 16, 64, 64), 50 % padded", VOLUME, False),
    )
)
_ACTIVATED = tuple(
    Case(name, title, shape, activation="relu", residual=residual, memory=True)
    for name, title, shape, residual in (
        ("relu", "(262144, 64), ReLU", ROWS, False),
        ("add-relu", "(262144, 64), add, ReLU", ROWS, True),
        ("relu-image", "(32, 256, 56, 56), ReLU", IMAGE, False),
        ("add-relu-image", "(32, 256, 56, 56), add, ReLU", IMAGE, True),
    )
)
CASES = (
    *_LARGE,
    *_SMALL,
    *_IN_TURN,
    *_IN_CACHE,
    *_OTHER_SHAPES,
    *_MASKED,
    *_ACTIVATED,
    *_INFERENCE,
    *_ZEROED,
)

_LAST = (32, 56, 56, 256)
_JAX_SHAPES = {"rows": ROWS, "image": _LAST, "small": (32, 64)}
JAX_CASES = (
    *(Case(name, f"{shape}", shape, axis=-1) for name, shape in _JAX_SHAPES.items()),
    *(
        Case(f"{name}-mask", f"{shape}, half padded", shape, axis=-1, padded=0.5)
        for name, shape in _JAX_SHAPES.items()
    ),
    *(
        Case(f"inference-{name}", f"{shape}, inference", shape, "inference", axis=-1)
        for name, shape in _JAX_SHAPES.items()
    ),
)
KERAS_CASES = tuple(
    Case(name, name, shape, mode, axis=-1, eps=1e-3, padded=padded, at_end=at_end)
    for name, shape, mode, padded, at_end in (
        ("rows", ROWS, "training", None, False),
        ("rows, half padded", ROWS, "training", 0.5, False),
        ("rows, padded at the end", ROWS, "training", 0.5, True),
        ("image", _LAST, "training", None, False),
        ("small", (32, 64), "training", None, False),
        ("small, half padded", (32, 64), "training", 0.5, False),
        ("middle", (2048, 64), "training", None, False),
        ("rows, inference", ROWS, "inference", None, False),
        ("image, inference", _LAST, "inference", None, False),
    )
)

# Cases of the targets of `make bench-quick`; what is compiled there, or compared with huge pages.
QUICK = (*_LARGE, *_SMALL, *_IN_TURN, *_IN_CACHE, *_MASKED[:6], *_INFERENCE)
_QUICK_COMPILED = ("rows", "small", "inference-rows")
_QUICK_HUGE = ("rows", "channels-first", "deep", *(case.name for case in _INFERENCE))
_QUICK_VARIANTS = (
    "ours",
    "torch",
    "copy",
    "ours, no mask",
    "ours, compiled",
    "torch, compiled",
)
# Packing and the formula take ten steps' time; one shape of each kind has them all.
_FEWER = ("mask-end", "mask-image-end", "mask-volume", "mask-volume-end")
_FEWER_VARIANTS = ("ours", "ours, no mask", "ours, zeroed", "pack", "copy")


def select_cases(names: list[str], quick: bool) -> list[Case]:
    """Cases whose name contains one of `names`, or all; with `quick` those of the targets.

    In a quick run fewer are compiled, and compared with torch's huge pages.
    """
    chosen = [case for case in CASES if not names or any(name in case.name for name in names)]
    if not quick:
        return chosen
    return [_shorten(case) for case in chosen if names or case in QUICK]


def _shorten(case: Case) -> Case:
    compiled = case.compiled and case.name in _QUICK_COMPILED
    return replace(
        case,
        compiled=compiled,
        rival_compiled=case.rival_compiled and compiled,
        huge=case.huge and case.name in _QUICK_HUGE,
    )


def select_variants(case: Case, quick: bool) -> tuple[str, ...]:
    """Names of the variants to measure; none for all."""
    if quick:
        return _QUICK_VARIANTS
    return _FEWER_VARIANTS if case.name in _FEWER else ()
