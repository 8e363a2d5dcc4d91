"""Transformations, which only the JAX backend has."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

if keras.backend.backend() != "jax":
    pytest.skip("needs the JAX backend", allow_module_level=True)

import jax

from batchnorm.keras import BatchNormalization


def test_kernel_demanded_under_vmap_says_why_there_is_none() -> None:
    layer = BatchNormalization(fused=True)
    layer.build((None, 3))
    values = [[w.value for w in a] for a in (layer.trainable_weights, layer.non_trainable_weights)]

    def call(x: Any) -> Any:
        return layer.stateless_call(*values, x, training=True)[0]

    x = np.random.default_rng(0).normal(2.0, 3.0, (2, 8, 3)).astype("float32")
    with pytest.raises(ValueError, match="fused=True demands a kernel, but there is none under"):
        jax.vmap(call)(x)
    expected = (x[0] - x[0].mean(0)) / np.sqrt(x[0].var(0) + 1e-3)
    np.testing.assert_allclose(call(x[0]), expected, atol=1e-5)  # without vmap there is one
