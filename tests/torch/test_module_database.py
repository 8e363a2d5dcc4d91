"""torch's own module database, `torch.testing._internal.common_modules`, on our layers.

The database has constructor arguments and inputs of torch's batch norms for torch's tests. Each
of them must give on ours what it gives on torch's, but for two cases that the specification has
otherwise: an empty batch does not count (S6), and eps may be 0.
"""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm1d, BatchNorm2d, BatchNorm3d

# Its imports need a package that torch's wheel does not require.
pytest.importorskip("expecttest", reason="torch.testing._internal needs expecttest")
database = importlib.import_module("torch.testing._internal.common_modules")

OURS = {"BatchNorm1d": BatchNorm1d, "BatchNorm2d": BatchNorm2d, "BatchNorm3d": BatchNorm3d}
TOLERANCE = {torch.float32: 2e-5, torch.float64: 1e-12}
CASES = [
    pytest.param(name, dtype, training, id=f"{name}-{dtype}-{training}")
    for name in OURS
    for dtype in TOLERANCE
    for training in (True, False)
]


def _samples(name: str, dtype: torch.dtype, training: bool, *, faulty: bool = False) -> list[Any]:
    info = next(i for i in database.module_db if i.module_cls is getattr(nn, name))
    make = info.module_error_inputs_func if faulty else info.module_inputs_func
    torch.manual_seed(0)
    found: list[Any] = make(info, "cpu", dtype, requires_grad=True, training=training)
    return found


def _run(layer: nn.Module, x: Tensor, cotangent: Tensor) -> list[Tensor]:
    x = x.detach().clone().requires_grad_()
    y = layer(x)
    y.backward(cotangent)
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    return [y.detach(), *(g for g in gradients if g is not None), *layer.buffers()]


@pytest.mark.parametrize(("name", "dtype", "training"), CASES)
def test_every_input_gives_what_torchs_layer_gives(
    name: str, dtype: torch.dtype, training: bool
) -> None:
    samples = _samples(name, dtype, training)
    assert samples
    for sample in samples:
        made = sample.constructor_input
        layers = []
        for cls in (OURS[name], getattr(nn, name)):
            layer = cls(*made.args, **made.kwargs, dtype=dtype).train(training)
            layers.append(layer)
        (x,) = sample.forward_input.args
        cotangent = torch.randn_like(x)
        ours, theirs = (_run(layer, x, cotangent) for layer in layers)
        if x.numel() == 0 and training:
            assert (ours.pop(), theirs.pop()) == (0, 1)
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(
                a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype], check_dtype=False
            )


@pytest.mark.parametrize("name", OURS)
def test_a_negative_eps_is_refused_and_zero_is_taken(name: str) -> None:
    samples = _samples(name, torch.float32, True, faulty=True)
    assert samples
    for sample in samples:
        made = sample.module_error_input.constructor_input
        call = sample.module_error_input.forward_input
        if made.kwargs["eps"] == 0:
            OURS[name](*made.args, **made.kwargs)(*call.args)
            continue
        with pytest.raises(sample.error_type):
            OURS[name](*made.args, **made.kwargs)(*call.args)
