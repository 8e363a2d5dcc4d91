"""The GPU's kernels on a GPU: `pytest -m gpu tests/gpu`."""

from __future__ import annotations

from functools import partial
from pathlib import Path as Folder
from typing import Any

import pytest
import torch

import batchnorm
import torch_path
from batchnorm.kernels import proofs
from batchnorm.kernels.select import triton_status
from batchnorm.torch import BatchNorm
from batchnorm.torch.ways import proof
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path, check
from cases import CASES, Case

if triton_status().kernel is not None:
    from batchnorm.kernels.triton import launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.skipif(triton_status().kernel is None, reason=triton_status().reason),
]
# Cases that kernels serve, and cases of the plain path.
PATH = Path(partial(torch_path.run, device="cuda"), True, tolerances.FLOAT32)


# Without a device, one skip says so.
@pytest.mark.parametrize(
    "case", CASES if torch.cuda.is_available() else CASES[:1], ids=lambda case: case.name
)
def test_path_meets_the_specification_on_a_device(case: Case) -> None:
    check(PATH, case)


@pytest.mark.parametrize("shape", [(100003, 64), (64, 48, 31, 33), (32, 64)])
def test_bits_are_the_same_each_time(shape: tuple[int, ...]) -> None:
    x, mask = torch.randn(shape, device="cuda"), torch.rand(shape[0], device="cuda") < 0.5
    found = []
    for _ in range(2):
        layer, leaf = BatchNorm(shape[1], device="cuda", fused=True), x.clone().requires_grad_()
        layer(leaf, mask).square().sum().backward()
        found.append((leaf.grad, layer.weight.grad, layer.running_mean, layer.running_var))
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)


def test_a_layer_takes_the_kernels_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    launched = []
    launch_once = launch.Plan._launch

    def count(self: launch.Plan, *arguments: Any) -> None:
        launched.append(arguments[0])
        launch_once(self, *arguments)

    monkeypatch.setattr(launch.Plan, "_launch", count)
    layer, x = BatchNorm(8, device="cuda"), torch.randn(64, 8, device="cuda", requires_grad=True)
    layer(x).sum().backward()
    assert len(launched) >= 2
    torch.compile(layer, fullgraph=True)(x).sum().backward()
    assert len(launched) >= 4


def test_a_step_waits_for_nothing_and_can_be_captured() -> None:
    layer = BatchNorm(64, device="cuda", fused=True)
    x = torch.randn(4096, 64, device="cuda")
    mask = torch.zeros(4096, dtype=torch.bool, device="cuda")
    layer(x, mask)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x, mask)
    graph.replay()  # all rows are padding
    assert layer.num_batches_tracked.item() == 0
    assert y.isfinite().all()
    mask.fill_(True)
    graph.replay()
    assert layer.num_batches_tracked.item() == 1
    expected = BatchNorm(64, fused=False)(x.cpu())
    assert (y.cpu() - expected).abs().max() <= 5e-6


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_array_code_loses_no_digit_over_a_million_rows_at_an_offset(compiled: bool) -> None:
    x = torch.randn(1_000_003, 4, device="cuda", dtype=torch.float64).add_(1.234567e6).float()
    layer = BatchNorm(4, device="cuda", fused=False)
    y = (torch.compile(layer, fullgraph=True) if compiled else layer)(x)
    var, mean = torch.var_mean(x.double(), dim=0, correction=0)
    exact = (x.double() - mean) / torch.sqrt(var + layer.eps)
    assert ((y.double() - exact).abs() / (1 + exact.abs())).max() <= 5e-5


def test_each_stream_runs_its_own_step() -> None:
    x = torch.randn(100000, 16, device="cuda")
    streams = [torch.cuda.Stream() for _ in range(4)]
    found = []
    torch.cuda.synchronize()
    for stream in streams:
        with torch.cuda.stream(stream):
            found.append(BatchNorm(16, device="cuda", fused=True)(x))
    torch.cuda.synchronize()
    assert all(torch.equal(y, found[0]) for y in found)


def test_positions_beyond_32_bits() -> None:
    if torch.cuda.get_device_properties(0).total_memory < 24 * 2**30:
        pytest.skip("needs 24 GiB of memory")
    x = torch.randn(1, 1, 2**31 + 2**20, dtype=torch.float16, device="cuda")
    y = BatchNorm(1, affine=False, device="cuda", fused=True)(x)
    end = x[..., -1000:].double()
    mean, var = x.mean(dtype=torch.float64), x.float().var(unbiased=False).double()
    assert ((end - mean) / var.sqrt() - y[..., -1000:]).abs().max() <= 2e-3


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_compiled_is_whole_and_right(mode: str) -> None:
    case = next(c for c in CASES if c.name == f"residual_relu-half-{mode}")
    path = partial(torch_path.run, device="cuda", compiled="inductor")
    check(Path(path, True, tolerances.PLAIN_FLOAT32), case)


def test_the_kernels_prove_themselves_on_this_card(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Folder
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = proof._Proofs("force")
    assert found.refuse(("cuda", 0)) is None
    assert len(proofs.describe_known()) == 1


def test_verify_passes_on_this_card() -> None:
    found = batchnorm.verify("cuda", quick=True)
    assert found.passed, found
    assert ("torch", "kernels") in {(check.front_end, check.way) for check in found.checks}
