"""k processes on a split batch give the results of one process on the whole batch (S14)."""

from __future__ import annotations

import zlib
from functools import partial

import numpy as np
import pytest

import torch_path
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path, check
from cases import CASES, Case, Data, Result
from processes import World, results
from splitting import random_split

# Several passes are in test_several_passes; a single value is none where other ranks have more.
TRAINING = [
    case
    for case in CASES
    if case.mode == "train"
    and case.ghost is None
    and case.passes == 1
    and case.single_value == "raise"
]
# The mean of float64 data is sent rounded to float64; S3 sets no bound for that.
EXACT = [case for case in TRAINING if (case.dtype, case.data[:6]) != ("float64", "offset")]


# Every case in two processes, and in three or four.
SIZED = [(case, 2) for case in EXACT] + [(case, 3 + i % 2) for i, case in enumerate(EXACT)]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("case", "size"), SIZED, ids=lambda value: getattr(value, "name", value))
def test_split_batches_are_one_batch(worlds, case: Case, size: int) -> None:
    run = partial(run_split, world=worlds[size], seed=0)
    check(Path(run, unbiased=True, float32=tolerances.FLOAT32), case)


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", EXACT, ids=lambda case: case.name)
def test_split_batches_are_one_batch_in_array_code(worlds, case: Case) -> None:
    run = partial(run_split, world=worlds[3], seed=1, fused=False)
    check(Path(run, unbiased=True, float32=tolerances.FLOAT32), case)


@pytest.mark.parametrize("case", EXACT[::7], ids=lambda case: case.name)
def test_one_process_is_no_other_than_before(worlds, case: Case) -> None:
    run = partial(run_split, world=worlds[1], seed=0)
    check(Path(run, unbiased=True, float32=tolerances.FLOAT32), case)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "case", [case for case in EXACT if case.dtype != "float64"][::9], ids=lambda case: case.name
)
def test_split_batches_are_one_batch_without_float64(worlds, case: Case) -> None:
    run = partial(run_split, world=worlds[3], seed=3, narrow=True)
    check(Path(run, unbiased=True, float32=tolerances.FLOAT32), case)


def run_split(
    case: Case,
    data: Data,
    *,
    world: World,
    seed: int,
    fused: bool | None = None,
    narrow: bool = False,
) -> Result:
    rng = np.random.default_rng([zlib.crc32(case.name.encode()), world.size, seed])
    split = random_split(case, world.size, rng)
    found = world.run(_run, [(*part, fused, narrow) for part in split.cut(data)])
    return split.join(results(found))


def _run(case: Case, data: Data, fused: bool | None, narrow: bool) -> Result:
    if narrow:
        return torch_path.run_without_float64(case, data, synchronized=True)
    return torch_path.run(case, data, fused=fused, synchronized=True)
