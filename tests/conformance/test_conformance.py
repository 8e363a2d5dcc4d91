"""One table of cases, run on every front end and path, against the float64 core."""

from __future__ import annotations

from functools import partial

import pytest

import naive
import tolerances
import torch_path
from cases import CASES, Case
from comparison import Path, check

PATHS = {
    "naive-biased": Path(partial(naive.run, unbiased=False), False, tolerances.NAIVE),
    "naive-unbiased": Path(partial(naive.run, unbiased=True), True, tolerances.NAIVE),
    "torch": Path(torch_path.run, True, tolerances.FLOAT32),
    "torch-plain": Path(partial(torch_path.run, fused=False), True, tolerances.FLOAT32),
    "torch-traced": Path(partial(torch_path.run, compiled="aot_eager"), True, tolerances.FLOAT32),
}
TRACED_ARRAYS = partial(torch_path.run, compiled="aot_eager", fused=False)
# Compiling takes seconds a case: a sample that holds every mode, option and hard data.
COMPILED = Path(partial(torch_path.run, compiled="inductor"), True, tolerances.PLAIN_FLOAT32)
COMPILED_CASES = [
    "1d_signal-half",
    "image-channelwise",
    "ghost2-half_samples-train",
    "renorm_clipped-none-train",
    "residual_relu-half-train",
    "residual_relu-half-eval",
    "ghost_residual_relu-half_samples-train",
    "bfloat16-half-train",
    "train-offset1e6-half",
    "train-offset1e6-none",
    "offset1e6-renorm",
    "nan_padding-plain-train",
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("path", PATHS)
def test_path_meets_the_specification(path: str, case: Case) -> None:
    check(PATHS[path], case)


# A sample: what graphs hold where no kernel serves is the same array code as eager's.
@pytest.mark.parametrize("case", CASES[::6], ids=lambda case: case.name)
def test_traced_array_code_meets_the_specification(case: Case) -> None:
    check(Path(TRACED_ARRAYS, True, tolerances.FLOAT32), case)


@pytest.mark.parametrize("fused", [None, False], ids=["", "arrays"])
@pytest.mark.parametrize("name", COMPILED_CASES)
def test_compiled_torch_meets_the_specification(name: str, fused: bool | None) -> None:
    run = partial(COMPILED.run, fused=fused)
    check(COMPILED._replace(run=run), next(case for case in CASES if case.name == name))
