"""The runs of a case on the GPU's kernels, in Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch_path
from batchnorm.kernels.triton import tiling
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


def refuse_graph(case: Case) -> str | None:
    """The reason why compiled graphs hold array code for the case, or None."""
    if case.renorm is not None and case.mode == "train":
        return "renormalization is array code in graphs"
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


def _in_pieces(case: Case, data: Data) -> Result:
    with pieces():
        return torch_path.run(case, data, fused=True)


def _path(run: Callable[..., Result]) -> Path:
    # Where a GPU rounds float32 to bfloat16, the interpreter truncates.
    return Path(run, True, tolerances.FLOAT32, {"bfloat16": 2.0})


_KERNELS: Any = partial(torch_path.run, fused=True)
# A case takes half a second, as every launch is a loop over its programs.
WAYS = {
    "triton": Way(_path(_KERNELS), refuse, costly=True),
    "triton-pieces": Way(_path(_in_pieces), refuse, costly=True, sister="triton"),
    "triton-graph": Way(
        _path(partial(_KERNELS, compiled="aot_eager")), refuse_graph, costly=True, sister="triton"
    ),
}
