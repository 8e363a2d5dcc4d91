"""The conformance table on JAX; a file of its own, so that a worker imports one framework."""

from __future__ import annotations

from functools import partial

import pytest

import jax_path
import tolerances
from cases import CASES, Case
from comparison import Path, check

PLAIN = Path(partial(jax_path.run, fused=False), False, tolerances.FLOAT32)
FUSED = Path(partial(jax_path.run, fused=True), False, tolerances.FLOAT32)
SUPPORTED = [case for case in CASES if jax_path.supports(case)]


@pytest.mark.parametrize("case", SUPPORTED, ids=lambda case: case.name)
def test_plain_jax_meets_the_specification(case: Case) -> None:
    check(PLAIN, case)


@pytest.mark.parametrize(
    "case", [case for case in SUPPORTED if jax_path.is_served(case)], ids=lambda case: case.name
)
def test_kernels_in_jax_meet_the_specification(case: Case) -> None:
    check(FUSED, case)
