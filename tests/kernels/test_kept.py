"""Codes and rows, which Python and the kernels must number alike."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.kernels.kept import ACTIVATIONS, BYTES, STATISTICS, TYPES


def test_extension_numbers_types_activations_and_rows_alike() -> None:
    cpu = pytest.importorskip("batchnorm.kernels._cpu")
    assert cpu.TYPES == TYPES
    assert {None if name == "none" else name: n for name, n in cpu.ACTIVATIONS.items()} == (
        ACTIVATIONS
    )
    assert cpu.STATISTICS == STATISTICS


@pytest.mark.parametrize("name", ["float16", "float32", "float64"])
def test_bytes_are_those_of_the_type(name: str) -> None:
    assert np.dtype(name).itemsize == BYTES[name]


def test_every_type_has_its_bytes() -> None:
    assert BYTES.keys() == TYPES.keys()
