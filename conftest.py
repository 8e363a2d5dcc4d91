"""The choice of the tests that a process collects.

Keras has one backend per process, and Triton either interprets kernels or compiles them: the
environment decides both before the import.
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec

import pytest

# "some": `make test`. "rest": the tests that `make test-all` adds. "all": both.
_CHOICE = os.environ.get("BATCHNORM_TESTS", "some")
_SHARE = int(os.environ.get("BATCHNORM_SHARE", "1"))  # of "rest": one test in so many
_SLOW_EXAMPLES = {"batchnorm.verification.verify"}  # of docstrings
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
if find_spec("timm") is None:
    collect_ignore_glob.append("src/batchnorm/torch/guests/timm.py")


def pytest_configure(config: pytest.Config) -> None:
    """Name the markers."""
    config.addinivalue_line("markers", "requires_trainable_backend: Keras's own")
    config.addinivalue_line("markers", "exhaustive: slow for what it adds; `make test-all`")
    config.addinivalue_line("markers", "sample(n): one case in n; the others are exhaustive")
    config.addinivalue_line("markers", "gpu: runs on a CUDA device, skipped without one")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Choose among the tests, unless a marker does."""
    for item in items:
        if item.name in _SLOW_EXAMPLES:
            item.add_marker(pytest.mark.exhaustive)
    _thin(items)
    if _CHOICE == "all" or config.option.markexpr:
        return
    wanted = _CHOICE == "rest"
    kept = [i for i in items if (i.get_closest_marker("exhaustive") is not None) == wanted]
    kept = kept[::_SHARE] if wanted else kept
    if len(kept) < len(items):
        chosen = set(kept)
        config.hook.pytest_deselected(items=[i for i in items if i not in chosen])
        items[:] = kept


def _thin(items: list[pytest.Item]) -> None:
    """Mark as exhaustive what `sample(n)` leaves out of a test's cases."""
    seen: Counter[str] = Counter()
    for item in items:
        marker = item.get_closest_marker("sample")
        if marker is not None:
            test = item.nodeid.partition("[")[0]
            if seen[test] % marker.args[0] != 0:
                item.add_marker(pytest.mark.exhaustive)
            seen[test] += 1
