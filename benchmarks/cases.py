"""The cases of the CPU benchmark."""

from __future__ import annotations

from batchnorm.benchmark.case import Case

ROWS = (262144, 64)
IMAGE = (32, 256, 56, 56)
VOLUME = (8, 64, 16, 64, 64)

_LARGE = (
    Case("rows", "(262144, 64)", ROWS, copied=True, quick=True, compiled=True),
    Case(
        "channels-last",
        "(32, 256, 56, 56), channels last",
        IMAGE,
        channels_last=True,
        copied=True,
    ),
    Case("channels-first", "(32, 256, 56, 56)", IMAGE, copied=True),
    Case("volume", "(8, 64, 16, 64, 64)", VOLUME, copied=True),
)
_OTHER_SHAPES = (
    Case("wide", "(4096, 1024)", (4096, 1024)),
    Case("three-channels", "(65536, 3)", (65536, 3)),
    Case("small", "(32, 64)", (32, 64), quick=True, compiled=True),
    Case("one-row", "(1, 4096), evaluation", (1, 4096), mode="evaluation", quick=True),
    Case("bfloat16", "(32, 256, 56, 56), bfloat16", IMAGE, dtype="bfloat16"),
)
_MASKED = (
    Case("mask-0", "(262144, 64), 0 % padded", ROWS, padded=0.0),
    Case("mask-50", "(262144, 64), 50 % padded", ROWS, padded=0.5, quick=True, compiled=True),
    Case("mask-95", "(262144, 64), 95 % padded", ROWS, padded=0.95),
    Case("mask-image", "(32, 256, 56, 56), 50 % padded", IMAGE, padded=0.5),
)
_ZEROED = tuple(
    Case(f"zeroed-{name}", title, shape, mode="inference", padded=0.5, at_end=at_end)
    for name, title, shape, at_end in (
        ("rows", "(262144, 64), 50 % padded", ROWS, False),
        ("rows-end", "(262144, 64), second half padded", ROWS, True),
        ("image", "(32, 256, 56, 56), 50 % padded", IMAGE, False),
        ("volume", "(8, 64, 16, 64, 64), 50 % padded", VOLUME, False),
    )
)
_INFERENCE = tuple(
    Case(
        f"inference-{case.name}",
        case.title,
        case.shape,
        mode="inference",
        channels_last=case.channels_last,
        copied=True,
        quick=case.quick,
        compiled=case.compiled,
    )
    for case in _LARGE
)
_ACTIVATED = (
    Case("relu", "(262144, 64), ReLU", ROWS, activation="relu"),
    Case("add-relu", "(262144, 64), add, ReLU", ROWS, activation="relu", residual=True, quick=True),
    Case("relu-image", "(32, 256, 56, 56), ReLU", IMAGE, activation="relu"),
    Case(
        "add-relu-image",
        "(32, 256, 56, 56), add, ReLU",
        IMAGE,
        activation="relu",
        residual=True,
    ),
)
CASES = (*_LARGE, *_OTHER_SHAPES, *_MASKED, *_ACTIVATED, *_INFERENCE, *_ZEROED)


def select_cases(names: list[str], quick: bool) -> list[Case]:
    """Cases whose name contains one of `names`, or all; with `quick` and no names, a few."""
    if names:
        return [case for case in CASES if any(name in case.name for name in names)]
    return [case for case in CASES if case.quick or not quick]
