"""Small training steps of a graph on the CPU: one operator of array code."""

from __future__ import annotations

import pytest
import torch

import batchnorm
from batchnorm.torch import BatchNorm
from batchnorm.torch.sums import BRIEF
from batchnorm.torch.ways import graph_arrays
from batchnorm.verification.tolerances import PLAIN_FLOAT32

pytestmark = pytest.mark.sample(2)

# The second compiles the operator's C++, for each shape anew.
BACKENDS = pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.exhaustive)]
)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def graph_of(layer, *arguments):
    """The operators of the tracer's graph of a call."""
    found = []

    def note(graph, _):
        targets = (node.target for node in graph.graph.nodes)
        found.extend(target for target in targets if isinstance(target, torch._ops.OpOverload))
        return graph

    torch.compile(layer, backend=note, fullgraph=True)(*arguments)
    return found


@pytest.mark.parametrize("masked", [False, True])
def test_a_small_training_step_is_one_operator(masked):
    x, mask = torch.randn(8, 3, 5), torch.rand(8, 5) < 0.7
    arguments = (x, mask) if masked else (x,)
    assert graph_of(BatchNorm(3), *arguments) == [graph_arrays._operator]


@pytest.mark.parametrize(
    "layer",
    [
        BatchNorm(3, renorm=True),
        BatchNorm(3, adjustment=lambda shape: (torch.ones(shape), torch.zeros(shape))),
        BatchNorm(3).eval(),
        BatchNorm(3, dtype=torch.float64),
    ],
    ids=["renorm", "adjustment", "evaluation", "float64"],
)
def test_other_calls_are_not(layer):
    x = torch.randn(8, 3, 5, dtype=layer.weight.dtype)
    assert graph_arrays._operator not in graph_of(layer, x)


# Sums in one loop, in two, and in float64.
@pytest.mark.sample(3)
@BACKENDS
@pytest.mark.parametrize("shape", [(BRIEF, 4), (20, 4, 30), (3 * BRIEF, 4)])
@pytest.mark.parametrize("values", ["normal", "two", "outlier first"])
def test_moments_are_exact_at_offset(shape, values, backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    if values == "two":  # every rounding error of a sum of equal squares has one sign
        x = x.sign()
    elif values == "outlier first":
        x[0] = 1e4
    x = (x + 1e6).float()
    layer = BatchNorm(4, momentum=1.0)
    y = torch.compile(layer, backend=backend, fullgraph=True)(x)
    exact, moments = batchnorm.batch_norm(x.double().numpy(), axis=1, eps=1e-5)
    exact, mean, var = map(torch.from_numpy, (exact, moments.mean, moments.var))
    bound = PLAIN_FLOAT32 * (1 + exact.abs())
    assert ((y.double() - exact).abs() <= bound).all()
    count = x.numel() / 4
    unbiased = var * count / (count - 1)
    assert ((layer.running_var - unbiased).abs() <= 2 * PLAIN_FLOAT32 * unbiased).all()
    assert ((layer.running_mean - mean).abs() <= PLAIN_FLOAT32 * var.sqrt() + 0.04).all()


@BACKENDS
def test_large_and_small_values_stay_finite(backend):
    for scale in (1e18, 1e-30):
        x = (torch.randn(64, 3) * scale).requires_grad_()
        y = torch.compile(BatchNorm(3, eps=0.0), backend=backend, fullgraph=True)(x)
        y.backward(torch.randn(64, 3) * scale)
        exact = torch.from_numpy(batchnorm.batch_norm(x.detach().double().numpy(), eps=0.0)[0])
        assert ((y.detach().double() - exact).abs() <= PLAIN_FLOAT32 * (1 + exact.abs())).all()
        assert x.grad.isfinite().all()


@pytest.mark.parametrize("padded_output", ["normalize", "zero"])
@pytest.mark.parametrize("activation", [None, "relu"])
def test_gradients_with_a_residual_equal_eager(padded_output, activation):
    generator = torch.Generator().manual_seed(0)
    options = {"padded_output": padded_output, "activation": activation, "virtual_batch_size": 4}
    x, residual, dy = (torch.randn(8, 3, 5, generator=generator) for _ in range(3))
    mask = torch.rand(8, 5, generator=generator) < 0.7
    found = []
    for compiled in (False, True):
        layer = BatchNorm(3, **options)
        leaves = [a.clone().requires_grad_() for a in (x, residual)]
        called = torch.compile(layer, backend="aot_eager", fullgraph=True) if compiled else layer
        y = called(leaves[0], mask, leaves[1])
        y.backward(dy)
        gradients = [a.grad for a in (*leaves, layer.weight, layer.bias)]
        found.append([y.detach(), *gradients, layer.running_mean, layer.running_var])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
