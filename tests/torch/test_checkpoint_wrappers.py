"""Checkpoint wrappers of other libraries: statistics move once (S9)."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm1d, padding_mask

OPTIONS = {
    "plain": {},
    "arrays": {"fused": False},
    "renorm": {"renorm": True},
    "cumulative": {"momentum": None},
    "ghost": {"virtual_batch_size": 4},
}
options = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)


def switch_off(module, args):
    """fairscale's hook before the first pass of a checkpoint, which runs without gradients."""
    if not torch.is_grad_enabled():
        module._track_running_stats_backup = module.track_running_stats
        module.track_running_stats = False


def switch_on(module, args, result):
    """fairscale's hook after it."""
    if not torch.is_grad_enabled():
        module.track_running_stats = module._track_running_stats_backup


def patch(model, *, asks):
    """Hook the batch norms of a model; `asks`: leave out those that want none, as fairscale."""
    for module in model.modules():
        if isinstance(module, _BatchNorm) and not (
            asks and hasattr(module, "disable_patch_batchnorm")
        ):
            module.register_forward_pre_hook(switch_off)
            module.register_forward_hook(switch_on)


class DeepSpeedFunction(torch.autograd.Function):
    """A checkpoint as DeepSpeed and Megatron write it: backward runs forward again."""

    @staticmethod
    def forward(ctx, function, x):
        ctx.function, ctx.x = function, x.detach()
        with torch.no_grad():
            return function(x)

    @staticmethod
    def backward(ctx, dy):
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            y = ctx.function(x)
        torch.autograd.backward(y, dy)
        return None, x.grad


WAYS = {
    "reentrant": functools.partial(checkpoint, use_reentrant=True),
    "saved": functools.partial(checkpoint, use_reentrant=False),
    "own function": lambda f, x: DeepSpeedFunction.apply(f, x),
    "nested": lambda f, x: checkpoint(
        lambda a: checkpoint(f, a, use_reentrant=True), x, use_reentrant=True
    ),
}


def make(options):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), BatchNorm1d(3, **options), nn.Linear(3, 3), nn.Tanh())


def states(model):
    return {name: a.clone() for name, a in model[1].state_dict().items()}


@options
@pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("asks", [True, False], ids=["asks", "asks not"])
def test_statistics_move_once_under_hooks_that_switch_tracking_off(options, way, asks):
    plain, model = make(options), make(options)
    patch(model, asks=asks)
    for step in range(4):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step)) + 2.0
        for one, run in ((plain, lambda f, a: f(a)), (model, way)):
            leaf = x.clone().requires_grad_()
            run(one, leaf).square().sum().backward()
            one.gradient = leaf.grad
        assert torch.equal(plain.gradient, model.gradient)
        for name, a in states(plain).items():
            assert torch.equal(states(model)[name], a), name
    assert model[1].num_batches_tracked == 4


def test_a_layer_that_runs_twice_moves_twice():
    layer, other = BatchNorm(3), BatchNorm(3)
    patch(layer, asks=False)
    xs = [torch.randn(8, 3), torch.randn(8, 3) + 1.0]
    leaves = [x.clone().requires_grad_() for x in xs]
    ys = [checkpoint(layer, leaf, use_reentrant=True) for leaf in leaves]
    for y in reversed(ys):  # backward passes come the other way round
        y.sum().backward()
    for x in reversed(xs):
        other(x)
    assert layer.num_batches_tracked == 2
    torch.testing.assert_close(layer.running_mean, other.running_mean)


def test_passes_without_tracking_that_nothing_repeats_leave_no_trace():
    layer, x = BatchNorm(3), torch.randn(8, 3, requires_grad=True)
    layer.track_running_stats = False
    with torch.no_grad():
        for _ in range(3):
            layer(x)
    layer.track_running_stats = True
    checkpoint(layer, x, use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1
    for _ in range(3):
        layer(x)
    assert layer.num_batches_tracked == 4


@pytest.mark.parametrize("fused", [None, False], ids=["kernels", "arrays"])
def test_a_late_move_leaves_r_and_d_of_the_first_pass(fused):
    # Both first passes see the same statistics; the first recomputation moves them.
    layer = BatchNorm1d(3, renorm=True, fused=fused, dtype=torch.float64)
    layer.running_mean.normal_(), layer.renorm_mean.normal_()
    twins = [copy.deepcopy(layer) for _ in range(2)]
    patch(layer, asks=False)
    xs = [torch.randn(8, 3).double() * scale + scale for scale in (1, 4)]
    leaves, others = ([x.clone().requires_grad_() for x in xs] for _ in range(2))
    ys = [checkpoint(layer, leaf, use_reentrant=True) for leaf in leaves]
    dy = torch.randn(8, 3).double()
    for y, leaf, twin, other in zip(ys, leaves, twins, others, strict=True):
        y.backward(dy)
        twin(other).backward(dy)
        torch.testing.assert_close(leaf.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert layer.num_batches_tracked == 2


def test_jagged_statistics_move_once_under_hooks():
    layer, offsets = BatchNorm(3, axis=-1), torch.tensor([0, 4, 10])
    patch(layer, asks=False)

    def run(values):
        return layer(torch.nested.nested_tensor_from_jagged(values, offsets)).values()

    checkpoint(run, torch.randn(10, 3, requires_grad=True), use_reentrant=True).sum().backward()
    assert layer.num_batches_tracked == 1


def test_nested_checkpoints_leave_nothing_to_move():
    layer, x = BatchNorm1d(3), torch.randn(8, 3, requires_grad=True)
    patch(layer, asks=False)
    y = WAYS["nested"](layer, x).sum()
    y.backward(retain_graph=True)
    y.backward()
    assert layer.num_batches_tracked == 1


def test_a_late_move_draws_nothing_at_random():
    drawn = []
    layer = BatchNorm(3, adjustment=lambda shape: (drawn.append(shape), 1.0)[1:] * 2)
    patch(layer, asks=False)
    x = torch.randn(8, 3, requires_grad=True)
    checkpoint(layer, x, use_reentrant=True).sum().backward()
    assert (len(drawn), int(layer.num_batches_tracked)) == (2, 1)


UNREADABLE = {
    "vmap": lambda layer: torch.func.vmap(layer)(torch.randn(2, 8, 3)),
    "meta": lambda layer: layer.to("meta")(torch.randn(8, 3, device="meta")),
    "traced": lambda layer: make_fx(layer)(torch.randn(8, 3)),
}


@pytest.mark.parametrize("run", UNREADABLE.values(), ids=UNREADABLE)
def test_passes_without_tracking_may_have_values_that_nobody_can_read(run):
    layer = BatchNorm1d(3)
    layer.track_running_stats = False
    with torch.no_grad():
        run(layer)


def test_masks_reach_both_passes():
    layer, other = BatchNorm(3), BatchNorm(3)
    patch(layer, asks=False)
    x, mask = torch.randn(8, 3), torch.rand(8) < 0.6
    with padding_mask(mask):
        checkpoint(layer, x.requires_grad_(), use_reentrant=True).sum().backward()
    other(x.detach(), mask=mask)
    assert torch.equal(layer.running_mean, other.running_mean)


def test_operators_that_read_the_state_of_python_are_kept_out_of_captured_graphs():
    import batchnorm.torch.ranks.array_moments  # noqa: F401

    names = ("ambient_mask", "snapshot", "leaves_statistics")
    names += ("merge_ranks", "total_over_ranks", "attach")
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    if tag is None:
        pytest.skip("this torch has no tag for it")
    for name in names:
        assert tag in getattr(torch.ops.batchnorm, name).default.tags, name
    assert tag not in torch.ops.batchnorm.differentiable_step.default.tags
