"""Running statistics that forget their start (S23), and single values per channel (S7)."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from batchnorm.core.running import LONG_RUNNING
from batchnorm.torch import (
    BatchNorm,
    batch_norm,
    convert_batchnorm,
    explicit,
    revert_batchnorm,
)

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


@settings(max_examples=40, deadline=None)
@given(
    momentum=st.sampled_from([0.5, 0.1, 1e-3, 1e-6, 1.0]),
    steps=st.integers(1, 6),
    option=st.sampled_from([{}, {"fused": False}, {"virtual_batch_size": 4}]),
)
def test_statistics_are_the_ordinary_average_without_its_start(momentum, steps, option):
    torch.manual_seed(steps)
    layer, decay = BatchNorm(2, momentum=momentum, debias=True, **option), 1 - momentum
    total = torch.zeros(2, dtype=torch.float64)
    for t in range(1, steps + 1):
        x = torch.randn(8, 2) + 5
        layer(x)
        total = decay * total + momentum * x.double().mean(0)
        expected = total / (1 - decay**t)
        torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("option", [{}, {"renorm": True}, {"renorm": True, "fused": False}])
def test_after_one_step_they_are_the_batchs(option):
    x = torch.randn(8, 2) * 3 + 7
    layer = BatchNorm(2, debias=True, **option)
    layer(x)
    correction = 0 if option else 1
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    torch.testing.assert_close(layer.running_var, x.var(0, correction=correction))
    if option:
        stddev = (x.var(0, correction=0) + layer.eps).sqrt()
        for name, value in (("renorm_mean", x.mean(0)), ("renorm_stddev", stddev)):
            torch.testing.assert_close(getattr(layer, name), value)


def test_a_momentum_of_0_still_moves_nothing():
    layer = BatchNorm(2, momentum=0.0, debias=True)
    layer(torch.randn(8, 2))
    assert layer.running_mean.tolist() == [0.0, 0.0]


def test_a_state_without_the_counter_has_run_for_long():
    state = BatchNorm(2).state_dict()
    del state["num_batches_tracked"]
    layer = BatchNorm(2, debias=True)
    layer.load_state_dict(state)
    assert layer.num_batches_tracked == LONG_RUNNING
    x = torch.randn(8, 2)
    layer(x)
    torch.testing.assert_close(layer.running_mean, 0.1 * x.mean(0))


def test_statistics_that_nobody_has_counted_have_run_for_long():
    stock = nn.BatchNorm1d(2)
    stock.running_mean.fill_(3.0)  # as weights of other frameworks, whose counter is 0
    loaded = BatchNorm(2, debias=True)
    loaded.load_state_dict(stock.state_dict())
    told = BatchNorm(2)
    told.load_state_dict(stock.state_dict())
    told.configure(debias=True)
    converted = convert_batchnorm(stock, debias=True)
    for layer in (loaded, told, converted):
        assert layer.num_batches_tracked == LONG_RUNNING
        layer(torch.zeros(8, 2))
        torch.testing.assert_close(layer.running_mean, torch.full((2,), 2.7))
    assert convert_batchnorm(nn.BatchNorm1d(2), debias=True).num_batches_tracked == 0


def test_frozen_copies_have_no_counter():
    class FrozenBatchNorm2d(nn.Module):
        def __init__(self):
            super().__init__()
            for name, value in (
                ("weight", 1),
                ("bias", 0),
                ("running_mean", 2),
                ("running_var", 3),
            ):
                self.register_buffer(name, torch.full((2,), float(value)))

    layer = convert_batchnorm(FrozenBatchNorm2d(), frozen_copies=True, debias=True)
    layer.unfreeze().train()(torch.zeros(2, 2, 4, 4))
    torch.testing.assert_close(layer.running_mean, torch.full((2,), 1.8))


def test_compiled_and_repeated_calls_count_alike():
    torch._dynamo.reset()
    torch.manual_seed(0)
    layers = [BatchNorm(2, debias=True) for _ in range(2)]
    compiled = torch.compile(layers[0], fullgraph=True, backend="aot_eager")
    for _ in range(5):
        x = torch.randn(8, 2)
        compiled(x)
        layers[1](x)
    torch.testing.assert_close(layers[0].state_dict(), layers[1].state_dict())


def test_functions_take_the_counter():
    mean, var, steps, x = torch.zeros(2), torch.ones(2), torch.tensor(0), torch.randn(8, 2)
    for _ in range(2):
        batch_norm(x, mean, var, training=True, num_batches_tracked=steps, debias=True)
    assert steps == 2
    torch.testing.assert_close(mean, x.mean(0))
    with pytest.raises(ValueError, match="batch_norm: debias=True needs"):
        batch_norm(x, mean, var, training=True, debias=True)


def test_explicit_layers():
    layer, x = explicit.BatchNorm(debias=True), torch.randn(8, 2)
    layer.initialise_layer(input_shape=(2,))
    layer.forward(x, training=True)
    torch.testing.assert_close(layer.running_mean, x.mean(0))
    assert layer.num_batches_tracked == 1


def test_conversion_takes_and_revert_refuses_them():
    options = {"debias": True, "single_value": "beta"}
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(2)), **options)
    assert (model[0].debias, model[0].single_value) == (True, "beta")
    with pytest.raises(ValueError, match="layer '0' has debias=True, which torch's"):
        revert_batchnorm(model)


@pytest.mark.parametrize("option", [{"debias": True}, {"single_value": "running"}])
def test_they_need_running_statistics(option):
    with pytest.raises(ValueError, match="needs running statistics"):
        BatchNorm(2, track_running_stats=False, **option)


RULES = pytest.mark.parametrize("rule", ["beta", "running"])
SHAPES = pytest.mark.parametrize("shape", [(1, 3), (1, 3, 1, 1)])


@pytest.mark.sample(2)
@RULES
@SHAPES
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("fused", [None, False])
def test_a_single_value_follows_the_rule(rule, shape, compiled, fused):
    torch._dynamo.reset()
    torch.manual_seed(0)
    layer = BatchNorm(3, single_value=rule, fused=fused)
    nn.init.normal_(layer.bias)
    layer(torch.randn(16, 3) * 2 + 1)
    before = copy.deepcopy(layer.state_dict())
    call = torch.compile(layer, fullgraph=True, backend="aot_eager") if compiled else layer
    x = torch.randn(shape, requires_grad=True)
    y = call(x)
    expected = layer.bias.reshape(1, 3, *x.shape[2:])
    if rule == "running":
        expected = copy.deepcopy(layer).eval()(x)
    torch.testing.assert_close(y, expected)
    y.sum().backward()
    assert (x.grad == 0).all() == (rule == "beta")
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@RULES
def test_other_inputs_do_not_see_the_rule(rule):
    torch.manual_seed(0)
    layer, plain, x = BatchNorm(3, single_value=rule), BatchNorm(3), torch.randn(8, 3)
    mask = torch.zeros(8, dtype=torch.bool)
    mask[0] = True
    for arguments in ((x,), (x, mask)):
        assert torch.equal(layer(*arguments), plain(*arguments))
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_the_default_is_torchs_error_with_the_remedy():
    with pytest.raises(ValueError, match=r"Expected more than 1 value.*single_value=\"beta\""):
        BatchNorm(3)(torch.randn(1, 3))
    with pytest.raises(ValueError, match='single_value must be one of "raise", "beta", "running"'):
        BatchNorm(3, single_value="zero")


def test_functions_have_the_rule():
    mean, var, x = torch.zeros(3), torch.ones(3), torch.randn(1, 3)
    y = batch_norm(x, mean, var, training=True, single_value="running")
    torch.testing.assert_close(y, x / (1 + 1e-5) ** 0.5)
    assert mean.tolist() == [0.0] * 3
    with pytest.raises(ValueError, match="needs running statistics"):
        batch_norm(x, None, None, training=True, single_value="running")
