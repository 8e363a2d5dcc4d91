"""Devices without float64: no path asks for it there, and S3 holds by two float32.

`narrow_device` plays such a device eagerly, and the whole table runs on it (`torch_path`); of
graphs, which are traced for the device "meta", every operation's type is looked at.
"""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import batchnorm
from batchnorm.tools import fold, recalibrate, transfer
from batchnorm.torch import BatchNorm, accumulate_statistics, devices
from batchnorm.torch.explicit import BatchNorm as Explicit
from batchnorm.verification import tolerances
from narrow_device import Narrow, narrow_device, to_narrow


def test_the_device_refuses_float64() -> None:
    with narrow_device() as device:
        assert not devices.has_float64(device)
        x = Narrow(torch.zeros(3))
        for make in (x.double, lambda: torch.zeros(3, dtype=torch.float64, device=device)):
            with pytest.raises(TypeError, match=r"has no torch\.float64"):
                make()
        with pytest.raises(AssertionError, match="brings float64"):
            torch.zeros(3, dtype=torch.float64).to(device)
        with pytest.raises(AssertionError, match="two devices"):
            _ = x + torch.zeros(3)
        assert x.cpu().double().dtype is torch.float64
    assert devices.has_float64(device)  # outside it is no device that the library knows


def numbers(rows: int, offset: float) -> np.ndarray:
    x = np.random.default_rng(0).normal(size=(rows, 3)) + offset
    return x.astype(np.float32)


def test_s3_holds_at_many_rows() -> None:
    x = numbers(200_000, 1e6)
    expected, moments = batchnorm.batch_norm(x)
    with narrow_device():
        layer = to_narrow(BatchNorm(3, momentum=1.0))
        y = layer(Narrow(torch.from_numpy(x))).detach().cpu().numpy()
        var = layer.running_var.cpu().numpy()
    assert np.abs(y - expected).max() <= (tolerances.PLAIN_FLOAT32 * (1 + np.abs(expected))).min()
    unbiased = moments.var * len(x) / (len(x) - 1)
    np.testing.assert_allclose(var, unbiased, rtol=tolerances.PLAIN_FLOAT32)


def test_many_passes_count_as_one_batch() -> None:
    """S21: sums in float32 of 64 passes, each at an offset of 1e6 deviations."""
    x = numbers(64 * 50, 1e6)
    _, moments = batchnorm.batch_norm(x)
    with narrow_device():
        layer = to_narrow(BatchNorm(3, momentum=1.0))
        with accumulate_statistics(layer):
            for part in np.split(x, 64):
                layer(Narrow(torch.from_numpy(part)))
        mean, var = layer.running_mean.cpu().numpy(), layer.running_var.cpu().numpy()
    half_ulp = tolerances.HALF_ULP["float32"] * 1e6
    assert np.abs(mean - moments.mean).max() <= tolerances.PLAIN_FLOAT32 + half_ulp
    unbiased = moments.var * len(x) / (len(x) - 1)
    np.testing.assert_allclose(var, unbiased, rtol=tolerances.PLAIN_FLOAT32)


def test_the_explicit_layer_asks_for_none() -> None:
    x, dy = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
    plain = Explicit()
    plain.initialise_layer(input_shape=(3,))
    y, dx = plain.forward(x, training=True), plain.backward(dy)
    with narrow_device() as device:
        layer = Explicit()
        layer.initialise_layer(input_shape=(3,), device=device)
        found = layer.forward(Narrow(x), training=True), layer.backward(Narrow(dy))
        for here, there in zip(found, (y, dx), strict=True):
            torch.testing.assert_close(here.cpu(), there)


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 3), BatchNorm(3))


def test_tools_ask_for_none() -> None:
    batches = [torch.randn(16, 5) for _ in range(4)]
    plain = model()
    recalibrate(plain, batches)
    with narrow_device():
        narrow = to_narrow(model())
        recalibrate(narrow, [Narrow(batch) for batch in batches])
        torch.testing.assert_close(narrow[1].running_var.cpu(), plain[1].running_var)
        transfer(plain, narrow)
        folded = fold(narrow.eval()).model
        y = folded(Narrow(batches[0])).detach().cpu()
    torch.testing.assert_close(y, plain.eval()(batches[0]).detach())


class _SeenError(Exception):
    """The end of a trace."""


GRAPHS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"renorm": True},
    "relu": {"activation": "relu"},
    "zeroed": {"padded_output": "zero"},
    "debias": {"debias": True},
    "cumulative": {"momentum": None},
    "synchronized": {"synchronized": True},
    "synchronized_ghost": {"synchronized": True, "virtual_batch_size": 4},
    "synchronized_renorm": {"synchronized": True, "renorm": True},
}


@pytest.mark.sample(12)
@pytest.mark.parametrize("passes", [False, True], ids=["alone", "passes"])
@pytest.mark.parametrize("masked", [False, True], ids=["whole", "masked"])
@pytest.mark.parametrize("options", GRAPHS.values(), ids=GRAPHS.keys())
def test_no_operation_of_a_graph_is_float64_on_the_device(
    monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], masked: bool, passes: bool
) -> None:
    monkeypatch.setattr(devices, "_NARROW", {"meta"})
    on_device, wide = 0, []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal on_device
        for node in graph.graph.nodes:
            a = node.meta.get("example_value")
            if isinstance(a, Tensor) and a.device.type == "meta":
                on_device += 1
                if a.dtype is torch.float64:
                    wide.append(f"{node.target} of {node.args}")
        raise _SeenError

    layer = BatchNorm(3, device="meta", **options)
    x = torch.empty(8, 3, 5, device="meta", requires_grad=True)
    mask = torch.empty(8, 5, dtype=torch.bool, device="meta") if masked else None
    torch._dynamo.reset()
    block = accumulate_statistics(layer) if passes else nullcontext()
    with block, pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="_SeenError"):
        torch.compile(layer, backend=look, fullgraph=True)(x, mask)
    assert wide == []
    assert on_device > 10
