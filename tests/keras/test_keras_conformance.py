"""The conformance table on the Keras layer, plain and fused, eager and compiled."""

from __future__ import annotations

import pytest

import keras_path
import paths
from cases import Case


@pytest.mark.parametrize(**paths.rows(*keras_path.WAYS))
def test_path_meets_the_specification(way: str, case: Case) -> None:
    paths.check(way, case)
