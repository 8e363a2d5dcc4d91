"""Passes that leave the running statistics alone (S20)."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, batch_norm, explicit, keep_statistics
from batchnorm.torch.functional import RenormStatistics

OPTIONS = {
    "plain": {},
    "arrays": {"fused": False},
    "cumulative": {"momentum": None},
    "ghost": {"virtual_batch_size": 4},
    "renorm": {"renorm": True},
    "debias": {"debias": True},
}
options = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)
pytestmark = [
    pytest.mark.sample(2),
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning"),
]


def trained(**option):
    torch.manual_seed(0)
    layer = BatchNorm(3, **option)
    for _ in range(3):  # so that a last call is known
        layer(torch.randn(8, 3))
    return layer


def state(layer):
    return {name: a.clone() for name, a in layer.state_dict().items()}


@options
def test_y_and_gradients_are_those_of_training(option):
    layer = trained(**option)
    other = copy.deepcopy(layer)
    before, x = state(layer), torch.randn(8, 3)
    found = []
    for each in (layer, other):
        leaf = x.clone().requires_grad_()
        if each is layer:
            with keep_statistics():
                y = each(leaf)
        else:
            y = each(leaf)
        y.square().sum().backward()
        found.append((y, leaf.grad, each.weight.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert all(torch.equal(a, before[name]) for name, a in state(layer).items())
    assert other.num_batches_tracked == 4


def test_it_nests_and_ends_with_an_exception():
    layer, x = trained(), torch.randn(8, 3)
    with keep_statistics():
        with pytest.raises(KeyError), keep_statistics():
            raise KeyError
        layer(x)
        assert layer.num_batches_tracked == 3
    layer(x)
    assert layer.num_batches_tracked == 4


def test_a_block_may_be_opened_again():
    layer, x, block = trained(), torch.randn(8, 3), keep_statistics()
    with block, block:
        layer(x)
    layer(x)
    with block:
        layer(x)
    assert layer.num_batches_tracked == 4


def test_blocks_may_end_in_another_order_than_they_began():
    def hold():
        with keep_statistics():
            yield

    layer, first, second = trained(), hold(), hold()
    next(first), next(second)
    first.close()
    layer(torch.randn(8, 3))
    assert layer.num_batches_tracked == 3
    second.close()
    layer(torch.randn(8, 3))
    assert layer.num_batches_tracked == 4


def test_other_threads_move_their_statistics():
    layer, x = trained(), torch.randn(8, 3)
    with keep_statistics():
        thread = threading.Thread(target=layer, args=(x,))
        thread.start()
        thread.join()
        layer(x)
    assert layer.num_batches_tracked == 4


@pytest.mark.sample(3)
@pytest.mark.parametrize("option", [{}, {"fused": False}, {"renorm": True}])
def test_a_compiled_layer_reads_it_when_it_runs(option):
    torch._dynamo.reset()
    layer, x = BatchNorm(3, **option), torch.randn(8, 3)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    with keep_statistics():
        compiled(x)
    before = state(layer)
    assert layer.num_batches_tracked == 0
    compiled(x)
    moved = state(layer)
    with keep_statistics():
        compiled(2 * x)
    assert not torch.equal(moved["running_mean"], before["running_mean"])
    assert all(torch.equal(a, moved[name]) for name, a in state(layer).items())
    assert counter.frame_count == 1


def test_a_block_inside_a_compiled_function():
    torch._dynamo.reset()
    layer, x = BatchNorm(3, momentum=1.0), torch.randn(8, 3)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def twice(x):
        with keep_statistics():
            first = layer(x)
        return first + layer(2 * x)

    twice(x)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.running_mean, 2 * x.mean(0))
    layer(x)
    assert layer.num_batches_tracked == 2


def test_an_exported_program_of_a_block_moves_nothing():
    layer, x = BatchNorm(3), torch.randn(8, 3)
    with keep_statistics(), pytest.warns(UserWarning, match=r"torch\.export"):
        program = torch.export.export(layer, (x,), strict=False)
    module = program.module()
    module(x)
    assert module.running_mean.abs().max() == 0


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", ["first pass", "backward"])
def test_checkpointing(reentrant, inside):
    layer, x = trained(), torch.randn(8, 3, requires_grad=True)
    before = state(layer)
    with keep_statistics():
        if inside == "first pass":
            y = checkpoint(layer, x, use_reentrant=reentrant)
    if inside == "backward":
        y = checkpoint(layer, x, use_reentrant=reentrant)
        assert layer.num_batches_tracked == 4
        before = state(layer)
        with keep_statistics():
            y.sum().backward()
    else:
        y.sum().backward()
    assert all(torch.equal(a, before[name]) for name, a in state(layer).items())


def test_renormalization_is_recomputed_with_what_its_first_pass_saw():
    layer = trained(renorm=True)
    plain, x = copy.deepcopy(layer), torch.randn(8, 3) + 1
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    with keep_statistics():
        y = checkpoint(layer, leaves[0], use_reentrant=False)
        expected = plain(leaves[1])
    layer(torch.randn(8, 3) * 5)
    for out in (y, expected):
        out.square().sum().backward()
    assert torch.equal(leaves[0].grad, leaves[1].grad)


def test_functions_and_explicit_layers():
    mean, var, x = torch.zeros(3), torch.ones(3), torch.randn(8, 3)
    renorm = RenormStatistics(torch.ones(3), torch.zeros(3), torch.ones(3))
    layer = explicit.BatchNorm()
    layer.initialise_layer(input_shape=(3,))
    with keep_statistics():
        batch_norm(x, mean, var, training=True, renorm=renorm)
        y = layer.forward(x, training=True)
    assert all(torch.equal(a, torch.zeros(3)) for a in (mean, renorm.renorm_mean))
    assert torch.equal(layer.running_mean, torch.zeros(3))
    assert torch.equal(y, layer.forward(x, training=True))
    assert layer.num_batches_tracked == 1
