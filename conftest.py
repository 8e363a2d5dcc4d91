"""Which tests a process collects: Keras has one backend a process, chosen before it is imported."""

from __future__ import annotations

import os

import pytest

_BACKENDS = ("tensorflow", "jax", "torch")
_ACTIVE = os.environ.get("KERAS_BACKEND")

if _ACTIVE is None:  # `tests/run.py` starts a process for each backend
    collect_ignore_glob = ["tests/keras/*", "src/batchnorm/keras/*"]
else:
    others = [name for name in _BACKENDS if name != _ACTIVE]
    collect_ignore_glob = [f"src/batchnorm/keras/backends/{name}*" for name in others]


def pytest_configure(config: pytest.Config) -> None:
    """Name the marker that Keras's own tests have."""
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own")
