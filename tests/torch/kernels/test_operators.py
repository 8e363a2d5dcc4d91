"""The kernels inside graphs of `torch.compile`."""

import copy
import itertools
import shutil
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.autograd import forward_ad
from torch.func import grad, vmap

import batchnorm
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, batch_norm, tracing
from batchnorm.torch.kernels import decision, operators
from batchnorm.torch.ways import graph_arrays, graph_operators

BACKEND = "aot_eager"
STATISTICS = {"rtol": 1e-6, "atol": 1e-7}  # updated in float64 here, inside the kernel there
pytestmark = [
    pytest.mark.sample(2),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(autouse=True)
def small_inputs_too(monkeypatch):
    """Let graphs hold the kernels for inputs of any size."""
    monkeypatch.setattr(graph_operators, "SMALL", -1)


def operators_in(layer, *arguments, **options):
    """The number of steps of the kernels in the graph of a call."""
    counter = CompileCounterWithBackend(BACKEND)
    torch.compile(layer, fullgraph=True, backend=counter, **options)(*arguments)
    assert counter.frame_count == 1
    (graph,) = counter.graphs
    return sum(
        node.target is torch.ops.batchnorm.differentiable_step.default for node in graph.graph.nodes
    )


@pytest.mark.parametrize("small", [False, True], ids=["kernels", "array code"])
def test_cached_graphs_end_with_the_code_they_were_made_of(small, monkeypatch):
    """Caches on disk know an operator by its name and arguments."""
    monkeypatch.setattr(graph_operators, "SMALL", 2**17 if small else -1)
    counter = CompileCounterWithBackend(BACKEND)
    torch.compile(BatchNorm(3), fullgraph=True, backend=counter)(torch.randn(8, 3))
    (graph,) = counter.graphs
    targets = (torch.ops.batchnorm.differentiable_step.default, graph_arrays._operator)
    (node,) = (node for node in graph.graph.nodes if node.target is targets[small])
    assert node.args[-1] == tracing.code_digest()


def test_code_digest_changes_with_the_code(tmp_path):
    for folder in ("core", "torch"):
        shutil.copytree(Path(batchnorm.__file__).parent / folder, tmp_path / folder)
    here = tracing.digest_code(Path(batchnorm.__file__).parent)
    assert tracing.digest_code(tmp_path) == here == tracing.code_digest()
    with (tmp_path / "core" / "moments.py").open("a") as file:
        file.write("\n")
    assert tracing.digest_code(tmp_path) != here


def step(layer, x, mask=None, residual=None):
    """y and every gradient."""
    layer.zero_grad()
    leaves = [None if a is None else a.detach().clone().requires_grad_() for a in (x, residual)]
    # detach and clone keep strides, but for gaps: those come from the operand itself
    if not x.is_contiguous():
        leaves[0] = x.detach().requires_grad_()
    y = layer(leaves[0], mask, leaves[1])
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype))
    found = [a.grad for a in (*leaves, layer.weight, layer.bias) if a is not None]
    leaves[0].requires_grad_(False).grad = None
    return y.detach(), *found


def assert_bits(found, expected):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype is b.dtype
        assert a.stride() == b.stride()
        assert torch.equal(a, b)


def assert_same_step(eager, *arguments, steps=2, **options):
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND, **options)
    for _ in range(steps):
        assert_bits(step(compiled, *arguments), step(eager, *arguments))
        torch.testing.assert_close(layer.state_dict(), eager.state_dict(), **STATISTICS)


def randomize(layer):
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


# The operators of a graph


def test_training_holds_the_kernels():
    assert operators_in(BatchNorm(3), torch.randn(4, 3, 5)) == 1


def test_frozen_and_evaluating_layers_are_left_to_the_compiler():
    assert operators_in(BatchNorm(3).freeze(), torch.randn(4, 3, 5)) == 0
    assert operators_in(BatchNorm(3).eval(), torch.randn(4, 3, 5)) == 0


def test_demanded_kernels_are_there_in_evaluation_too():
    assert operators_in(BatchNorm(3, fused=True).eval(), torch.randn(4, 3, 5)) == 1


def test_fused_false_keeps_array_code():
    assert operators_in(BatchNorm(3, fused=False), torch.randn(4, 3, 5)) == 0


def test_two_layers_hold_two_steps():
    model = nn.Sequential(BatchNorm(3), nn.ReLU(), BatchNorm(3))
    assert operators_in(model, torch.randn(4, 3, 5)) == 2


# The choice by size, with limits that a test can afford


@pytest.mark.parametrize(("rows", "held"), [(4, 0), (5, 1)])
def test_small_training_is_left_to_the_compiler(monkeypatch, rows, held):
    monkeypatch.setattr(graph_operators, "SMALL", 12)
    assert operators_in(BatchNorm(3), torch.randn(rows, 3)) == held
    assert operators_in(BatchNorm(3, fused=True), torch.randn(rows, 3)) == 1


@pytest.mark.parametrize(("rows", "held"), [(4, 0), (5, 1)])
def test_large_evaluation_is_by_the_kernels(monkeypatch, rows, held):
    monkeypatch.setattr(graph_operators, "KEPT", 4 * 12)
    layer, x = BatchNorm(3).eval(), torch.randn(rows, 3)
    assert operators_in(layer, x) == held
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)


def test_dynamic_sizes_compile_once_for_each_side_of_the_limit(monkeypatch):
    monkeypatch.setattr(graph_operators, "SMALL", 30)
    layer = BatchNorm(3)
    eager = copy.deepcopy(layer)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(layer, fullgraph=True, backend=counter, dynamic=True)
    for rows in (5, 7, 11, 13, 6, 12):
        x = torch.randn(rows, 3)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 3  # one of them for eps, a symbol at first with dynamic=True


REFUSED = {
    "renorm": ({"renorm": True}, "compiled graphs renormalize in array code"),
    "adjustment": ({"adjustment": lambda shape: (1.5, 0.5)}, "none takes an adjustment"),
    "axes-apart": (
        {"axis": (1, 3), "num_features": (3, 2)},
        r"channel axes \(1, 3\) are no neighbours",
    ),
}


@pytest.mark.parametrize(("option", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_no_operator_serves_is_array_code_or_refused(option, reason):
    option = {"num_features": 3, **option}
    x = torch.randn(4, 3, 5, 2)
    assert operators_in(BatchNorm(**option), x) == 0
    torch._dynamo.reset()
    compiled = torch.compile(BatchNorm(**option, fused=True), fullgraph=True, backend=BACKEND)
    with pytest.raises(Exception, match=f"fused=True demands a kernel, but .*{reason}"):
        compiled(x)


def test_a_mask_for_each_channel_is_array_code():
    assert operators_in(BatchNorm(3), torch.randn(4, 3, 5), torch.rand(4, 3, 5) < 0.5) == 0


def test_a_residual_of_another_type_is_array_code():
    x = torch.randn(4, 3, 5)
    assert operators_in(BatchNorm(3), x, None, x.double()) == 0


@pytest.mark.filterwarnings("ignore:.*torch.export traces this layer in training:UserWarning")
def test_exported_programs_hold_no_operator():
    program = torch.export.export(BatchNorm(3), (torch.randn(4, 3, 5),))
    assert "batchnorm" not in program.graph_module.code


# The same bits as eager code


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_types_give_the_bits_of_eager(dtype, masked):
    layer = randomize(BatchNorm(3)).to(dtype)
    assert_same_step(
        layer, torch.randn(6, 3, 5).to(dtype), torch.rand(6, 5) < 0.6 if masked else None
    )


OPTIONS = {
    "ghost": {"virtual_batch_size": 3},
    "cumulative": {"momentum": None},
    "no-affine": {"affine": False},
    "no-bias": {"bias": False},
    "no-running": {"track_running_stats": False},
    "relu": {"activation": "relu"},
    "leaky-relu": {"activation": "leaky_relu"},
    "last-axis": {"axis": -1, "num_features": 5},
    "two-axes": {"axis": (1, 2), "num_features": (3, 5)},
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
def test_options_give_the_bits_of_eager(option, residual):
    layer = randomize(BatchNorm(**{"num_features": 3, **option}))
    x = torch.randn(6, 3, 5)
    assert_same_step(layer, x, None, torch.randn(6, 3, 5) if residual else None)


@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("fused", [True, None])
def test_frozen_layers_give_the_values_of_eager(activation, fused):
    eager = randomize(BatchNorm(3, activation=activation, fused=fused))
    eager(torch.randn(8, 3, 5) + 1)
    layer = copy.deepcopy(eager.freeze())
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    x, mask, residual = torch.randn(6, 3, 5), torch.rand(6, 5) < 0.6, torch.randn(6, 3, 5)
    found, expected = step(compiled, x, mask, residual), step(eager, x, mask, residual)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.sample(3)
@pytest.mark.parametrize("bad", [1e20, float("nan"), float("inf")])
def test_a_batch_that_overflows_is_no_update(bad):
    layer = BatchNorm(2)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    x = torch.randn(8, 2)
    x[:, 1] *= bad
    eager = copy.deepcopy(layer)
    for call in (compiled, eager):
        call(x)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), **STATISTICS)
    assert layer.running_var[1] == 1
    assert layer.running_mean[1] == 0


def test_channels_without_real_rows_use_running_statistics():
    layer = BatchNorm(3)
    layer.running_mean.fill_(2.0)
    assert_same_step(layer, torch.randn(6, 3, 5), torch.zeros(6, 5, dtype=torch.bool), steps=1)


@pytest.mark.parametrize("size", [None, 3], ids=["", "ghost"])
def test_an_empty_batch_changes_nothing(size):
    assert_same_step(BatchNorm(3, virtual_batch_size=size), torch.randn(0, 3, 5))


@pytest.mark.parametrize("frozen", ["weight", "bias"])
def test_parameters_that_are_not_trained_get_no_gradient(frozen):
    layer = BatchNorm(3)
    getattr(layer, frozen).requires_grad_(False)
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    x = torch.randn(6, 3)
    compiled(x).square().sum().backward()
    assert getattr(layer, frozen).grad is None
    eager = copy.deepcopy(layer)
    eager.zero_grad()
    eager(x).square().sum().backward()
    for a, b in zip(layer.parameters(), eager.parameters(), strict=True):
        assert a.grad is b.grad is None or torch.equal(a.grad, b.grad)


def test_the_function_moves_the_statistics_that_it_is_given():
    x, found, expected = torch.randn(6, 3), torch.zeros(2, 3), torch.zeros(2, 3)
    compiled = torch.compile(batch_norm, fullgraph=True, backend=BACKEND)
    for call, running in ((compiled, found), (batch_norm, expected)):
        for _ in range(2):
            y = call(x, running[0], running[1], training=True)
    assert found.any()
    torch.testing.assert_close(found, expected, **STATISTICS)
    assert torch.equal(y, compiled(x, found[0], found[1], training=True))


MEMORY = {
    "channels-last": lambda: torch.randn(4, 6, 6, 3).permute(0, 3, 1, 2),
    "gaps": lambda: torch.randn(8, 3, 6, 6)[::2],
    "gaps-inside": lambda: torch.randn(4, 3, 6, 12)[..., ::2],
    "turned": lambda: torch.randn(6, 6, 3, 4).permute(3, 2, 0, 1),
    "expanded": lambda: torch.randn(4, 3, 1, 1).expand(4, 3, 6, 6),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("make", MEMORY.values(), ids=MEMORY)
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
def test_memory_orders_give_the_values_of_eager(make, masked):
    eager = randomize(BatchNorm2d(3))
    layer = copy.deepcopy(eager)
    x, mask = make(), torch.rand(4, 6, 6) < 0.6 if masked else None
    compiled = torch.compile(layer, fullgraph=True, backend=BACKEND)
    torch.testing.assert_close(step(compiled, x, mask), step(eager, x, mask), rtol=1e-5, atol=1e-5)


@pytest.mark.exhaustive
def test_bits_do_not_depend_on_the_number_of_threads():
    compiled = torch.compile(BatchNorm(8), fullgraph=True)
    x, threads, found = torch.randn(4096, 8), torch.get_num_threads(), []
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(step(compiled, x))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert_bits(other, found[0])


# torch's requirements for operators


def arguments_of(
    shape, *, masked=False, residual=False, axes=(1,), size=None, activation=None, zero=False
):
    x = torch.randn(shape, requires_grad=True)
    channels = [shape[a] for a in axes]
    weight, bias = (torch.randn(channels, requires_grad=True) for _ in range(2))
    rows = [n for a, n in enumerate(shape) if a not in axes]
    mask = torch.rand(rows) < 0.6 if masked else None
    added = torch.randn(shape, requires_grad=True) if residual else None
    running = torch.zeros(channels), torch.ones(channels)
    padded_output = "zero" if zero else "normalize"
    options = (list(axes), size, 1e-5, activation, padded_output, True, False, "")
    return x, mask, weight, bias, added, *running, *options


CALLS = {
    "plain": {},
    "masked": {"masked": True},
    "ghost": {"size": 3, "masked": True},
    "residual-relu": {"residual": True, "activation": "relu"},
    "two-axes": {"axes": (1, 2)},
    "zeroed": {"masked": True, "residual": True, "zero": True},
}


# torch hides this warning of its own while it looks at a tensor, unless warnings are errors.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("option", CALLS.values(), ids=CALLS)
def test_operators_pass_the_checks_of_torch(option):
    torch.library.opcheck(
        torch.ops.batchnorm.differentiable_step.default, arguments_of((6, 4, 5), **option)
    )


def test_gradients_agree_with_differences():
    layer = torch.compile(randomize(BatchNorm(3)).double(), fullgraph=True, backend=BACKEND)
    x, mask = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True), torch.rand(6, 4) < 0.7
    assert torch.autograd.gradcheck(lambda x: torch.where(mask[:, None], layer(x, mask), 0), x)


@pytest.mark.parametrize("backend", [BACKEND, "inductor"])
def test_batched_gradients_equal_those_one_by_one(backend):
    layer = randomize(BatchNorm(3))
    x, mask = torch.randn(5, 3, requires_grad=True), torch.rand(5) < 0.8
    y = torch.compile(layer, fullgraph=True, backend=backend)(x, mask)
    dys = torch.randn(4, 5, 3)
    inputs = (x, layer.weight, layer.bias)
    found = torch.autograd.grad(y, inputs, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        expected = torch.autograd.grad(y, inputs, dy, retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a[i], b)


def test_a_second_derivative_through_a_graph_raises():
    layer = torch.compile(BatchNorm(3), fullgraph=True, backend=BACKEND)
    x = torch.randn(6, 3, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError):
        dx.sum().backward()


def test_a_graph_whose_kernels_are_gone_says_so(monkeypatch):
    layer = torch.compile(BatchNorm(3), fullgraph=True, backend=BACKEND)
    x = torch.randn(6, 3)
    layer(x)
    kind = (2, 3), (3, 1), x.dtype, "cpu"
    refused = decision.decide(kind, 1, None, True, None, False, None, False)
    monkeypatch.setattr(operators, "decide", lambda *arguments: refused)
    with pytest.raises(RuntimeError, match="compiled for kernels that do not serve it here"):
        layer(x)


# Compiling once


def test_a_schedule_of_momentum_compiles_a_second_time_only():
    layer, eager = BatchNorm(3), BatchNorm(3)
    counter = CompileCounterWithBackend(BACKEND)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for n in range(12):
        layer.momentum = eager.momentum = 0.5 / (n + 1)
        x = torch.randn(4, 3)
        compiled(x), eager(x)
    assert counter.frame_count == 2
    torch.testing.assert_close(layer.state_dict(), eager.state_dict(), **STATISTICS)


# Transformations and callers that are not compiled


@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_transformations_take_array_code(inside):
    layer = BatchNorm(3, track_running_stats=False)
    x = torch.randn(5, 8, 3)

    def loss(x):
        return torch.sin(layer(x)).sum()

    expected = vmap(grad(loss))(x)
    if inside:
        found = torch.compile(vmap(grad(loss)), fullgraph=True, backend=BACKEND)(x)
    else:
        found = vmap(grad(torch.compile(loss, backend=BACKEND)))(x)
    torch.testing.assert_close(found, expected)


def test_forward_mode_around_a_graph_takes_array_code():
    def forward(x):
        return batch_norm(x, None, None, training=True)

    # From 2.14 on the compiler leaves calls with dual tensors to eager code, which a whole graph
    # cannot.
    whole = Version(torch.__version__) < Version("2.14")
    compiled = torch.compile(forward, fullgraph=whole, backend=BACKEND)
    x, tangent = torch.randn(2, 6, 3)
    compiled(x)  # the graph without forward mode exists already
    found = []
    for call in (compiled, forward):
        with forward_ad.dual_level():
            y = call(forward_ad.make_dual(x, tangent))
            found.append(forward_ad.unpack_dual(y).tangent)
    assert found[0] is not None
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("track", [True, False])
def test_a_caller_that_the_compiler_gave_up_on_still_calls_the_kernels(track):
    layer = BatchNorm1d(3, track_running_stats=track)
    x = torch.randn(5, 8, 3)
    # vmap over a compiled function makes the compiler skip that function, and go on inside of it.
    compiled = torch.compile(lambda x: layer.eval()(x), backend=BACKEND)
    vmap(compiled)(x)
    expected = layer(x[0])
    for _ in range(3):
        assert torch.equal(compiled(x[0]), expected)


def test_a_sequence_of_shapes_equals_eager():
    eager = randomize(BatchNorm(3))
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=BACKEND)
    for n, length in itertools.product((2, 5, 4), (3, 7)):
        x, mask = torch.randn(n, 3, length), torch.rand(n, length) < 0.7
        assert_bits(step(compiled, x, mask), step(eager, x, mask))
