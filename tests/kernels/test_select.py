"""The choice of the kernel for a call."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch

from batchnorm.kernels import select
from batchnorm.torch.kernels import decision, on_cpu, tensors


def choose(device: str = "cuda", dtype: str = "float32", **options: Any) -> select.Choice:
    settings = {"adjusted": False, "per_channel_mask": False} | options
    return select.select_kernel(device, dtype, **settings)


@pytest.fixture
def with_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "triton_status", lambda: select.Choice("triton"))


@pytest.mark.usefixtures("with_triton")
def test_a_gpu_gets_triton_s_kernels_whatever_the_options() -> None:
    assert {choose(dtype=d).kernel for d in ("float16", "bfloat16", "float32", "float64")} == {
        "triton"
    }
    assert choose(adjusted=True) == (None, "none takes an adjustment")
    assert choose(per_channel_mask=True).kernel is None
    assert "complex64" in choose(dtype="complex64").reason
    assert "xpu" in choose("xpu").reason


@pytest.mark.usefixtures("with_triton")
def test_a_gpu_of_amd_gets_them_only_if_demanded(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "no test compiles them for AMD's GPUs" in choose("hip").reason
    assert choose("hip", demanded=True).kernel == "triton"
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert decision.choose("cuda", "float32", False, False, False).kernel is None
    monkeypatch.setattr(torch.version, "hip", None)
    assert decision.choose("cuda", "float32", False, False, False).kernel == "triton"


@pytest.mark.usefixtures("with_triton")
def test_the_cpu_gets_triton_s_kernels_only_if_demanded_and_interpreted(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    own = select.extension_status().kernel
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert choose("cpu", demanded=True).kernel == own
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert choose("cpu").kernel == own
    assert choose("cpu", demanded=True).kernel == "triton"


@pytest.mark.parametrize(
    ("found", "reason"), [(None, "is not installed"), ("3.6.0", "and 3.6.0 is installed")]
)
def test_without_a_triton_that_serves_the_reason_says_what_to_install(
    found: str | None, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(select, "find_spec", lambda name: found)
    monkeypatch.setattr(select, "version", lambda name: found)
    status = select.triton_status.__wrapped__()
    assert status.kernel is None
    assert "triton 3.7 or newer" in status.reason
    assert reason in status.reason


def test_a_gpu_without_triton_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "triton_status", lambda: select.Choice(None, "it is missing"))
    decision._warn_without_triton.cache_clear()
    with pytest.warns(RuntimeWarning, match=r"it is missing; on GPUs layers use plain array code"):
        decision.choose("cuda", "float32", False, False, False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision.choose("cuda", "float32", False, False, False)


def test_a_processor_without_triton_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision, "triton_status", lambda: select.Choice(None, "it is missing"))
    decision._warn_without_triton.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decision.choose("cpu", "float32", False, False, False)


@pytest.mark.skipif(
    select.triton_status().kernel is None, reason=f"{select.triton_status().reason}"
)
def test_both_families_of_kernels_have_one_interface() -> None:
    from batchnorm.torch.kernels import on_gpu

    def interface(module: Any) -> dict[str, list[str]]:
        return {
            name: list(inspect.signature(function).parameters)
            for name, function in vars(module).items()
            if inspect.isfunction(function)
            and function.__module__ == module.__name__
            and not name.startswith("_")
        }

    assert interface(on_cpu) == interface(on_gpu)


def test_tensors_on_different_devices_are_refused() -> None:
    x = torch.ones(2, 3)
    reason = tensors.refuse_tensors(x, (torch.ones(3, device="meta"),), None)
    assert reason == "there is none for a Tensor on device meta"
