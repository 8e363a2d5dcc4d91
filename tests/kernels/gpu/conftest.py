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
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the kernels that are launched."""
    from batchnorm.kernels.triton import launch

    names: list[str] = []
    launch_once = launch.Plan._launch

    def launch_and_note(self: Any, kernel: Any, *rest: Any, **more: Any) -> None:
        names.append(kernel.__name__)
        launch_once(self, kernel, *rest, **more)

    monkeypatch.setattr(launch.Plan, "_launch", launch_and_note)
    return names


@pytest.fixture
def pieces() -> Any:
    """Cut small arrays as large ones are: into several parts, blocks and launches."""
    import triton_path

    with triton_path.pieces() as limits:
        yield limits
