"""The figures that the library is held to.

python benchmarks/targets.py     # the committed results', without measuring
"""

from __future__ import annotations

import json

from cases import CASES
from judging import (
    HUGE,
    RESULTS,
    Target,
    against_flax,
    judge,
    most,
    of,
    of_accuracy,
    of_memory,
    of_pass,
    over_copies,
    print_targets,
    worst,
)

_INFERENCE = [case.name for case in CASES if case.inference and case.padded is None]
_LARGE_INFERENCE = [name for name in _INFERENCE if name != "turns"]
_ZEROED = [case.name for case in CASES if case.inference and case.padded is not None]
_SMALL = ("small", "small-128", "small-512", "small-image", "one-row")
_PLAIN = [case.name for case in CASES if case.plain]


def _step(case: str, title: str, copies: float, fast: float, torch: float) -> tuple[Target, ...]:
    """A large training step over four copies of x, and against torch's."""
    what = f"step {title}"
    return (
        Target(f"{what} over 4 copies", copies, over_copies([case], 4), True, fast, case),
        Target(f"{what} against torch", torch, of(case, "torch"), case=case),
    )


def _huge(case: str, title: str, bound: float) -> Target:
    what = f"step {title} against torch with huge pages"
    return Target(what, bound, of(case, f"torch{HUGE}"), case=case)


def _masked(case: str, title: str, bound: float) -> Target:
    what = f"half padded over unmasked, {title}"
    return Target(what, bound, of(case, "ours", "ours, no mask"), True, case=case)


# Those of `make bench-quick`.
HEADLINES = (
    *_step("rows", "(262144, 64)", 1.2, 1.6, 2.5),
    _huge("rows", "(262144, 64)", 1.4),
    *_step("channels-last", "(32, 256, 56, 56), channels last", 1.25, 1.6, 2.2),
    *_step("channels-first", "(32, 256, 56, 56)", 0.85, 1.1, 3.5),
    _huge("channels-first", "(32, 256, 56, 56)", 2.2),
    *_step("deep", "(64, 512, 14, 14)", 0.85, 1.1, 2.5),
    _huge("deep", "(64, 512, 14, 14)", 2.2),
    *_step("volume", "(8, 64, 16, 64, 64)", 0.95, 1.3, 3.0),
    _masked("mask-50", "(262144, 64) at random", 1.05),
    _masked("mask-image", "(32, 256, 56, 56) at random", 1.05),
    _masked("mask-volume", "(8, 64, 16, 64, 64) at random", 1.05),
    _masked("mask-end", "(262144, 64) at the end", 0.8),
    _masked("mask-image-end", "(32, 256, 56, 56) at the end", 0.8),
    _masked("mask-volume-end", "(8, 64, 16, 64, 64) at the end", 0.8),
    Target(
        "step in cache, (32, 64, 28, 28), over 4 copies",
        2.5,
        over_copies(["in-cache"], 4),
        at_most=True,
        case="in-cache",
    ),
    *(
        Target(f"one core, in cache: {name} over a copy of one array", bound, of_pass(name), True)
        for name, bound in (("moments", 1.2), ("normalize", 1.3), ("reduce", 2.0), ("apply", 2.0))
    ),
    Target("inference over 1 copy, worst", 1.3, over_copies(_LARGE_INFERENCE, 1), at_most=True),
    Target("inference against torch, worst", 1.0, worst(_LARGE_INFERENCE, "torch")),
    Target(
        "inference against torch with huge pages, worst",
        1.0,
        worst(_LARGE_INFERENCE, f"torch{HUGE}"),
    ),
    Target("(32, 64) against torch", 0.9, of("small", "torch"), case="small"),
    Target("(128, 256) against torch", 0.9, of("small-128", "torch"), case="small-128"),
    Target("(512, 128) against torch", 0.9, of("small-512", "torch"), case="small-512"),
    Target("(16, 64, 8, 8) against torch", 0.9, of("small-image", "torch"), case="small-image"),
    Target("(1, 4096), evaluation, against torch", 0.9, of("one-row", "torch"), case="one-row"),
    Target(
        "(32, 64), (31, 64) in turn, evaluation, against torch",
        0.8,
        of("turns", "torch"),
        case="turns",
    ),
    Target(
        "torch.compile over eager, worst",
        1.05,
        most([case.name for case in CASES if case.compiled], "ours, compiled", "ours"),
        at_most=True,
    ),
    Target(
        "torch.compile, small, against torch's layer compiled, worst",
        1.0,
        worst(_SMALL, "torch, compiled", "ours, compiled"),
    ),
    Target("peak memory of a step over torch's in place, worst", 1.02, of_memory, at_most=True),
    Target("error of y at mean 1e6, deviation 1", 5e-6, of_accuracy, at_most=True),
)
# Those of `make bench` besides.
OTHERS = (
    Target("(262144, 64), times as fast as torch", 4.0, of("rows", "torch"), case="rows"),
    Target(
        "inference past any cache, against torch, worst",
        1.5,
        worst([name for name in _LARGE_INFERENCE if name != "inference-deep"], "torch"),
    ),
    Target("half padded, times as fast as packing", 12.0, of("mask-50", "pack")),
    Target("half padded, against the compiled formula", 2.5, of("mask-50", "formula, compiled")),
    Target("ReLU, times as fast as separate operators", 3.5, of("relu", "torch")),
    Target("add and ReLU, times as fast as separate operators", 3.5, of("add-relu", "torch")),
    Target("any shape, no option, against torch, worst", 0.9, worst(_PLAIN, "torch")),
    Target(
        "half padded, zeros at padding, times normalized padding, worst",
        1.02,
        most(("mask-50", "mask-image"), "ours, zeroed", "ours"),
        at_most=True,
    ),
    Target(
        "inference, zeros at padding, worst, times no mask",
        1.05,
        most(_ZEROED, "ours, zeroed", "ours"),
        at_most=True,
    ),
)
TORCH = (*HEADLINES, *OTHERS)

JAX_HEADLINES = (
    Target("JAX (32, 64) against flax", 0.95, against_flax("small"), case="small"),
    Target(
        "JAX (262144, 64), half padded, against flax",
        2.7,
        against_flax("rows-mask"),
        case="rows-mask",
    ),
)
JAX = (
    *JAX_HEADLINES,
    *(
        Target(f"JAX {title} against flax", bound, against_flax(case), case=case)
        for case, title, bound in (
            ("rows", "(262144, 64)", 2.4),
            ("image", "(32, 56, 56, 256)", 2.4),
            ("image-mask", "(32, 56, 56, 256), half padded,", 2.7),
            ("small-mask", "(32, 64), half padded,", 0.95),
            ("inference-small", "(32, 64), inference,", 0.95),
            ("inference-rows", "(262144, 64), inference,", 1.0),
            ("inference-image", "(32, 56, 56, 256), inference,", 1.0),
        )
    ),
    Target(
        "JAX half padded over unmasked, worst",
        1.05,
        most(("rows-mask", "image-mask"), "ours", "ours, no mask"),
        at_most=True,
    ),
    Target("JAX error of y at mean 1e6, deviation 1", 5e-6, of_accuracy, at_most=True),
)

# Times as fast as Keras's own layer, at least; 1 where nothing is said.
KERAS = {
    "tensorflow": {
        "rows": 1.5,
        "rows, half padded": 1.8,
        "rows, padded at the end": 2.5,
        "image": 1.0,
        "small": 0.8,
        "small, half padded": 0.8,
    },
    "jax": {"rows": 2.0, "rows, half padded": 2.5, "image": 2.0},
    "torch": {"rows": 5.0, "rows, half padded": 5.0, "image": 5.0},
}


if __name__ == "__main__":
    for _name, _targets in (("cpu", TORCH), ("jax", JAX)):
        print_targets(judge(json.loads((RESULTS / f"{_name}.json").read_text()), _targets))
