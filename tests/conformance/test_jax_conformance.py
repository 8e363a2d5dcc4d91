"""The conformance table on JAX; a file of its own, so that a process imports one framework."""

from __future__ import annotations

import pytest

import paths
from cases import Case


@pytest.mark.parametrize(**paths.rows("jax-arrays", "jax-kernels"))
def test_path_meets_the_specification(way: str, case: Case) -> None:
    paths.check(way, case)
