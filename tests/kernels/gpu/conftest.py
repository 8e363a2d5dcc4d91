"""The GPU's kernels in Triton's interpreter, on the CPU: in processes with TRITON_INTERPRET=1."""

from __future__ import annotations

from typing import Any

import pytest

from batchnorm.kernels.select import triton_status

if triton_status().kernel is None:
    collect_ignore_glob = ["test_*"]


@pytest.fixture(scope="session", autouse=True)
def _patch_the_language_once() -> Any:
    """Spare the interpreter most of its time.

    It patches triton.language when a kernel starts, and again at each call of a function of it.
    """
    from triton.runtime.interpreter import InterpretedFunction

    call, patched = InterpretedFunction.__call__, set()

    def call_once_patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        module = self.fn.__module__
        if module.startswith("batchnorm.") or module in patched:
            return self.rewrite()(*args, **kwargs)
        patched.add(module)
        return call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InterpretedFunction, "__call__", call_once_patched)
        yield


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cut small arrays as large ones are: into several parts, blocks and launches."""
    from batchnorm.kernels.triton import tiling
    from batchnorm.torch import prepared

    limits = tiling.Limits(
        tile=256, row=16, stretch=64, short_stretch=16, programs=6, together=2, whole=0, merged=16
    )
    monkeypatch.setattr(tiling, "LIMITS", limits)
    prepared.prepare.cache_clear()
    yield limits
    prepared.prepare.cache_clear()
