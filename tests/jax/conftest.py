"""Settings for every test of the JAX front end."""

from __future__ import annotations

from collections.abc import Iterator

import jax
import pytest


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    # For the test alone: other tests of the same process use libraries that mix types.
    with jax.numpy_dtype_promotion("strict"):
        yield
