"""The GPU's kernels, compiled for a card and executed instruction by instruction on the CPU.

No card is needed, and no interpreter: `ptx_driver` takes the place of CUDA's. What runs is the
PTX that Triton emits, with its threads, its shared memory and its barriers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from batchnorm.kernels.select import is_interpreting, triton_status

if triton_status().kernel is None or is_interpreting():
    collect_ignore_glob = ["*.py"]


@pytest.fixture(scope="session")
def compiled_kernels(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The folder that keeps compiled kernels for the whole session."""
    return tmp_path_factory.mktemp("triton")


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, compiled_kernels: Any) -> Iterator[Any]:
    """A driver on which `fused=True` runs the GPU's kernels on tensors of the CPU."""
    import triton

    from batchnorm.kernels import select
    from batchnorm.kernels.triton import launch
    from batchnorm.torch.kernels import decision, step
    from ptx_driver import Driver, leave_out_binaries

    driver = Driver()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(compiled_kernels))
    monkeypatch.setenv("TRITON_DISABLE_LINE_INFO", "1")
    monkeypatch.setattr(triton.knobs.runtime, "add_stages_inspection_hook", leave_out_binaries)
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    monkeypatch.setattr(select, "is_interpreting", lambda: True)

    def unset(make: Any) -> Any:
        def made(*arguments: Any) -> Tensor | None:
            found = make(*arguments)
            return None if found is None else driver.declare_unset(found)

        return made

    for owner, name in (
        (launch.Plan, "_new"),
        (launch.Plan, "_new_flags"),
        (step, "empty_output"),
    ):
        monkeypatch.setattr(owner, name, unset(getattr(owner, name)))
    decision.decide.cache_clear()
    yield driver
    decision.decide.cache_clear()


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Cut arrays of some thousand elements as large ones are: several programs, loops, launches.

    Tiles keep their size, which decides the number of warps of a program.
    """
    from batchnorm.kernels.triton import tiling
    from batchnorm.torch.kernels import decision

    limits = tiling.LIMITS._replace(programs=8, whole=0, merged=16)
    monkeypatch.setattr(tiling, "LIMITS", limits)
    decision.decide.cache_clear()
    return limits
