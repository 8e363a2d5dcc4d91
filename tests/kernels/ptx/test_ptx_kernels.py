"""The GPU's kernels as compiled for a card, executed on the CPU: results, races, bounds.

Everything that the machine refuses fails a test: a race, an access out of bounds or misaligned, a
read of uninitialized memory, a barrier that only some threads reach, an inexact instruction.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

import batchnorm
import torch_path
from batchnorm.kernels.schedules import visiting
from batchnorm.kernels.triton import visits
from batchnorm.torch import batch_norm
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path, check
from cases import CASES, Case, Result, State, make_data
from ptx_driver import Driver, Launch
from ptx_memory import ProgramError

PATH = Path(partial(torch_path.run, fused=True), True, tolerances.FLOAT32)

# Cases of the table with different compiled code. Each is one tile, of one warp or two.
NAMES = """
1d_signal-half 1d_signal-empty image_last-prefix first_axis-own_rank renorm_clipped-half-train
ghost2-half_samples-train leaky_relu-half-eval frozen-half many_channels-half one_value-ghost
narrow_image-bfloat16-samples long_sample-float16-half mask-int32 empty-eval empty-renorm
zeroed_residual-half-train zeroed-image_last-prefix-eval narrow_image-float16-prefix
"""
TABLE = [case for case in CASES if case.name in NAMES.split()]

# Several programs of four or eight warps each, which go around their loops more than once.
ROWS, IMAGE, LONG = {"shape": (600, 70)}, {"shape": (12, 10, 17, 16)}, {"shape": (2, 3, 4601)}
RELU: dict[str, Any] = {"mask": "half", "residual": True, "activation": "relu"}
CUT = [
    Case("rows", shape=(2050, 70)),
    Case("rows-nan", data="nan_padding", mask="half", activation="relu", **ROWS),
    Case("rows-bfloat16", dtype="bfloat16", shape=(1300, 70), **RELU),
    Case("rows-renorm", mask="half", renorm={"rmax": 1.5}, decay=None, **ROWS),
    Case("rows-ghost", mask="half", ghost=200, data="offset1e6", **ROWS),
    Case("rows-eval", mode="eval", **ROWS, **RELU),
    Case("rows-zeroed", padded_output="zero", **ROWS, **RELU),
    Case("image-zeroed", padded_output="zero", residual=True, mask="prefix", **IMAGE),
    Case("image-prefix", **IMAGE, **RELU | {"mask": "prefix"}),
    Case("image-float16", dtype="float16", mask="half", activation="leaky_relu", **IMAGE),
    Case("image-float64", dtype="float64", mask="half", data="offset1e6", ghost=4, **IMAGE),
    Case("image-last", axis=-1, mask="half", shape=(6, 17, 16, 10)),
    Case("long-offset", data="offset1e6", **LONG),
    Case("long-half", mask="half", activation="relu", **LONG),
]
# Small steps in one launch each way, of four warps.
WHOLE = [
    Case("whole-rows", shape=(128, 70), **RELU),
    Case("whole-rows-zeroed", padded_output="zero", shape=(128, 70), **RELU),
    Case("whole-rows-ghost", mask="half", ghost=64, renorm={}, shape=(128, 70)),
    Case("whole-image", mask="half", data="offset1e6", shape=(4, 10, 9, 16)),
]
# As visits of a few channels, of several tiles and of all warps.
VISITED = [
    Case("visited-image", shape=(6, 3, 37, 40), **RELU),
    Case("visited-rows", mask="half", ghost=600, data="offset1e6", shape=(1200, 19)),
    Case("visited-float16", dtype="float16", padded_output="zero", shape=(9, 2, 31, 32), **RELU),
    Case("visited-renorm", mask="prefix", renorm={}, shape=(2, 3, 4601)),
]


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", TABLE + WHOLE, ids=lambda case: case.name)
def test_small_steps_meet_the_specification(case: Case, card: Driver) -> None:
    check(PATH, case)
    assert card.launches


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", CUT, ids=lambda case: case.name)
def test_large_steps_meet_the_specification(case: Case, card: Driver, several: Any) -> None:
    check(PATH, case)
    summing = [launch for launch in card.launches if launch.kernel.startswith("partial")]
    assert all(launch.ctas > 1 and launch.warps > 1 for launch in summing)
    assert summing


@pytest.fixture
def visited(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every step that is not small is visits, however few its channels are."""
    monkeypatch.setattr(visits, "LIMITS", visits.LIMITS._replace(visits=2, twice=1 << 30))
    with visiting():
        yield


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", VISITED, ids=lambda case: case.name)
def test_visits_meet_the_specification(case: Case, card: Driver, visited: None) -> None:
    check(PATH, case)
    steps = [launch for launch in card.launches if launch.kernel != "count_batch"]
    assert {launch.kernel for launch in steps} == {"forward_whole", "backward_whole"}
    assert all(launch.ctas > 1 and launch.warps == visits.LIMITS.warps for launch in steps)


def arrays_of(result: Result) -> list[np.ndarray]:
    return [np.asarray(a) for a in (*result, *result.state) if not isinstance(a, State | None)]


FEW = Case("rows-few", mask="half", renorm={}, shape=(200, 70))


@pytest.mark.sample(3)
@pytest.mark.parametrize("case", [FEW, WHOLE[0], WHOLE[2]], ids=lambda case: case.name)
def test_bits_are_the_same_each_time_and_for_each_order_of_warps(
    case: Case, card: Driver, request: pytest.FixtureRequest
) -> None:
    if case == FEW:
        request.getfixturevalue("several")
    data = make_data(case)
    first = torch_path.run(case, data, fused=True)
    for order in (None, random.Random(1)):
        card.order = order
        found = torch_path.run(case, data, fused=True)
        for a, b in zip(arrays_of(found), arrays_of(first), strict=True):
            assert np.array_equal(a, b)


def test_arrays_with_gaps_are_touched_at_their_elements_alone(card: Driver) -> None:
    wide = torch.randn(9, 12, 6, 4)
    for x in (wide[:, 2:7], wide.permute(0, 2, 3, 1)[:, :5]):
        y = batch_norm(x, None, None, training=True, fused=True)
        expected, _ = batchnorm.batch_norm(x.double().numpy(), axis=1)
        assert (y.double() - torch.from_numpy(expected)).abs().max() <= 5e-6


def is_racy(card: Driver, launch: Launch) -> bool:
    try:
        card.run(launch)
    except ProgramError as error:
        return str(error).startswith("race")
    return False


def launches_of(card: Driver, case: Case) -> list[Launch]:
    """One of each kernel of a case that has barriers."""
    torch_path.run(case, make_data(case), fused=True)
    return list({a.kernel: a for a in card.launches if "bar.sync" in a.text}.values())


@pytest.mark.parametrize("case", [CUT[3], WHOLE[0]], ids=lambda case: case.name)
def test_a_barrier_that_is_missing_is_missed(
    case: Case, card: Driver, request: pytest.FixtureRequest
) -> None:
    """One barrier of a kernel may be superfluous, where two follow each other."""
    if case in CUT:
        request.getfixturevalue("several")
    for launch in launches_of(card, case):
        barriers, unnoticed = list(re.finditer(r"bar\.sync[^;]*;", launch.text)), []
        for found in barriers:
            text = launch.text[: found.start()] + launch.text[found.end() :]
            if not is_racy(card, launch._replace(text=text)):
                unnoticed.append(found.start())
        assert len(unnoticed) <= 1 < len(barriers) or not unnoticed, launch.kernel


def test_bounds_alignment_and_types_of_real_kernels_are_checked(card: Driver, several: Any) -> None:
    torch_path.run(CUT[0], make_data(CUT[0]), fused=True)
    (launch,) = (a for a in card.launches if a.kernel == "normalize")
    unguarded = re.sub(r"@%p\d+ (st\.global)", r"\1", launch.text)
    with pytest.raises(ProgramError, match=r"^out of bounds"):
        card.run(launch._replace(text=unguarded))
    with pytest.raises(NotImplementedError, match="fma"):
        card.run(launch._replace(text=launch.text.replace("mul.rn.f32", "fma.rn.f32", 1)))
    last = Case("aligned", shape=(300, 64))
    torch_path.run(last, make_data(last), fused=True)
    launch = card.launches[-1]
    assert ".v4.b32" in launch.text
    shifted = tuple(
        torch.zeros(a.numel() + 1)[1:].view(a.shape) if getattr(a, "ndim", 0) == 2 else a
        for a in launch.arguments
    )
    with pytest.raises(ProgramError, match=r"^misaligned"):
        card.run(launch._replace(arguments=shifted))
