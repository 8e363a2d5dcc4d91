"""Settings for every test of the JAX front end, and which of their cases `make test` runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every test compiles its cases: one of two is left to `make test-all`."""
    for item in items:
        if HERE in item.path.parents and item.get_closest_marker("sample") is None:
            item.add_marker(pytest.mark.sample(2))


@pytest.fixture(autouse=True)
def _strict_promotion() -> Iterator[None]:
    # For the test alone: other tests of the same process use libraries that mix types.
    with jax.numpy_dtype_promotion("strict"):
        yield
