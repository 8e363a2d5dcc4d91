"""Helpers beside the tests, and which of them `make test` runs on backends that compile."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))

collect_ignore = ["data"]  # the script there needs Keras 2

# What has cases or backends of its own.
_WHOLE = {"test_keras_conformance.py", "test_tensorflow.py", "test_private_keras.py"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Keras on torch runs all tests; the backends that compile run one in four, tools one in eight.

    `make test-all` runs all of them on every backend.
    """
    if os.environ.get("KERAS_BACKEND") not in ("jax", "tensorflow"):
        return
    own = [i for i in items if HERE in i.path.parents and i.path.name not in _WHOLE]
    for number, item in enumerate(own):
        if number % (8 if "tools" in item.path.parts else 4) != 0:
            item.add_marker(pytest.mark.exhaustive)
