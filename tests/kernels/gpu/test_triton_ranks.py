"""The GPU's kernels in synchronized layers: real processes, interpreted kernels (S14)."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "sync"))

import triton_path
from batchnorm.kernels.select import is_interpreting
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path as Way
from batchnorm.verification.comparison import check
from cases import Case
from processes import World
from test_equivalence import EXACT, run_split
from torch_world import join, make_world

SERVED = [case for case in EXACT if triton_path.refuse(case) is None]


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    world = make_world(2)
    world.values(join)
    assert all(world.values(is_interpreting))
    yield world
    world.close()


# A sample: a case takes seconds, since these processes have the interpreter as it is.
@pytest.mark.sample(2)
@pytest.mark.parametrize("case", SERVED[::9], ids=lambda case: case.name)
def test_split_batches_are_one_batch_to_the_kernels(world: World, case: Case) -> None:
    run = partial(run_split, world=world, seed=2, fused=True)
    check(Way(run, True, tolerances.FLOAT32, {"bfloat16": 2.0}), case)
