"""The runs of a case on the GPU's kernels, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch_path
from batchnorm.kernels.schedules import visiting
from batchnorm.kernels.triton import tiling, visits
from batchnorm.torch.kernels import decision
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path
from cases import Case, Data, Result
from paths import Way


def refuse(case: Case) -> str | None:
    """The reason why no kernel serves the case, so that array code does; or None."""
    if case.adjusted and case.mode == "train":
        return "an adjustment is array code"
    if case.mask == "channelwise":
        return "a mask that varies along channels is array code"
    if isinstance(case.axis, tuple):
        return "several channel axes are array code"
    return None


def has_many_groups(case: Case) -> bool:
    """True where the interpreter loops over groups for many seconds."""
    return case.ghost is not None and case.shape[0] // case.ghost > 32


def refuse_graph(case: Case) -> str | None:
    """The reason why compiled graphs hold array code for the case, or None."""
    if case.renorm is not None and case.mode == "train":
        return "renormalization is array code in graphs"
    return refuse(case)


def refuse_visits(case: Case) -> str | None:
    """The reason why no step of the case is a visit, or None."""
    if case.mode != "train":
        return "known statistics take one pass"
    return refuse(case)


@contextmanager
def pieces() -> Iterator[tiling.Limits]:
    """Cut small arrays as large ones are: into several parts, blocks and launches."""
    before = tiling.LIMITS
    tiling.LIMITS = tiling.Limits(
        tile=256, row=16, stretch=64, short_stretch=16, programs=6, together=2, whole=0, merged=16
    )
    decision.decide.cache_clear()
    try:
        yield tiling.LIMITS
    finally:
        tiling.LIMITS = before
        decision.decide.cache_clear()


@contextmanager
def all_visits() -> Iterator[visits.Limits]:
    """Cut small arrays into visits, of several tiles and some channels each."""
    before = visits.LIMITS
    visits.LIMITS = visits.Limits(twice=1 << 30, visits=1, sector=8, tile=2048, warps=1)
    try:
        with pieces(), visiting():
            yield visits.LIMITS
    finally:
        visits.LIMITS = before


def _run_in(cut: Callable[[], AbstractContextManager[Any]], case: Case, data: Data) -> Result:
    with cut():
        return torch_path.run(case, data, fused=True)


def _path(run: Callable[..., Result]) -> Path:
    # Where a GPU rounds float32 to bfloat16, the interpreter truncates.
    return Path(run, True, tolerances.FLOAT32, {"bfloat16": 2.0})


_KERNELS: Any = partial(torch_path.run, fused=True)
# A case takes half a second, as every launch is a loop over its programs.
WAYS = {
    "triton": Way(_path(_KERNELS), refuse, costly=True, slow=has_many_groups),
    "triton-pieces": Way(_path(partial(_run_in, pieces)), refuse, costly=True, sister="triton"),
    "triton-visits": Way(
        _path(partial(_run_in, all_visits)), refuse_visits, costly=True, sister="triton"
    ),
    "triton-graph": Way(
        _path(partial(_KERNELS, compiled="aot_eager")), refuse_graph, costly=True, sister="triton"
    ),
}
