"""The conformance table on the GPU's kernels, interpreted."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

import tolerances
import torch_path
from cases import CASES, Case
from comparison import Path, check

# The interpreter cuts float32 off where a GPU rounds it to bfloat16.
PATH = Path(partial(torch_path.run, fused=True), True, tolerances.FLOAT32, {"bfloat16": 2.0})


def is_served(case: Case) -> bool:
    """Whether a kernel takes the case; the others are the plain path's."""
    adjusted = case.adjusted and case.mode == "train"
    return not adjusted and case.mask != "channelwise" and not isinstance(case.axis, tuple)


TRACED = PATH._replace(run=partial(torch_path.run, fused=True, compiled="aot_eager"))
SERVED = [case for case in CASES if is_served(case)]


@pytest.mark.parametrize("case", SERVED, ids=lambda case: case.name)
def test_kernels_meet_the_specification(case: Case) -> None:
    check(PATH, case)


# A case takes half a second, as every launch is a loop over its programs.
@pytest.mark.parametrize("case", SERVED[::3], ids=lambda case: case.name)
def test_kernels_in_pieces_meet_the_specification(case: Case, pieces: Any) -> None:
    check(PATH, case)


def is_traced(case: Case) -> bool:
    """Whether compiled graphs hold the kernels: renormalization is array code in them."""
    return case.renorm is None or case.mode != "train"


@pytest.mark.parametrize(
    "case", [c for c in SERVED if is_traced(c)][::8], ids=lambda case: case.name
)
def test_kernels_in_graphs_meet_the_specification(case: Case) -> None:
    check(TRACED, case)
