"""Which tests a process collects.

Keras has one backend a process, and Triton interprets kernels or does not: both are decided by
the environment before the import.
"""

from __future__ import annotations

import os
from importlib.util import find_spec

import pytest

_ALL = os.environ.get("BATCHNORM_TEST_ALL") == "1"  # `make test-all`
_BACKENDS = ("tensorflow", "jax", "torch")
_ACTIVE = os.environ.get("KERAS_BACKEND")

if _ACTIVE is None:
    # `tests/run.py` starts a process for each backend. Here nothing may import Keras, which
    # brings TensorFlow: Triton, which torch's compiler imports, crashes when loaded after it.
    collect_ignore_glob = ["src/batchnorm/*keras*", "tests/*keras*"]
else:
    others = [name for name in _BACKENDS if name != _ACTIVE]
    collect_ignore_glob = [f"src/batchnorm/keras/backends/{name}*" for name in others]


if os.environ.get("TRITON_INTERPRET") != "1":
    collect_ignore_glob.append("tests/kernels/gpu/*")
if find_spec("triton") is None:  # there are wheels for Linux only
    collect_ignore_glob += [
        "src/batchnorm/kernels/triton/*",
        "src/batchnorm/torch/kernels/on_gpu.py",
    ]
    collect_ignore_glob += ["tests/kernels/ptx/*"]


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers."""
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own")
    config.addinivalue_line("markers", "exhaustive: large or slow; only `make test-all` runs it")
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, skipped without one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave out what only `make test-all` runs, unless it is asked for by a marker."""
    if _ALL or config.option.markexpr:
        return
    left_out = [item for item in items if item.get_closest_marker("exhaustive")]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]
