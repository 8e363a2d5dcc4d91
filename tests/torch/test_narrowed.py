"""Running statistics that somebody casts past the layer (S16)."""

from __future__ import annotations

import warnings

import pytest
import torch

from batchnorm.torch import BatchNorm

STATISTICS = ("running_mean", "running_var")
RENORM = ("running_stddev", "renorm_mean", "renorm_stddev")


def narrow(layer, dtype, names=STATISTICS):
    for name in names:
        buffer = getattr(layer, name)
        buffer.data = buffer.data.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("renorm", [False, True])
def test_a_training_step_widens_them_in_place_and_warns_once(dtype, renorm):
    layer = BatchNorm(2, renorm=renorm)
    names = STATISTICS + (RENORM if renorm else ())
    buffers = [getattr(layer, name) for name in names]
    layer(torch.randn(8, 2))
    layer(torch.randn(8, 2))  # by the memory of last calls from here on
    narrow(layer, dtype, names)
    with pytest.warns(UserWarning, match=rf"BatchNorm: running_mean.* cast to {dtype}.*float32"):
        layer(torch.randn(8, 2))
    assert all(getattr(layer, n) is b for n, b in zip(names, buffers, strict=True))
    assert all(b.dtype is torch.float32 for b in buffers)
    narrow(layer, dtype, names)
    layer(torch.randn(8, 2))  # warnings are errors here
    assert all(b.dtype is torch.float32 for b in buffers)


def test_the_warning_shows_the_line_of_the_call():
    layer = BatchNorm(2)
    narrow(layer, torch.bfloat16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        layer(torch.randn(8, 2))
    assert [w.filename for w in caught] == [__file__]


def test_the_average_does_not_stall_after_a_cast():
    layer = BatchNorm(1)
    narrow(layer, torch.bfloat16)
    with pytest.warns(UserWarning, match="float32 again"):
        layer(torch.randn(64, 1) + 100.0)
    for _ in range(200):
        layer(torch.randn(64, 1) + 100.0)
    # Five deviations of the average: 1/√64 of each batch, √(0.1/1.9) of a batch's.
    assert layer.running_mean.item() == pytest.approx(100.0, abs=5 * 0.125 * 0.23)


def test_a_compiled_layer_widens_them_too():
    layer = BatchNorm(2)
    compiled = torch.compile(layer, backend="aot_eager")
    compiled(torch.randn(8, 2))
    narrow(layer, torch.bfloat16)
    with pytest.warns(UserWarning, match="float32 again"):
        compiled(torch.randn(8, 2))
    assert layer.running_mean.dtype is torch.float32


def test_evaluation_and_frozen_layers_read_them_as_they_are():
    layer = BatchNorm(2)
    narrow(layer, torch.bfloat16)
    layer.freeze()(torch.randn(8, 2))
    layer.unfreeze().eval()(torch.randn(8, 2))
    assert layer.running_mean.dtype is torch.bfloat16
