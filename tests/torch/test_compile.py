"""`torch.compile` changes only the speed."""

import contextlib
import copy
import cProfile
import pstats
import threading

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import batchnorm
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask

CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32: fusion reorders and contracts operations
EXACT = 5e-5  # S3, plain path, compiled
OFFSETS = (0.0, 1e2, 1e4, 1e6)
EAGER_BACKEND = "aot_eager"  # traces and differentiates like inductor, without a C++ compiler

VARIANTS = {
    "default": ({}, (6, 4, 5)),
    "cumulative": ({"momentum": None}, (6, 4, 5)),
    "no-affine": ({"affine": False}, (6, 4, 5)),
    "no-running": ({"track_running_stats": False}, (6, 4, 5)),
    "ghost": ({"virtual_batch_size": 3}, (6, 4, 5)),
    "renorm": ({"renorm": True, "renorm_clipping": {"rmax": 3.0, "dmax": 5.0}}, (6, 4, 5)),
    "leaky-relu": ({"activation": "leaky_relu"}, (6, 4, 5)),
    "two-axes": ({"axis": (1, -1)}, (6, 4, 5)),
    "adjustment": (
        {"adjustment": lambda shape: (torch.full((*shape[:1], 1, 1), 1.5), 0.5)},
        (6, 4, 5),
    ),
}
variants = pytest.mark.parametrize(("option", "shape"), VARIANTS.values(), ids=VARIANTS)
# torch 2.13 itself defines a ScriptModule when it first differentiates or lowers a graph.
pytestmark = [
    pytest.mark.sample(2),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]
backends = pytest.mark.parametrize(
    "backend", [EAGER_BACKEND, pytest.param("inductor", marks=pytest.mark.exhaustive)]
)
masking = pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.manual_seed(0)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make(option, shape):
    axis = option.get("axis", 1)
    sizes = shape[1] if axis == 1 else tuple(shape[a] for a in axis)
    layer = BatchNorm(sizes, **option)
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    return layer


def rows(option, shape):
    axes = {a % len(shape) for a in option.get("axis", (1,))}
    return [n for a, n in enumerate(shape) if a not in axes]


def step(layer, *arguments):
    """y, dx and the parameters' gradients."""
    layer.zero_grad()
    x, *rest = arguments
    x = x.clone().requires_grad_()
    y = layer(x, *rest)
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1))
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def assert_same_state(actual, expected):
    torch.testing.assert_close(dict(actual.state_dict()), dict(expected.state_dict()), **CLOSE)


# Training and evaluation


@pytest.mark.sample(3)
@variants
@masking
def test_compiled_training_equals_eager(option, shape, masked):
    eager = make(option, shape)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    for _ in range(3):
        x = torch.randn(shape) + 2
        mask = torch.rand(rows(option, shape)) < 0.7 if masked else None
        torch.testing.assert_close(step(compiled, x, mask), step(eager, x, mask), **CLOSE)
    assert_same_state(layer, eager)


@pytest.mark.sample(5)
@variants
@masking
def test_compiled_evaluation_equals_eager(option, shape, masked):
    eager = make(option, shape)
    eager(torch.randn(shape) + 2)
    layer = copy.deepcopy(eager.eval())
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    x, mask = torch.randn(shape), torch.rand(rows(option, shape)) < 0.7 if masked else None
    torch.testing.assert_close(step(compiled, x, mask), step(eager, x, mask), **CLOSE)
    assert_same_state(layer, eager)


def test_compiled_layer_counts_batches():
    layer = BatchNorm2d(3)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    for _ in range(4):
        compiled(torch.randn(2, 3, 4, 4))
    assert layer.num_batches_tracked == 4


def test_compiled_residual_equals_eager():
    eager = make({"activation": "relu"}, (6, 4, 5))
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    x, residual = torch.randn(6, 4, 5), torch.randn(6, 4, 5)
    torch.testing.assert_close(
        step(compiled, x, None, residual), step(eager, x, None, residual), **CLOSE
    )


def test_compiled_frozen_layer_equals_eager():
    eager = make({}, (6, 4, 5))
    eager(torch.randn(6, 4, 5) + 2)
    eager.freeze()
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    x = torch.randn(6, 4, 5)
    torch.testing.assert_close(step(compiled, x), step(eager, x), **CLOSE)
    assert_same_state(layer, eager)


def test_freezing_a_compiled_layer_takes_effect():
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    compiled(torch.randn(8, 3))
    before = layer.running_mean.clone()
    layer.freeze()
    compiled(torch.randn(8, 3))
    assert torch.equal(layer.running_mean, before)


def test_switching_a_compiled_layer_to_evaluation_takes_effect():
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    compiled(torch.randn(8, 3))
    layer.eval()
    x = torch.randn(8, 3)
    torch.testing.assert_close(compiled(x), layer(x), **CLOSE)


def test_compiled_overflow_leaves_statistics_unchanged():
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    compiled(torch.full((8, 3), float("inf")))
    assert_same_state(layer, BatchNorm1d(3))


def test_compiled_empty_channels_leave_statistics_unchanged():
    layer = BatchNorm1d(3)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    compiled(torch.randn(8, 3), torch.zeros(8, dtype=torch.bool))
    assert_same_state(layer, BatchNorm1d(3))


@pytest.mark.sample(3)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_compiled_layer_keeps_types(dtype):
    layer = BatchNorm1d(3).to(dtype)
    compiled = torch.compile(layer, fullgraph=True, backend=EAGER_BACKEND)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert compiled(torch.randn(8, 3).to(dtype)).dtype == dtype
    assert layer.running_mean.dtype == wide


# Recompilation


def test_new_mask_values_do_not_recompile():
    counter = CompileCounterWithBackend(EAGER_BACKEND)
    compiled = torch.compile(BatchNorm1d(3), fullgraph=True, backend=counter)
    for _ in range(4):
        compiled(torch.randn(8, 3), torch.rand(8) < 0.5)
    assert counter.frame_count == 1


def test_further_steps_do_not_recompile():
    counter = CompileCounterWithBackend(EAGER_BACKEND)
    compiled = torch.compile(BatchNorm1d(3, momentum=None), fullgraph=True, backend=counter)
    for _ in range(4):
        compiled(torch.randn(8, 3))
    assert counter.frame_count == 1


DYNAMIC = {"plain": ({}, (4, 6, 10, 3)), "ghost": ({"virtual_batch_size": 2}, (4, 6, 10, 8))}


@pytest.mark.sample(3)
@pytest.mark.parametrize(("option", "sizes"), DYNAMIC.values(), ids=DYNAMIC)
@masking
def test_dynamic_batch_sizes_equal_eager(option, sizes, masked):
    eager = BatchNorm1d(3, **option)
    layer = copy.deepcopy(eager)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=EAGER_BACKEND)
    for n in sizes:
        x, mask = torch.randn(n, 3, 5), torch.rand(n, 5) < 0.7 if masked else None
        torch.testing.assert_close(step(compiled, x, mask), step(eager, x, mask), **CLOSE)
    assert_same_state(layer, eager)


@pytest.mark.parametrize(("option", "sizes"), DYNAMIC.values(), ids=DYNAMIC)
def test_dynamic_batch_sizes_do_not_recompile(option, sizes):
    counter = CompileCounterWithBackend(EAGER_BACKEND)
    layer = BatchNorm1d(3, **option)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    # The first call may compile twice: an operator's eps must be a number, not a symbol.
    compiled(torch.randn(sizes[0], 3, 5))
    before = counter.frame_count
    for n in sizes:
        compiled(torch.randn(n, 3, 5))
    assert counter.frame_count == before


# The real compiler, at offsets (S3)


def offset_data(offset, rows, channels):
    return (torch.randn(rows, channels, dtype=torch.float64) + offset).float()


def error(y, x):
    """The error in units of 1 + |x̂|."""
    exact = torch.from_numpy(batchnorm.batch_norm(x.numpy(), eps=1e-5)[0])
    return ((y.detach().double() - exact).abs() / (1 + exact.abs())).max()


@pytest.mark.parametrize("offset", OFFSETS)
def test_inductor_is_exact_at_offset(offset):
    x = offset_data(offset, 4096, 8)
    assert error(torch.compile(BatchNorm1d(8), fullgraph=True)(x), x) <= EXACT


@pytest.mark.parametrize("offset", [1e6])
def test_inductor_is_exact_at_offset_with_gradient(offset):
    x = offset_data(offset, 4096, 8)
    y, dx, (dgamma, dbeta) = step(torch.compile(BatchNorm1d(8), fullgraph=True), x)
    dy = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).double()
    expected = batchnorm.batch_norm_gradient(dy.numpy(), x.numpy(), eps=1e-5)
    dx64, dgamma64, dbeta64 = map(torch.from_numpy, expected)
    terms = dy.abs() * (1 + y.double().abs())
    assert error(y, x) <= EXACT
    assert (dx.double() - dx64).abs().max() <= EXACT * terms.max()
    assert ((dgamma.double() - dgamma64).abs() <= EXACT * terms.norm(dim=0)).all()
    assert ((dbeta.double() - dbeta64).abs() <= EXACT * terms.norm(dim=0)).all()


@pytest.mark.parametrize("option", [{}, {"virtual_batch_size": 512}], ids=["mask", "ghost-mask"])
def test_inductor_is_exact_at_offset_with_mask(option):
    x, mask = offset_data(1e6, 4096, 8), torch.rand(4096) < 0.5
    exact, _ = batchnorm.batch_norm(x.numpy(), eps=1e-5, mask=mask.numpy(), **option)
    exact = torch.from_numpy(exact)
    y = torch.compile(BatchNorm1d(8, **option), fullgraph=True)(x, mask)
    assert ((y.detach().double() - exact).abs() / (1 + exact.abs())).max() <= EXACT


# The second is a number whose multiples need all digits of a float32, unlike those of 1e6.
@pytest.mark.parametrize(("offset", "rows"), [(1e6, 10**6), (1.234567e6, 777_777)])
def test_inductor_is_exact_over_a_million_rows(offset, rows):
    x = offset_data(offset, rows, 4)
    assert error(torch.compile(BatchNorm1d(4), fullgraph=True)(x), x) <= EXACT


@pytest.mark.exhaustive
def test_inductor_is_exact_channels_first():
    x = offset_data(1e6, 16 * 32 * 32, 3).reshape(16, 32, 32, 3)
    y = torch.compile(BatchNorm2d(3), fullgraph=True)(x.permute(0, 3, 1, 2).contiguous())
    assert error(y.permute(0, 2, 3, 1).reshape(-1, 3), x.reshape(-1, 3)) <= EXACT


def test_inductor_evaluates_exactly_at_offset():
    layer, x = BatchNorm1d(8, momentum=1.0), offset_data(1e6, 4096, 8)
    layer(x)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    exact = (x.double() - mean) / torch.sqrt(var + layer.eps)
    y = torch.compile(layer.eval(), fullgraph=True)(x)
    assert ((y - exact).abs() / (1 + exact.abs())).max() <= EXACT


def count_calls(layer, *arguments):
    """The calls of functions that compiling a forward pass takes."""
    profile = cProfile.Profile()
    with torch._inductor.config.patch(fx_graph_cache=False):
        profile.runcall(torch.compile(layer, fullgraph=True), *arguments)
    return pstats.Stats(profile).total_calls


# Without `Namespace.materialize` it is 50 to 110 times as many.
@pytest.mark.parametrize(
    ("options", "masked", "most"),
    [({}, False, 7), ({}, True, 12), ({"renorm": True}, False, 12)],
    ids=["plain", "masked", "renorm"],
)
def test_compiling_takes_a_few_times_the_work_of_torch(options, masked, most):
    x = torch.randn(64, 8)
    arguments = (x, torch.rand(64) < 0.5) if masked else (x,)
    count_calls(nn.BatchNorm1d(8), x)  # what is done once in a process
    torch._dynamo.reset()
    original = count_calls(nn.BatchNorm1d(8), x)
    assert count_calls(BatchNorm1d(8, **options), *arguments) <= most * original


@pytest.mark.exhaustive
def test_inductor_trains_a_network_like_eager():
    eager = nn.Sequential(nn.Conv2d(2, 4, 3), BatchNorm2d(4, activation="relu"), nn.Conv2d(4, 2, 3))
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, fullgraph=True)
    for _ in range(2):
        x = torch.randn(3, 2, 8, 8)
        # Gradients of the convolution before a batch norm are sums that nearly cancel.
        torch.testing.assert_close(step(compiled, x), step(eager, x), rtol=1e-4, atol=1e-4)
    assert_same_state(model[1], eager[1])


# Checkpointing (S9)


class Checkpointed(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(4, 4), layer)

    def forward(self, x):
        return checkpoint(self.inner, x, use_reentrant=False)


def reference_step(model, x):
    eager = copy.deepcopy(model.inner)
    return eager, step(eager, x)


@backends
def test_checkpoint_inside_a_compiled_model_updates_once(backend):
    model, x = Checkpointed(BatchNorm1d(4)), torch.randn(8, 4)
    eager, expected = reference_step(model, x)
    found = step(torch.compile(model, fullgraph=True, backend=backend), x)
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_same_state(model.inner, eager)


@backends
@pytest.mark.parametrize("reentrant", [True, False])
def test_compiled_layer_inside_a_checkpoint_updates_once(backend, reentrant):
    layer, x = BatchNorm1d(4), torch.randn(8, 4)
    eager = copy.deepcopy(layer)
    expected = step(eager, x)
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    leaf = x.clone().requires_grad_()
    y = checkpoint(compiled, leaf, use_reentrant=reentrant)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(1)))
    found = y.detach(), leaf.grad, [p.grad for p in layer.parameters()]
    torch.testing.assert_close(found, expected, **CLOSE)
    assert_same_state(layer, eager)


# padding_mask around a compiled model


def setting(backend=EAGER_BACKEND, counter=False):
    """A layer, the same layer compiled, and a counter of its compilations."""
    layer = BatchNorm1d(3, momentum=None)
    counter = CompileCounterWithBackend(backend)
    return layer, torch.compile(layer, fullgraph=True, backend=counter), counter


def expected_in(mask, x):
    return BatchNorm1d(3)(x, mask=mask)


@backends
def test_padding_mask_reaches_a_compiled_layer(backend):
    _, compiled, _ = setting(backend)
    x, mask = torch.randn(8, 3), torch.rand(8) < 0.6
    with padding_mask(mask):
        y = compiled(x)
    torch.testing.assert_close(y, expected_in(mask, x), **CLOSE)


def test_padding_mask_reaches_a_layer_compiled_without_one():
    _, compiled, _ = setting()
    x, mask = torch.randn(8, 3), torch.rand(8) < 0.6
    compiled(x)
    with padding_mask(mask):
        y = compiled(x)
    torch.testing.assert_close(y, expected_in(mask, x), **CLOSE)


def test_padding_mask_has_eager_gradients_and_statistics_when_compiled():
    layer, compiled, _ = setting()
    eager = copy.deepcopy(layer)
    x = torch.randn(8, 3)
    with padding_mask(torch.rand(8) < 0.6):
        torch.testing.assert_close(step(compiled, x), step(eager, x), **CLOSE)
    assert_same_state(layer, eager)


def test_new_values_of_padding_mask_do_not_recompile():
    _, compiled, counter = setting()
    x = torch.randn(8, 3)
    for _ in range(4):
        with padding_mask(torch.rand(8) < 0.6):
            compiled(x)
    assert counter.frame_count == 1


def test_each_new_value_of_padding_mask_counts_when_compiled():
    _, compiled, _ = setting()
    x = torch.randn(8, 3)
    masks = torch.rand(3, 8) < 0.6
    for mask in masks:
        with padding_mask(mask):
            y = compiled(x)
    torch.testing.assert_close(y, expected_in(masks[-1], x), **CLOSE)


def test_inner_padding_mask_wins_when_compiled():
    _, compiled, _ = setting()
    x, outer, inner = torch.randn(8, 3), torch.rand(8) < 0.6, torch.rand(8) < 0.6
    with padding_mask(outer), padding_mask(inner):
        y = compiled(x)
    torch.testing.assert_close(y, expected_in(inner, x), **CLOSE)


def test_outer_padding_mask_is_back_after_the_inner_one_when_compiled():
    _, compiled, _ = setting()
    x, outer, inner = torch.randn(8, 3), torch.rand(8) < 0.6, torch.rand(8) < 0.6
    with padding_mask(outer):
        with padding_mask(inner):
            compiled(x)
        y = compiled(x)
    torch.testing.assert_close(y, expected_in(outer, x), **CLOSE)


def test_inner_none_switches_padding_mask_off_when_compiled():
    _, compiled, _ = setting()
    x = torch.randn(8, 3)
    with padding_mask(torch.rand(8) < 0.6), padding_mask(None):
        y = compiled(x)
    torch.testing.assert_close(y, expected_in(None, x), **CLOSE)


def test_padding_mask_ends_with_its_block_when_compiled():
    _, compiled, _ = setting()
    x = torch.randn(8, 3)
    with padding_mask(torch.rand(8) < 0.6):
        compiled(x)
    torch.testing.assert_close(compiled(x), expected_in(None, x), **CLOSE)


def test_padding_mask_ends_with_an_exception_when_compiled():
    _, compiled, _ = setting()
    x = torch.randn(8, 3)
    with contextlib.suppress(KeyError), padding_mask(torch.rand(8) < 0.6):
        compiled(x)
        raise KeyError
    torch.testing.assert_close(compiled(x), expected_in(None, x), **CLOSE)


def test_explicit_mask_wins_over_padding_mask_when_compiled():
    _, compiled, _ = setting()
    x, ambient, own = torch.randn(8, 3), torch.rand(8) < 0.6, torch.rand(8) < 0.6
    with padding_mask(ambient):
        y = compiled(x, own)
    torch.testing.assert_close(y, expected_in(own, x), **CLOSE)


def test_padding_mask_is_not_seen_by_another_thread_when_compiled():
    _, compiled, _ = setting()
    x, found = torch.randn(8, 3), []
    compiled(x)
    with padding_mask(torch.rand(8) < 0.6):
        compiled(x)
        thread = threading.Thread(target=lambda: found.append(compiled(x)))
        thread.start()
        thread.join()
    torch.testing.assert_close(found[0], expected_in(None, x), **CLOSE)


def test_padding_mask_is_rescaled_when_compiled():
    _, compiled, _ = setting()
    x, mask = torch.randn(4, 3, 5), torch.rand(4, 10) < 0.6
    with padding_mask(mask, rescale="any"):
        y = compiled(x)
    expected = expected_in(mask.reshape(4, 5, 2).any(-1), x)
    torch.testing.assert_close(y, expected, **CLOSE)


def test_padding_mask_that_does_not_fit_raises_when_compiled():
    _, compiled, _ = setting()
    with padding_mask(torch.ones(7, dtype=torch.bool)), pytest.raises(ValueError, match="not fit"):
        compiled(torch.randn(8, 3))


def test_padding_mask_leaves_compiled_evaluation_alone():
    layer, compiled, _ = setting()
    layer.eval()
    x = torch.randn(8, 3)
    with padding_mask(torch.rand(8) < 0.6):
        y = compiled(x)
    torch.testing.assert_close(y, layer(x), **CLOSE)


@pytest.mark.parametrize("outer", ["checkpoint", "compile"])
@backends
def test_compiled_renorm_in_a_checkpoint_finds_the_statistics_of_its_first_pass(outer, backend):
    options = {"renorm": True, "renorm_clipping": {"rmax": 1.1, "dmax": 0.3}, "momentum": 0.5}
    compiled, eager = (BatchNorm(3, **options) for _ in range(2))
    if outer == "checkpoint":
        inner = torch.compile(compiled, fullgraph=True, backend=backend)
        call = lambda x: checkpoint(inner, x, use_reentrant=False)  # noqa: E731
        waiting = 2  # statistics move on before the first backward pass
    else:
        call = torch.compile(
            lambda x: checkpoint(compiled, x, use_reentrant=False),
            fullgraph=True,
            backend=backend,
        )
        waiting = 1  # torch keeps buffers for the backward pass of such a graph
    for _ in range(3):
        inputs = [torch.randn(8, 3) * 2 + 1 for _ in range(waiting)]
        found = []
        for step in (call, eager):
            leaves = [x.clone().requires_grad_() for x in inputs]
            outputs = [step(x) for x in leaves]
            for y in outputs:
                (y * torch.arange(3.0)).sum().backward()
            found.append([*outputs, *(x.grad for x in leaves)])
        torch.testing.assert_close(*found, **CLOSE)
    torch.testing.assert_close(compiled.state_dict(), eager.state_dict(), **CLOSE)
    assert compiled.num_batches_tracked == 3 * waiting
