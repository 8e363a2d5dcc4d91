"""Every option in float64, in eager and in compiled code."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial

import pytest

import keras_backend
import keras_path
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path, check
from cases import CASES, Case

MODES = {"tensorflow": (None, "graph", "xla"), "jax": (None, "graph"), "torch": (None,)}[
    keras_backend.NAME
]
# The options of the table that Keras has, with a mask and without.
OPTIONS = [
    replace(case, dtype="float64")
    for case in CASES
    if keras_path.refuse(case) is None
    and case.dtype == "float32"
    and case.shape == Case("").shape
    and case.data == "normal"
    and (case.mask == "none" or case.name.split("-")[1:2] == ["half"])
]


@pytest.fixture(autouse=True)
def _float64() -> Iterator[None]:
    """Switch float64 on: JAX has it only on request."""
    context = nullcontext()
    if keras_backend.NAME == "jax":
        import jax

        context = jax.enable_x64(True)
    with context:
        yield


@pytest.mark.sample(20)
@pytest.mark.parametrize("case", OPTIONS, ids=lambda case: case.name)
@pytest.mark.parametrize("compiled", MODES)
@pytest.mark.parametrize("fused", [None, False], ids=["fused", "plain"])
def test_options_in_float64(case: Case, compiled: str | None, fused: bool | None) -> None:
    run = partial(keras_path.run, fused=fused, compiled=compiled)
    check(Path(run, False, tolerances.FLOAT64), case)
