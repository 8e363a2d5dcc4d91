"""The conformance table on the Keras layer, plain and fused, eager and compiled."""

from __future__ import annotations

from functools import partial

import pytest

import keras_backend
import keras_path
import tolerances
from cases import CASES, Case
from comparison import Path, check

_MODES = {"tensorflow": (None, "graph"), "jax": (None, "graph"), "torch": (None,)}[
    keras_backend.NAME
]
_FUSED = {"fused": None, "plain": False}
CHOSEN = [
    case
    for case in CASES
    if keras_path.applies(case) and (case.dtype != "float64" or keras_backend.has_float64())
]
# XLA compiles each case for itself: a sample that holds every mode, option and hard data.
XLA = [
    "1d_signal-half",
    "two_axes-channelwise",
    "ghost2-half_samples-train",
    "renorm_clipped-none-train",
    "renorm_ghost-half_samples-train",
    "adjusted-half-train",
    "bfloat16-half-train",
    "bfloat16-half-eval",
    "train-offset1e6-half",
    "train-offset1e6-none",
    "eval-offset1e6-half",
    "offset1e6-renorm",
    "train-huge-none",
    "nan_padding-plain-train",
    "frozen-half",
]


@pytest.mark.parametrize("case", CHOSEN, ids=lambda case: case.name)
@pytest.mark.parametrize("compiled", _MODES)
@pytest.mark.parametrize("path", _FUSED)
def test_path_meets_the_specification(path: str, compiled: str | None, case: Case) -> None:
    run = partial(keras_path.run, fused=_FUSED[path], compiled=compiled)
    tolerance = tolerances.PLAIN_FLOAT32 if path == "plain" else tolerances.FLOAT32
    check(Path(run, False, tolerance), case)


@pytest.mark.skipif(keras_backend.NAME == "torch", reason="Keras does not use XLA with torch")
@pytest.mark.parametrize("name", XLA)
def test_under_xla(name: str) -> None:
    case = next(case for case in CASES if case.name == name)
    run = partial(keras_path.run, compiled="xla")
    check(Path(run, False, tolerances.PLAIN_FLOAT32), case)
