"""Two passes in one visit to each channel give the bits of passes one after another."""

from __future__ import annotations

import pytest
import torch

from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm
from batchnorm.torch.call import make_call
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.records import Gradients, KernelStep, Rows, changes_dy
from batchnorm.torch.kernels.step import arrange
from batchnorm.torch.layer_call import gather_arguments

pytestmark = pytest.mark.skipif(extension.missing_reason() is not None, reason="no kernels")
SHAPES = {
    "images": (6, 40, 9, 9),
    "signals": (3, 17, 300),
    "few channels": (4, 2, 500),
    "large channels": (2, 9, 70_000),
    "beyond any cache": (1, 2, 3_000_000),
}
OPTIONS = {
    "plain": {},
    "ghost": {"virtual_batch_size": 2},
    "renorm": {"renorm": True, "renorm_clipping": {"rmax": 1.2, "dmax": 0.3}},
    "relu": {"activation": "relu"},
    "zeroed": {"padded_output": "zero", "activation": "leaky_relu"},
}


def halves(layer, x, mask, residual, dy):
    """y, dx, dresidual, dgamma, dbeta and the statistics, by a call for each pass."""
    call = make_call(*gather_arguments(layer, x, mask, residual)[:4])
    tensors, decision = arrange(call.tensors, call.decision, call.options)
    x, mask, weight, bias, residual, running = tensors
    state = on_cpu.find_state(weight, bias, running)
    step = KernelStep(
        decision, mask, running, state, call.options, True, True, residual is not None
    )
    y = torch.empty_like(x)
    kept = on_cpu.forward(step, x, weight, bias, residual, y, on_cpu.moments(step, x))
    changed = changes_dy(call.options, mask is not None)
    rows = Rows(dy, x, y, mask)
    outputs = (x, weight, bias, x if changed else None)
    found = Gradients(*(None if a is None else torch.empty_like(a) for a in outputs))
    sums = on_cpu.reduce(step, rows, found, kept)
    on_cpu.apply(step, rows, found, sums, kept)
    return y, found.x, found.residual if changed else dy, found.weight, found.bias


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.sample(7)
def test_bits_are_the_same(shape, masked, option, dtype):
    torch.manual_seed(0)
    if "virtual_batch_size" in option and shape[0] % 2:
        option = {"virtual_batch_size": shape[0]}
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    layers = [BatchNorm(shape[1], dtype=wide, **option) for _ in range(2)]
    for layer in layers:
        torch.nn.init.normal_(layer.weight, generator=torch.Generator().manual_seed(1))
    x, residual, dy = (torch.randn(shape).to(dtype) for _ in range(3))
    mask = torch.rand(shape[0], *shape[2:]) < 0.6 if masked else None
    expected = halves(layers[0], x, mask, residual, dy)
    leaves = [a.clone().requires_grad_() for a in (x, residual)]
    y = layers[1](leaves[0], mask, leaves[1])
    y.backward(dy)
    found = (y, leaves[0].grad, leaves[1].grad, layers[1].weight.grad, layers[1].bias.grad)
    for a, b, name in zip(found, expected, ("y", "dx", "dresidual", "dw", "db"), strict=True):
        assert torch.equal(a, b), name
    for name, a in layers[0].state_dict().items():
        assert torch.equal(a, layers[1].state_dict()[name]), name
