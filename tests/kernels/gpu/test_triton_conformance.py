"""The conformance table on the GPU's kernels, interpreted."""

from __future__ import annotations

import pytest

import paths
import triton_path
from cases import Case


@pytest.mark.parametrize(**paths.rows(*triton_path.WAYS))
def test_path_meets_the_specification(way: str, case: Case) -> None:
    paths.check(way, case)
