"""The GPU's kernels, compiled on a machine without a GPU, have the properties in their comments."""

from __future__ import annotations

import re
import subprocess
from typing import Any

import pytest
import torch

from batchnorm.core.config import Options
from batchnorm.core.layout import make_layout
from batchnorm.core.running import Running
from batchnorm.kernels.geometry import find_geometry
from batchnorm.kernels.schedules import visiting
from batchnorm.kernels.select import is_interpreting, triton_status

pytestmark = pytest.mark.skipif(
    triton_status().kernel is None or is_interpreting(),
    reason=f"no compiler: {triton_status().reason}",
)
CASES = {
    "rows": ((4194304, 64), torch.float32, False),
    "image": ((256, 256, 56, 56), torch.bfloat16, True),
    "small": ((32, 64), torch.float32, False),
    "visited-image": ((16, 256, 14, 14), torch.float32, True),
    "visited-rows": ((520, 2048), torch.bfloat16, True),
}


class _Driver:
    """The part of a driver that compilation needs."""

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
    """The kernels that a step would launch, only compiled: pairs of name and assembly."""
    import triton

    from batchnorm.kernels.triton import launch

    found: list[tuple[str, str]] = []

    def compile_only(
        self: Any, kernel: Any, programs: int, *arguments: Any, warps: int = 0
    ) -> None:
        warps = warps or self.tiling.warps
        made = kernel.warmup(*arguments, grid=(programs,), num_warps=warps, enable_fp_fusion=False)
        assert made.asm["cubin"]
        found.append((kernel.__name__, made.asm["ptx"]))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.runtime.driver, "_active", _Driver())
    monkeypatch.setattr(launch.Plan, "_launch", compile_only)
    monkeypatch.setattr(launch, "_count_batch", lambda flags, running: None)
    # The sizes are those of large arrays, without their memory: nothing runs.
    monkeypatch.setattr(
        launch.Plan, "_new", lambda self, x, size: torch.empty(8, dtype=torch.float64)
    )
    return found


def spilled_bytes(assembly: str, folder: Any) -> int:
    """The bytes that ptxas spills from registers to memory."""
    from triton.backends.nvidia.compiler import get_ptxas

    source = folder / "kernel.ptx"
    source.write_text(assembly)
    target = re.search(r"\.target (sm_(\d+)\w*)", assembly)
    assert target is not None
    ptxas = get_ptxas(int(target[2])).path  # there are two, for older and for newer cards
    command = [ptxas, "-v", f"--gpu-name={target[1]}", source, "-o", folder / "kernel.cubin"]
    told = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return sum(int(n) for n in re.findall(r"(\d+) bytes spill", told))


@pytest.mark.parametrize("name", CASES)
def test_kernels_compile(name: str, compiled: Any, tmp_path: Any) -> None:
    from batchnorm.kernels.triton.arguments import Array, Mask, Parameters
    from batchnorm.kernels.triton.launch import Plan

    shape, dtype, residual = CASES[name]
    layout = make_layout(shape, 1)
    geometry = find_geometry(layout, torch.empty(shape, device="meta").stride())
    assert geometry is not None
    plan = Plan(layout, geometry, str(dtype).removeprefix("torch."))
    array, channels = Array(torch.empty(16, dtype=dtype), geometry.row), torch.empty(16)
    extra = array if residual else Array(None)
    mask = Mask(torch.empty(16, dtype=torch.uint8), 1, geometry.inner, int(geometry.inner > 1))
    options = Options(activation="relu" if residual else None)
    running = Running(channels, channels, torch.empty(16, dtype=torch.int64))
    parameters = Parameters(channels, channels)
    with visiting(name.startswith("visited")):
        kept = plan.forward(
            *(array, extra, mask, array, parameters, running, options),
            batch=True,
            update=True,
            kept=None,
        )
        arrays = (array, array, extra, array, extra)
        plan.backward(*arrays, mask, parameters, kept, options, batch=True)
    names = [kernel for kernel, _ in compiled]
    whole = ["forward_whole", "backward_whole"]
    assert len(names) == 6 if name in ("rows", "image") else names == whole
    for kernel, assembly in compiled:
        # Rounds as the interpreter does, so that interpreted tests hold for the GPU.
        assert not re.search(r"\b(fma|mad)\.(rn|rz)?\.?f(32|64)", assembly), kernel
        assert not re.search(r"\.(approx|full|ftz)\b", assembly), kernel
        assert not re.search(r"\b(atom|red)\.", assembly), kernel
        assert spilled_bytes(assembly, tmp_path) == 0, kernel
        if kernel not in ("finish_channels", "merge_gradients"):
            assert ".v4.b32" in assembly, f"{kernel}: loads are not 16 bytes wide"
