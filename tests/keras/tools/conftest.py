"""The tools' tests with Keras on JAX: one in four in `make test`, all with Keras on torch."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the others as exhaustive: JAX compiles each operation of theirs."""
    if os.environ.get("KERAS_BACKEND") != "jax":
        return
    here = Path(__file__).parent
    own = [item for item in items if here in item.path.parents]
    for number, item in enumerate(own):
        if number % 4 != 0:
            item.add_marker(pytest.mark.exhaustive)
