"""A layer's shortcut for repeated calls is dropped when its assumptions change."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vmap
from torch.nn.utils import parametrize, prune
from torch.utils.checkpoint import checkpoint

import batchnorm.torch.kernels.autograd as kernels
from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask
from batchnorm.torch.ways import last_call
from batchnorm.torch.ways.last_call import LastCall, LastCalls

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)

SHAPE = (8, 4, 6)
every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# torch.func's forward mode scripts a decomposition with torch.jit.script, deprecated by itself.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def used(layer=None, x=None, training=True):
    """A layer with a shortcut for inputs like x."""
    layer = BatchNorm(4) if layer is None else layer
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.rand(parameter.shape) + 0.5)
        if layer.running_mean is not None:
            layer.running_mean.copy_(torch.randn(4))
            layer.running_var.copy_(torch.rand(4) + 0.5)
    layer.train(training)
    for _ in range(2):
        layer(torch.randn(SHAPE) if x is None else x)
    assert has_shortcut(layer)
    return layer


def has_shortcut(layer):
    return any(type(known) is LastCall for known in layer._memory._known.values())


def outcome(layer, x, mask=None, residual=None):
    """The outcome of a call: results, gradients and state afterwards, or the error."""
    x = x.detach().clone(memory_format=torch.preserve_format).requires_grad_()
    cotangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)
    parameters = dict(layer.named_parameters())
    try:
        y = layer(x, mask, residual)
        grads = torch.autograd.grad(y, (x, *parameters.values()), cotangent, allow_unused=True)
    except Exception as error:
        found = {"error": type(error), "message": str(error)}
    else:
        found = {"y": y.detach(), "stride": y.stride(), "grads": grads}
    return found | {"state": {name: a.clone() for name, a in layer.state_dict().items()}}


def fresh(layer):
    """A copy that has never taken a shortcut."""
    found = copy.deepcopy(layer)
    found._memory = LastCalls()
    return found


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_same_outcome(actual, expected):
    for name in ("error", "message", "stride"):
        assert actual.get(name) == expected.get(name)
    for name in ("y", "grads", "state"):
        assert (name in actual) == (name in expected)
        if name in actual:
            assert_same(actual[name], expected[name])


def assert_like_fresh(layer, x=None, *args):
    x = torch.randn(SHAPE) if x is None else x
    expected = outcome(fresh(layer), x, *args)
    assert_same_outcome(outcome(layer, x, *args), expected)
    return expected


# The shortcut is taken; otherwise the rest of this file would test nothing


@every_mode
def test_repeated_call_takes_the_shortcut(monkeypatch, training):
    layer = used(training=training)

    def refuse(*args, **kwargs):
        raise AssertionError("the whole way was taken")

    monkeypatch.setattr("batchnorm.torch.layers.make_call", refuse)
    assert layer(torch.randn(SHAPE)).isfinite().all()


@every_mode
def test_repeated_call_equals_a_fresh_layers(training):
    layer = used(training=training)
    assert_like_fresh(layer)
    assert_like_fresh(layer)


def test_repeated_calls_count_batches():
    layer, x = BatchNorm(4), torch.randn(SHAPE)
    layer(x), layer(x), layer(x)
    assert layer.num_batches_tracked == 3


# Several kinds of input


def whole_ways(layer, inputs):
    """The number of these calls that take no shortcut."""
    calls = []
    learn = LastCalls.learn

    class Counting(LastCalls):
        __slots__ = ()

        def learn(self, *args):
            calls.append(args)
            learn(self, *args)

    counting = Counting()
    counting._known, counting._patience = layer._memory._known, layer._memory._patience
    layer._memory = counting
    for x in inputs:
        layer(x)
    return len(calls)


def of_length(*lengths):
    return [torch.randn(8, 4, n) for n in lengths]


def test_second_call_of_a_kind_makes_the_shortcut():
    layer = BatchNorm(4)
    for count in (1, 1, 0, 0):
        assert whole_ways(layer, of_length(6)) == count


def test_alternating_inputs_have_a_shortcut_each():
    layer = BatchNorm(4)
    whole_ways(layer, of_length(5, 6, 5, 6))
    assert whole_ways(layer, of_length(5, 6, 5, 6, 6, 5)) == 0


def test_alternating_inputs_equal_a_fresh_layers():
    layer = BatchNorm(4)
    for x in of_length(*[5, 6, 7] * 4):
        assert_like_fresh(layer, x)


def test_alternating_modes_have_a_shortcut_each():
    layer = BatchNorm(4)
    for count in (1, 1, 0):
        for training in (True, False):
            assert whole_ways(layer.train(training), of_length(6)) == count


def test_inputs_that_never_come_again_make_no_shortcut(monkeypatch):
    def refuse(*args):
        raise AssertionError("a shortcut was made")

    monkeypatch.setattr("batchnorm.torch.ways.last_call.find_last_call", refuse)
    layer = BatchNorm(4)
    for x in of_length(*range(2, 60), *range(2, 60)):
        layer(x)
    assert len(layer._memory._known) <= LastCalls._INPUTS


def test_shortcuts_that_are_of_no_use_are_made_ever_more_seldom(monkeypatch):
    made = []
    find = last_call.find_last_call
    monkeypatch.setattr(last_call, "find_last_call", lambda *args: made.append(1) or find(*args))
    layer = BatchNorm(4)
    for i in range(1000):
        layer.momentum = 1 / (i + 1)  # a schedule
        layer(torch.ones(8, 4))
    assert len(made) < 30


def test_recomputation_and_ambient_masks_leave_the_shortcut():
    layer = used()
    for _ in range(5):
        x = torch.randn(SHAPE, requires_grad=True)
        checkpoint(layer, x, use_reentrant=False).sum().backward()
        with padding_mask(torch.ones(8, dtype=torch.bool)):
            layer(x)
    layer(torch.randn(SHAPE))
    assert whole_ways(layer, of_length(6)) == 0


# Options


def replaced(name, value):
    def change(layer):
        setattr(layer, name, value)

    return change


def configured(**options):
    def change(layer):
        layer.configure(**options)

    return change


CHANGES = {
    "eps": replaced("eps", 0.5),
    "eps, an int": replaced("eps", 2),
    "eps, refused": replaced("eps", -1.0),
    "momentum": replaced("momentum", 0.9),
    "momentum, cumulative": replaced("momentum", None),
    "momentum, refused": replaced("momentum", 2.0),
    "training": lambda layer: layer.train(not layer.training),
    "freeze": lambda layer: layer.freeze(),
    "track_running_stats": replaced("track_running_stats", False),
    "axis": configured(axis=-1),
    "num_features": replaced("num_features", 5),
    "virtual_batch_size": configured(virtual_batch_size=2),
    "virtual_batch_size, refused": configured(virtual_batch_size=3),
    "virtual_batch_size, assigned": replaced("virtual_batch_size", 4),
    "renorm": configured(renorm=True),
    "adjustment": configured(adjustment=lambda shape: (torch.tensor(2.0), torch.tensor(1.0))),
    "activation": configured(activation="relu"),
    "fused, never": configured(fused=False),
    "fused, always": configured(fused=True),
    "fused, always but adjusted": configured(fused=True, adjustment=lambda shape: (None, None)),
}


@every_mode
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_changed_option_is_heeded(change, training):
    layer = used(training=training)
    change(layer)
    assert_like_fresh(layer)


SEEN = ["eps", "momentum", "training", "freeze", "activation", "axis", "virtual_batch_size"]


@pytest.mark.parametrize("name", SEEN)
def test_changed_option_changes_the_outcome(name):
    layer, x = used(), torch.randn(SHAPE)
    before = outcome(fresh(layer), x)
    CHANGES[name](layer)
    with pytest.raises(AssertionError):
        assert_same_outcome(outcome(layer, x), before)


def test_unfreezing_is_heeded():
    layer = used(BatchNorm(4).freeze())
    layer.unfreeze()
    assert_like_fresh(layer)


def test_square_input_along_another_axis_is_heeded():
    x = torch.randn(6, 4, 4)
    layer = used(x=x)
    layer.configure(axis=2)
    assert_like_fresh(layer, x)


def test_fused_false_after_a_shortcut_uses_no_kernel(monkeypatch):
    layer = used()
    layer.configure(fused=False)

    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was used")

    monkeypatch.setattr(kernels, "forward", refuse)
    assert layer(torch.randn(SHAPE)).isfinite().all()


# Parameters


def data_replaced(name, make):
    def change(layer):
        a = getattr(layer, name)
        a.data = make(a.data)

    return change


def parameter_replaced(name, make):
    def change(layer):
        setattr(layer, name, make(getattr(layer, name).detach()))

    return change


def in_memory_of(a, stride):
    """`a`'s memory read again from its beginning, with another stride."""
    return torch.as_strided(a, (4,), (stride,))


def inferred(a):
    with torch.inference_mode():
        return a + 1


PARAMETER_CHANGES = {
    "weight, replaced": parameter_replaced("weight", lambda a: nn.Parameter(a + 1)),
    "weight, replaced by half": parameter_replaced("weight", lambda a: nn.Parameter(a.half())),
    "weight, replaced by a shorter one": parameter_replaced(
        "weight", lambda a: nn.Parameter(a[:3].clone())
    ),
    "weight, removed": replaced("weight", None),
    "bias, replaced": parameter_replaced("bias", lambda a: nn.Parameter(a + 1)),
    "bias, removed": replaced("bias", None),
    "weight data, other numbers": data_replaced("weight", lambda a: a + 1),
    "weight data, another type": data_replaced("weight", lambda a: (a + 1).bfloat16()),
    "weight data, same memory in another type": data_replaced(
        "weight", lambda a: a.view(torch.int32).view(torch.float16)[:4]
    ),
    "weight data, shorter slice": data_replaced("weight", lambda a: a[:3]),
    "weight data, longer": data_replaced("weight", lambda a: torch.ones(5)),
    "weight data, another shape": data_replaced("weight", lambda a: a.view(2, 2)),
    "weight data, one more axis": data_replaced("weight", lambda a: a.view(1, 4)),
    "weight data, one number expanded": data_replaced("weight", lambda a: in_memory_of(a, 0)),
    "bias data, another shape": data_replaced("bias", lambda a: a.view(2, 2)),
    "bias data, one number expanded": data_replaced("bias", lambda a: in_memory_of(a, 0)),
    "running mean with a gradient": lambda layer: layer.running_mean.requires_grad_(),
    "running var with a gradient": lambda layer: layer.running_var.requires_grad_(),
    "weight in place": lambda layer: nn.init.constant_(layer.weight, 7.0),
    "weight resized": lambda layer: layer.weight.data.resize_(3),
    "weight without gradient": lambda layer: layer.weight.requires_grad_(False),
    "bias without gradient": lambda layer: layer.bias.requires_grad_(False),
    "running mean, replaced": parameter_replaced("running_mean", lambda a: a + 1),
    "running mean, removed": replaced("running_mean", None),
    "running mean, wider": parameter_replaced("running_mean", lambda a: a.double()),
    "running mean, shorter": parameter_replaced("running_mean", lambda a: a[:3]),
    "running mean data, another shape": data_replaced("running_mean", lambda a: a.view(2, 2)),
    "running mean data, one number expanded": data_replaced(
        "running_mean", lambda a: in_memory_of(a, 0)
    ),
    "running var, replaced": parameter_replaced("running_var", lambda a: a + 1),
    "both statistics, removed": lambda layer: (
        replaced("running_mean", None)(layer),
        replaced("running_var", None)(layer),
    ),
    "both statistics, replaced": lambda layer: (
        replaced("running_mean", torch.full((4,), 2.0))(layer),
        replaced("running_var", torch.full((4,), 3.0))(layer),
    ),
    "count, replaced": replaced("num_batches_tracked", torch.tensor(41)),
    "count, removed": replaced("num_batches_tracked", None),
    "count, floating": replaced("num_batches_tracked", torch.tensor(41.0)),
    "reset_running_stats": lambda layer: layer.reset_running_stats(),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "half": lambda layer: layer.half(),
    "bfloat16": lambda layer: layer.bfloat16(),
    "double": lambda layer: layer.double(),
    "half, then float": lambda layer: layer.half().float(),
    "double, then half": lambda layer: layer.double().half(),
    "bfloat16, then double": lambda layer: layer.bfloat16().double(),
    "to meta": lambda layer: layer.to("meta"),
    "to_empty": lambda layer: nn.init.ones_(layer.to_empty(device="cpu").weight),
    "share_memory": lambda layer: layer.share_memory(),
    "requires_grad_": lambda layer: layer.requires_grad_(False),
}


@every_mode
@pytest.mark.parametrize("name", PARAMETER_CHANGES)
def test_changed_state_is_heeded(name, training):
    layer = used(training=training)
    if name == "to_empty":  # the values of the other tensors are undefined
        PARAMETER_CHANGES[name](layer)
        nn.init.zeros_(layer.bias), layer.reset_running_stats()
    else:
        PARAMETER_CHANGES[name](layer)
    assert_like_fresh(layer)


LAZY = {
    "negated in its own memory": torch._neg_view,
    "imaginary part of a conjugate": lambda a: torch.complex(a, a).conj().imag,
    "zeros without memory": lambda a: torch._efficientzerotensor((4,)),
}


@every_mode
@pytest.mark.parametrize("make", LAZY.values(), ids=LAZY)
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_lazily_computed_data_is_read_as_its_values(name, make, training):
    layer, x = used(training=training), torch.randn(SHAPE)
    data_replaced(name, make)(layer)
    plain = BatchNorm(4).train(training)
    plain.load_state_dict(layer.state_dict())
    if training and getattr(layer, name)._is_zerotensor() and name.startswith("running"):
        with pytest.raises(RuntimeError, match="ZeroTensors are immutable"):
            layer(x)
        return
    expected, found = (outcome(a, x) for a in (plain, layer))
    for key in ("y", "grads", "state"):
        torch.testing.assert_close(found[key], expected[key], equal_nan=True)


def test_lazily_negated_count_is_read_as_its_value():
    layer = used(BatchNorm(4, momentum=None))
    layer.num_batches_tracked.data = torch._neg_view(torch.tensor(-7))
    plain = BatchNorm(4, momentum=None)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(SHAPE)
    plain(x), layer(x)
    assert layer.num_batches_tracked == 8
    torch.testing.assert_close(layer.running_mean, plain.running_mean)


@every_mode
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_inference_tensor_in_the_layer_is_what_it_is_to_a_fresh_one(name, training):
    layer, x = used(training=training).requires_grad_(False), torch.randn(SHAPE)
    a = inferred(getattr(layer, name).detach())
    setattr(layer, name, nn.Parameter(a, False) if name in ("weight", "bias") else a)
    before = getattr(layer, name).clone()
    if training and name.startswith("running"):
        with pytest.raises(RuntimeError, match="cannot be outside"):
            layer(x)
        assert torch.equal(getattr(layer, name), before)
    else:
        plain = BatchNorm(4).train(training).requires_grad_(False)
        plain.load_state_dict(layer.state_dict())
        assert torch.equal(layer(x), plain(x))


CAST = {"half": torch.float16, "bfloat16": torch.bfloat16, "double": torch.float64}


@every_mode
@pytest.mark.parametrize("dtype", CAST.values(), ids=CAST)
def test_cast_layer_takes_inputs_of_its_type(dtype, training):
    layer = used(training=training)
    assert_like_fresh(layer.to(dtype), torch.randn(SHAPE).to(dtype))


def test_shorter_weight_is_the_error_it_was():
    layer = used()
    layer.weight.data = layer.weight.data[:3]
    with pytest.raises(ValueError, match=r"weight must have shape \(4,\)"):
        layer(torch.randn(SHAPE))


def test_weight_that_became_strided_in_its_own_memory_is_read_so():
    base = torch.randn(8)
    layer = BatchNorm(4)
    layer.weight.data = base[:4]
    layer(torch.randn(SHAPE))
    layer.weight.data = base[::2]
    assert_like_fresh(layer)


def test_statistics_that_became_strided_in_their_own_memory_are_read_so():
    base = torch.rand(8) + 0.5
    layer = BatchNorm(4).eval()
    layer.running_var.data = base[:4]
    layer(torch.randn(SHAPE))
    layer.running_var.data = base[::2]
    assert_like_fresh(layer)


def test_weight_of_several_axes_that_is_transposed_is_the_error_it_was():
    layer, x = BatchNorm((2, 3), axis=(1, 2)), torch.randn(8, 2, 3)
    layer(x)
    layer.weight.data = layer.weight.data.reshape(3, 2)
    with pytest.raises(ValueError, match=r"weight must have shape \(2, 3\)"):
        layer(x)


@every_mode
def test_loaded_state_is_heeded(training):
    layer, other = used(training=training), used(training=True)
    layer.load_state_dict(other.state_dict())
    assert_like_fresh(layer)


@every_mode
def test_assigned_state_is_heeded(training):
    layer, other = used(training=training), used(training=True)
    layer.load_state_dict(copy.deepcopy(other.state_dict()), assign=True)
    assert_like_fresh(layer)


class Doubled(nn.Module):
    def forward(self, a):
        return 2 * a


PARAMETRIZED = ["weight", "bias", "running_mean"]


@every_mode
@pytest.mark.parametrize("name", PARAMETRIZED)
def test_parametrization_is_heeded(name, training):
    layer, x = used(training=training), torch.randn(SHAPE)
    expected = fresh(layer)
    parametrize.register_parametrization(layer, name, Doubled())
    with torch.no_grad():
        getattr(expected, name).mul_(2)
    assert_same(layer(x), expected(x))


@pytest.mark.parametrize("name", PARAMETRIZED)
def test_used_layer_can_be_copied_after_its_parametrization(name):
    layer, x = used(training=False), torch.randn(SHAPE)
    parametrize.register_parametrization(layer, name, Doubled())
    assert_same(copy.deepcopy(layer)(x), layer(x))


@every_mode
def test_pruning_is_heeded(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    expected = fresh(layer)
    prune.random_unstructured(layer, "weight", 2)
    with torch.no_grad():
        expected.weight.copy_(layer.weight)
    assert expected.weight.eq(0).sum() == 2
    assert_same(layer(x), expected(x))


@every_mode
def test_removed_parametrization_is_heeded(training):
    layer = BatchNorm(4).train(training)
    parametrize.register_parametrization(layer, "weight", Doubled())
    layer(torch.randn(SHAPE)), layer(torch.randn(SHAPE))
    parametrize.remove_parametrizations(layer, "weight")
    layer(torch.randn(SHAPE))
    assert_like_fresh(layer)


@every_mode
def test_functional_call_is_heeded(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    other = {name: a.detach() + 1 for name, a in layer.state_dict().items()}
    expected = fresh(layer)
    expected.load_state_dict(other)
    assert_same(functional_call(layer, other, (x,)), expected(x))
    assert_like_fresh(layer, x)


@every_mode
def test_functional_call_leaves_the_layers_own_state_alone(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    before = copy.deepcopy(layer.state_dict())
    other = {name: a.detach() + 1 for name, a in layer.state_dict().items()}
    functional_call(layer, other, (x,)), functional_call(layer, other, (x,))
    assert_same(dict(layer.state_dict()), dict(before))


# Inputs

INPUTS = {
    "another batch": lambda: torch.randn(5, 4, 6),
    "another length": lambda: torch.randn(8, 4, 7),
    "another rank": lambda: torch.randn(8, 4),
    "one more axis": lambda: torch.randn(8, 4, 2, 3),
    "empty": lambda: torch.randn(0, 4, 6),
    "other channels": lambda: torch.randn(8, 3, 6),
    "one value": lambda: torch.randn(1, 4, 1),
    "float64": lambda: torch.randn(SHAPE).double(),
    "bfloat16": lambda: torch.randn(SHAPE).bfloat16(),
    "channels innermost": lambda: torch.randn(8, 6, 4).mT,
    "samples innermost": lambda: torch.randn(4, 6, 8).permute(2, 0, 1),
    "a wider buffer": lambda: torch.randn(8, 9, 6)[:, :4],
    "expanded": lambda: torch.randn(1, 4, 6).expand(SHAPE),
    "parameter": lambda: nn.Parameter(torch.randn(SHAPE)),
}
REFUSED = {
    "integer": lambda: torch.ones(SHAPE, dtype=torch.int64),
    "complex": lambda: torch.randn(SHAPE, dtype=torch.complex64),
    "sparse": lambda: torch.randn(SHAPE).to_sparse(),
    "strided nested": lambda: torch.nested.nested_tensor([torch.randn(4, 6)] * 8),
    "numpy": lambda: torch.randn(SHAPE).numpy(),
    "list": lambda: [1.0, 2.0],
    "none": lambda: None,
}


@every_mode
@pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)
def test_other_input_is_heeded(make, training):
    layer = used(training=training)
    assert_like_fresh(layer, make())


@pytest.mark.parametrize("make", REFUSED.values(), ids=REFUSED)
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype")
def test_wrong_input_is_the_error_it_was(make):
    layer, x = used(), make()
    with pytest.raises(TypeError) as expected:
        fresh(layer)(x)
    with pytest.raises(TypeError) as found:
        layer(x)
    assert str(found.value) == str(expected.value)


@every_mode
def test_another_memory_format_is_heeded(training):
    x = torch.randn(2, 4, 5, 6)
    layer = used(x=x, training=training)
    assert_like_fresh(layer, x.to(memory_format=torch.channels_last))


@pytest.mark.parametrize("cls", [BatchNorm1d, BatchNorm2d])
def test_wrong_rank_is_the_error_it_was(cls):
    x = torch.randn(2, 4, 5, 6) if cls is BatchNorm2d else torch.randn(SHAPE)
    layer = used(cls(4), x)
    with pytest.raises(ValueError, match=r"expected .* input; got 5D"):
        layer(torch.randn(2, 4, 1, 1, 1))


@every_mode
def test_mask_is_heeded(training):
    layer = used(training=training)
    assert_like_fresh(layer, None, torch.arange(8) % 2 > 0)


@every_mode
def test_mask_of_one_call_is_gone_in_the_next(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    layer(x, torch.arange(8) % 2 > 0)
    assert_like_fresh(layer, x)


@every_mode
def test_residual_is_heeded(training):
    layer = used(training=training)
    assert_like_fresh(layer, None, None, torch.randn(SHAPE))


@every_mode
def test_mask_of_the_context_is_heeded(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    mask = torch.arange(8) % 2 > 0
    expected = outcome(fresh(layer), x, mask)
    with padding_mask(mask):
        assert_same_outcome(outcome(layer, x), expected)


@every_mode
def test_mask_of_the_context_ends_with_it(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    with padding_mask(torch.arange(8) % 2 > 0):
        layer(x), layer(x)
    assert_like_fresh(layer, x)


@every_mode
def test_no_mask_in_the_context_is_like_none(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    with padding_mask(torch.arange(8) % 2 > 0), padding_mask(None):
        assert_like_fresh(layer, x)


# Gradients


@every_mode
def test_gradients_are_recorded_after_a_call_without(training):
    layer, x = BatchNorm(4).train(training), torch.randn(SHAPE)
    with torch.no_grad():
        layer(x)
    assert_like_fresh(layer, x)


@every_mode
def test_no_graph_is_recorded_after_a_call_with_one(training):
    layer, x = used(training=training), torch.randn(SHAPE, requires_grad=True)
    with torch.no_grad():
        assert layer(x).grad_fn is None


@every_mode
def test_inference_mode_after_a_call_without(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    expected = fresh(layer)(x).detach()
    with torch.inference_mode():
        assert_same(layer(x), expected)


@every_mode
def test_call_after_one_in_inference_mode_records_gradients(training):
    layer, x = BatchNorm(4).train(training), torch.randn(SHAPE)
    with torch.inference_mode():
        layer(x.clone())
    assert_like_fresh(layer, x)


def test_second_derivative_through_the_shortcut_agrees_with_the_plain_path():
    layer = used(BatchNorm(4).double(), torch.randn(SHAPE).double())
    plain = copy.deepcopy(layer)
    plain.configure(fused=False)
    x, dy, direction = torch.randn(3, *SHAPE).double()

    def second(layer):
        given = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(layer(given), given, dy, create_graph=True)
        return torch.autograd.grad(first, (given, layer.weight), direction)

    torch.testing.assert_close(second(layer), second(plain), rtol=1e-10, atol=1e-10)


# Transformations


def test_vmap_after_eager_calls():
    layer = used(BatchNorm(4, track_running_stats=False))
    x = torch.randn(3, *SHAPE)
    expected = torch.stack([fresh(layer)(a) for a in x])
    torch.testing.assert_close(vmap(layer)(x), expected, rtol=1e-5, atol=1e-5)


def test_vmap_over_layers_after_eager_calls():
    layer, x = used(BatchNorm(4, track_running_stats=False)), torch.randn(SHAPE)
    weights = torch.randn(3, 4)

    def call(weight):
        return functional_call(layer, {"weight": weight}, (x,))

    expected = torch.stack([call(weight) for weight in weights])
    torch.testing.assert_close(vmap(call)(weights), expected, rtol=1e-5, atol=1e-5)


@forward_mode
def test_forward_mode_after_eager_calls():
    layer = used(BatchNorm(4, track_running_stats=False).double(), torch.randn(SHAPE).double())
    x, v = torch.randn(2, *SHAPE).double()
    plain = copy.deepcopy(layer)
    plain.configure(fused=False)
    expected = jvp(plain, (x,), (v,))
    torch.testing.assert_close(jvp(layer, (x,), (v,)), expected, rtol=1e-10, atol=1e-10)


@every_mode
def test_compilation_after_eager_calls(training):
    torch._dynamo.reset()
    layer, x = used(training=training), torch.randn(SHAPE)
    expected = fresh(layer)
    y = torch.compile(layer, backend="eager", fullgraph=True)(x)
    torch.testing.assert_close(y, expected(x), rtol=1e-5, atol=1e-5)
    assert_state_close(layer, expected)


def test_eager_call_after_compilation():
    torch._dynamo.reset()
    layer, x = BatchNorm(4), torch.randn(SHAPE)
    torch.compile(layer, backend="eager", fullgraph=True)(x)
    layer(x)
    assert_like_fresh(layer, x)


def assert_state_close(actual, expected):
    torch.testing.assert_close(
        dict(actual.state_dict()), dict(expected.state_dict()), rtol=1e-5, atol=1e-5
    )


@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_tracing_after_eager_calls_records_operations():
    layer, x = used(training=False), torch.randn(SHAPE)
    traced = torch.jit.trace(layer, torch.randn(SHAPE))
    torch.testing.assert_close(traced(x), layer(x), rtol=1e-5, atol=1e-5)


def test_fake_tensors_after_eager_calls():
    layer = used(training=False)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        y = layer(mode.from_tensor(torch.randn(SHAPE)))
    assert isinstance(y, torch._subclasses.FakeTensor)


# Recomputation (S9)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])
def test_recomputed_shortcut_does_not_update_again(use_reentrant):
    layer, x = used(), torch.randn(SHAPE, requires_grad=True)
    expected = fresh(layer)
    expected(x)
    y = checkpoint(layer, x, use_reentrant=use_reentrant)
    y.backward(torch.randn(SHAPE))
    assert_same(dict(layer.state_dict()), dict(expected.state_dict()))


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])
def test_recomputed_shortcut_gives_the_gradient(use_reentrant):
    layer, x, dy = used(), torch.randn(SHAPE), torch.randn(SHAPE)
    direct, through = x.clone().requires_grad_(), x.clone().requires_grad_()
    fresh(layer)(direct).backward(dy)
    checkpoint(layer, through, use_reentrant=use_reentrant).backward(dy)
    assert_same(through.grad, direct.grad)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "saved"])
def test_step_after_a_recomputation_updates(use_reentrant):
    layer, x = used(), torch.randn(SHAPE, requires_grad=True)
    checkpoint(layer, x, use_reentrant=use_reentrant).backward(torch.randn(SHAPE))
    assert_like_fresh(layer, x)


# Copies


@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, copy.copy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "copy", "pickle"],
)
def test_copy_carries_no_shortcut(duplicate):
    layer = used()
    assert not has_shortcut(duplicate(layer))
    assert has_shortcut(layer)


@every_mode
@pytest.mark.parametrize(
    "duplicate",
    [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))],
    ids=["deepcopy", "pickle"],
)
def test_copy_and_original_go_their_own_ways(duplicate, training):
    layer = used(training=training)
    other = duplicate(layer)
    with torch.no_grad():
        other.weight.add_(1.0), other.running_mean.add_(1.0)
    other(torch.randn(SHAPE))
    assert_like_fresh(layer)
    assert_like_fresh(other)


def test_shallow_copy_that_gets_a_weight_of_its_own_leaves_the_original_alone():
    layer = used()
    other = copy.copy(layer)
    other._parameters = dict(layer._parameters, weight=nn.Parameter(torch.full((4,), 5.0)))
    other(torch.randn(SHAPE))
    assert_like_fresh(layer)
    assert_like_fresh(other)


def test_state_dict_of_a_used_layer_has_no_more_entries():
    assert used().state_dict().keys() == BatchNorm(4).state_dict().keys()


@every_mode
def test_training_flag_back_and_forth_is_heeded(training):
    layer, x = used(training=training), torch.randn(SHAPE)
    layer.train(not training)
    layer(x)
    layer.train(training)
    assert_like_fresh(layer, x)


@pytest.mark.parametrize("count", [1, 3])
def test_number_of_threads_is_heeded(count):
    before = torch.get_num_threads()
    x = torch.randn(20000, 4)
    layer = used(x=x)
    expected = outcome(fresh(layer), x)
    try:
        torch.set_num_threads(count)
        assert_same_outcome(outcome(layer, x), expected)
    finally:
        torch.set_num_threads(before)


def test_debiased_steps_without_gradients_equal_a_fresh_layers():
    layer = BatchNorm(4, debias=True)
    other = BatchNorm(4, debias=True, fused=False)
    with torch.no_grad():
        for _ in range(5):
            x = torch.randn(SHAPE)
            layer(x), other(x)
    assert has_shortcut(layer)
    torch.testing.assert_close(layer.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("trained", ["x", "weight", "bias"])
@pytest.mark.parametrize("bias_type", [torch.float32, torch.float64])
def test_gradients_that_are_wanted_alone_equal_a_fresh_layers(trained, bias_type):
    layer = BatchNorm(4)
    layer.bias = nn.Parameter(torch.zeros(4, dtype=bias_type))
    for name in ("weight", "bias"):
        getattr(layer, name).requires_grad_(name == trained)
    used(layer)
    x = torch.randn(SHAPE, requires_grad=trained == "x")
    dy = torch.randn(SHAPE)
    found = []
    for each in (layer, fresh(layer)):
        wanted = x if trained == "x" else getattr(each, trained)
        found += torch.autograd.grad(each(x), wanted, dy)
    assert found[0].dtype is (bias_type if trained == "bias" else torch.float32)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", ["expanded", "transposed"])
def test_cotangents_in_other_memory_equal_dense_ones(kind):
    layer, x = used(), torch.randn(SHAPE, requires_grad=True)
    other = fresh(layer)
    dy = torch.randn(SHAPE[0], 1, 1).expand(SHAPE)
    if kind == "transposed":
        dy = torch.randn(SHAPE[::-1]).permute(2, 1, 0)
    wanted, expected = ((each.weight, each.bias) for each in (layer, other))
    found = torch.autograd.grad(layer(x), (x, *wanted), dy)
    dense = torch.autograd.grad(other(x), (x, *expected), dy.contiguous())
    for a, b in zip(found, dense, strict=True):
        assert torch.equal(a, b)
