"""Sums in float32 hold S3 where they are used, and are not used where they would not."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm

pytestmark = pytest.mark.skipif(extension.missing_reason() is not None, reason="no kernels")
UNIT = 2.0**-24
BOUND = 2.3e-6  # of the variance, as native/passes/soundness.hpp derives it
TOLERANCE = 5e-6  # S3
ROWS = 4096
SAMPLES = [k * (ROWS // 16) + k * 7919 % (ROWS // 16) for k in range(16)]


def normal(seed=0):
    return torch.randn(ROWS, 24, generator=torch.Generator().manual_seed(seed))


def outliers_as_anchors():
    x = normal()
    x[SAMPLES] += 1e4
    return x


def one_outlier():
    x = normal()
    x[SAMPLES[3]] = 1e7
    return x


def drift():
    return normal() * 1e-3 + torch.linspace(-500, 700, ROWS)[:, None]


def steps_between_samples():
    x = normal()
    x[ROWS // 2 :] += 1e3
    x[SAMPLES] = 0.0
    return x


CASES = {
    "offset 1e6": lambda: normal() + 1e6,
    "offset -1e6, small": lambda: (normal() + 1e6) * -1e-9,
    "outliers as anchors": outliers_as_anchors,
    "one outlier": one_outlier,
    "drift": drift,
    "steps between samples": steps_between_samples,
    "1e18": lambda: normal() * 1e18,
    "1e18 as an offset": lambda: normal() * 1e12 + 1e18,
    "variance of 1e-30": lambda: normal() * 1e-15,
    "squares below float32": lambda: normal() * 1e-25,
    "squares above float32": lambda: normal() * 1e19,
    "sums of zero": lambda: 1e-30 * (1 - 2 * (torch.arange(ROWS) % 2))[:, None].expand(-1, 24),
    "constant": lambda: torch.full((ROWS, 24), 0.1),
    "zeros": lambda: torch.zeros(ROWS, 24),
}
LAYOUTS = {
    "rows": lambda x: (x, None),
    "few channels": lambda x: (x[:, :3].contiguous(), None),
    "signals": lambda x: (x.reshape(4, ROWS // 4, 24).transpose(1, 2).contiguous(), None),
    "images": lambda x: (x.reshape(64, 8, 8, 24).permute(0, 3, 1, 2).contiguous(), None),
}


def moments(x, eps=1e-5, **options):
    """Mean and biased variance of a training step, from the running statistics, and y."""
    layer = BatchNorm(x.shape[1], momentum=1.0, eps=eps, affine=False, **options)
    y = layer(x)
    return layer.running_mean.double(), layer.running_var.double() * (1 - 1 / ROWS), y


def expected(x, eps=1e-5):
    axes = [0, *range(2, x.ndim)]
    wide = x.double()
    mean = wide.mean(axes)
    shape = [1, -1] + [1] * (x.ndim - 2)
    centred = wide - mean.reshape(shape)
    centred = centred - centred.mean(axes, keepdim=True)
    var = centred.square().mean(axes)
    return mean, var, centred / (var.reshape(shape) + eps).sqrt()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_moments_are_within_the_specification(make, layout):
    x, _ = layout(make().float())
    mean, var, y = moments(x)
    right_mean, right_var, right_y = expected(x)
    rounding = 2 * UNIT * right_mean.abs() + 2.0**-149
    assert ((mean - right_mean).abs() <= TOLERANCE * right_var.sqrt() + rounding).all()
    assert ((var - right_var).abs() <= TOLERANCE * right_var + 2.0**-149).all()
    assert ((y - right_y).abs() <= TOLERANCE * (1 + right_y.abs())).all()


def test_the_bound_holds_where_every_square_rounds_the_same_way():
    from batchnorm.kernels import _cpu

    size = 1 + torch.arange(1 << 15) * UNIT * 2
    error = (size * size).double() / size.double().square() - 1
    worst = size[error.abs().argmax()]
    x = torch.where(torch.arange(ROWS) % 2 == 0, worst, -worst)
    x[SAMPLES] = torch.where(torch.arange(16) % 2 == 0, worst, -worst)  # so that the anchor is 0
    rows = {"outer": ROWS, "channels": 1, "inner": 1, "groups": 1, "run": 1, "row": 1}
    plan = _cpu.Plan(type=_cpu.TYPES["float32"], **rows, activation=0, zero_padding=False)
    kept = plan.moments(x=x.data_ptr(), mask=0, threads=1)
    var = kept.row(_cpu.STATISTICS["var"]).item()
    off = abs(var / worst.double().square().item() - 1)
    assert UNIT / 2 < off < BOUND  # the first: such inputs do use the sums in float32


def test_bits_of_a_channel_do_not_depend_on_others_that_are_summed_again():
    x = normal()
    spoiled = x.clone()
    spoiled[:, 5] = drift()[:, 5]
    spoiled[:, 6] = float("nan")
    spoiled[:, 11] *= 1e25
    others = [c for c in range(24) if c not in (5, 6, 11)]
    for one, other in zip(moments(x)[:2], moments(spoiled)[:2], strict=True):
        assert torch.equal(one[others], other[others])


@pytest.mark.parametrize("size", [1.0, 1e-20, 1e-36, 1e-41, 1e30])
@pytest.mark.parametrize("deviation", [1.0, 1e-12, 1e12])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_gradients_of_any_size(size, deviation, layout):
    x, _ = layout(normal() * deviation)
    dy, _ = layout(normal(1) * size)
    layer = BatchNorm(x.shape[1], eps=1e-30)
    x.requires_grad_()
    layer(x).backward(dy)
    axes = [0, *range(2, x.ndim)]
    xhat = expected(x.detach(), 1e-30)[2]
    sizes = (dy.double() * xhat).abs().sum(axes)
    least = ROWS * 2.0**-149
    assert ((layer.bias.grad - dy.double().sum(axes)).abs() <= 4 * UNIT * dy.abs().sum(axes)).all()
    right = (dy.double() * xhat).sum(axes)
    assert ((layer.weight.grad - right).abs() <= TOLERANCE * sizes + least).all()
    assert x.grad.isfinite().all() or size / deviation > 1e38


@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_masked_and_packed_rows_have_the_same_bits(offset):
    x, keep = normal() + offset, torch.rand(ROWS, generator=torch.Generator().manual_seed(2)) < 0.4
    x[~keep] = float("nan")
    masked, packed = BatchNorm(24), BatchNorm(24)
    y = masked(x, mask=keep)
    assert torch.equal(y[keep], packed(x[keep]))
    assert torch.equal(masked.running_var, packed.running_var)
