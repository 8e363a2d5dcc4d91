"""Several forward passes as one step (S21)."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, BatchNorm1d, accumulate_statistics, keep_statistics

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
NAMES = ("running_mean", "running_var", "num_batches_tracked")


def state(layer):
    return {name: a.clone() for name, a in layer.state_dict().items()}


def assert_unmoved(layer, before):
    assert all(torch.equal(a, before[name]) for name, a in state(layer).items())


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 9), min_size=1, max_size=6),
    masked=st.booleans(),
    offset=st.sampled_from([0.0, 1e3, 1e6]),
    option=st.sampled_from([{}, {"fused": False}, {"momentum": None}, {"debias": True}]),
    seed=st.integers(0, 2**16),
)
def test_any_split_is_the_concatenated_batch(sizes, masked, offset, option, seed):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(sizes), 2, 16, generator=rng) + offset
    mask = torch.rand(sum(sizes), 16, generator=rng) < (0.6 if masked else 1.1)
    whole, parts = BatchNorm(2, **option), BatchNorm(2, **option)
    whole(x, mask)
    with accumulate_statistics(parts):
        for part in zip(x.split(sizes), mask.split(sizes), strict=True):
            parts(*part)
    assert parts.num_batches_tracked == whole.num_batches_tracked
    rows = mask.sum()
    if rows == 0:
        assert_unmoved(parts, state(whole))
        return
    packed = x.transpose(1, 2)[mask].double()
    moved = parts.num_batches_tracked.item()
    weight = 0.1 if not option or "fused" in option else 1.0
    assert moved == 1
    mean = weight * packed.mean(0)
    torch.testing.assert_close(parts.running_mean.double(), mean, rtol=1e-6, atol=1e-6)
    var = packed.var(0) if rows > 1 else torch.zeros(2).double()
    expected = weight * var + 1 - weight
    torch.testing.assert_close(parts.running_var.double(), expected, rtol=5e-6, atol=1e-12)


def test_order_and_threads_do_not_matter():
    torch.manual_seed(0)
    parts = [torch.randn(5 + i, 3) + 1e3 * i for i in range(6)]
    found = []
    for order in (range(6), [5, 2, 4, 0, 1, 3]):
        layer = BatchNorm(3)
        with accumulate_statistics(layer):
            threads = [threading.Thread(target=layer, args=(parts[i],)) for i in order]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        found.append(state(layer))
    torch.testing.assert_close(*found, rtol=1e-6, atol=0.0)


def test_each_pass_is_normalized_by_itself_and_by_the_statistics_of_before():
    torch.manual_seed(0)
    layer = BatchNorm(3, renorm=True, renorm_clipping={"rmax": 1.5, "dmax": 1.0})
    layer(torch.randn(16, 3) * 2)
    start, parts = copy.deepcopy(layer), torch.randn(3, 8, 3) + 1
    with accumulate_statistics(layer):
        outputs = [layer(part) for part in parts]
    for part, y in zip(parts, outputs, strict=True):
        with keep_statistics():
            assert torch.equal(y, start(part))
    assert layer.num_batches_tracked == 2
    stddev = parts.flatten(0, 1).var(0, correction=0).add(layer.eps).sqrt()
    expected = 0.9 * start.running_stddev + 0.1 * stddev
    torch.testing.assert_close(layer.running_stddev, expected, rtol=1e-5, atol=1e-6)


def test_ghost_batches_of_all_passes_are_averaged():
    torch.manual_seed(0)
    layer, x = BatchNorm(3, momentum=1.0, virtual_batch_size=4), torch.randn(24, 3) * 3
    mask = torch.ones(24, dtype=torch.bool)
    mask[8:16:2] = False  # one of the two groups of the second pass
    with accumulate_statistics(layer):
        for begin, end in ((0, 8), (8, 16), (16, 24)):
            layer(x[begin:end], mask[begin:end])
    groups = [x[0:8:2], x[1:8:2], x[9:16:2], x[16:24:2], x[17:24:2]]
    mean = torch.stack([g.mean(0) for g in groups]).mean(0)
    var = torch.stack([g.var(0) for g in groups]).mean(0)
    torch.testing.assert_close(layer.running_mean, mean)
    torch.testing.assert_close(layer.running_var, var)


def test_gradient_accumulation_in_the_usual_loop():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 1))
    optimizer, batches = torch.optim.SGD(model.parameters(), 0.1), torch.randn(3, 4, 8, 4)
    for step in batches:
        with accumulate_statistics(model):
            for micro in step:
                (model(micro).square().mean() / 4).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert model[1].num_batches_tracked == 3


def test_a_compiled_model_counts_each_of_equal_passes():
    torch._dynamo.reset()
    layer = BatchNorm(1, momentum=1.0)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def thrice(x, z):
        return layer(x) + layer(x) + layer(z)

    x, z = torch.arange(4.0).reshape(4, 1), torch.full((4, 1), 9.0)
    for _ in range(3):
        with accumulate_statistics(layer):
            thrice(x, z)
        torch.testing.assert_close(layer.running_mean, torch.cat([x, x, z]).mean(0))
    assert layer.num_batches_tracked == 3
    assert counter.frame_count == 1
    thrice(x, z)
    assert layer.num_batches_tracked == 6, "the graph of the block must not outlive it"


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_pass_counts_once(reentrant):
    layer = BatchNorm(2, momentum=1.0)
    x, z = torch.randn(8, 2, requires_grad=True), torch.randn(4, 2)
    with accumulate_statistics(layer):
        checkpoint(layer, x, use_reentrant=reentrant).sum().backward()
        layer(z)
    torch.testing.assert_close(layer.running_mean, torch.cat([x, z]).detach().mean(0))


def test_passes_that_move_nothing_do_not_count():
    layer, x = BatchNorm(2, momentum=1.0), torch.randn(8, 2)
    with accumulate_statistics(layer):
        layer(x)
        with keep_statistics():
            layer(x + 5)
        layer.eval()(x + 7)
        layer.train()
        layer(x[:0])
    torch.testing.assert_close(layer.running_mean, x.mean(0))


def test_nothing_moves_without_real_rows_or_with_nan():
    layer = BatchNorm(2)
    before = state(layer)
    with accumulate_statistics(layer):
        layer(torch.randn(4, 2), torch.zeros(4, dtype=torch.bool))
    assert_unmoved(layer, before)
    x = torch.randn(4, 2)
    x[0, 0] = torch.nan
    with accumulate_statistics(layer):
        layer(torch.randn(4, 2))
        layer(x)
    assert layer.running_mean[0] == 0
    assert layer.running_mean[1] != 0


def test_an_overflow_of_all_passes_together_moves_nothing():
    layer, x = BatchNorm(1), torch.tensor([[1.0], [1.001]])
    before = state(layer)
    with accumulate_statistics(layer):
        layer(x)
        layer(x * 5e19)  # the distance of the means, squared, is beyond float32
    assert_unmoved(layer, before)


def test_an_exception_inside_moves_nothing_and_ends_the_block():
    model = nn.Sequential(BatchNorm(2), BatchNorm(2))
    before = state(model)

    def fail():
        with accumulate_statistics(model):
            model(torch.randn(4, 2))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert_unmoved(model, before)
    model(torch.randn(4, 2))
    assert model[0].num_batches_tracked == 1


def test_a_layer_that_cannot_be_written_moves_no_other():
    with torch.inference_mode():
        second = BatchNorm(2)
    model = nn.Sequential(BatchNorm(2), second)
    before = state(model)
    with pytest.raises((RuntimeError, TypeError)), accumulate_statistics(model):
        model(torch.randn(4, 2))
    assert_unmoved(model, before)


def test_a_block_inside_a_block_moves_nothing():
    model = nn.Sequential(BatchNorm(2))
    before = state(model)
    message = "^accumulate_statistics: 0 is inside such a block already"

    def nest():
        with accumulate_statistics(model):
            model(torch.randn(4, 2))
            with accumulate_statistics(model):
                pass

    with pytest.raises(RuntimeError, match=message):
        nest()
    assert_unmoved(model, before)


def test_models_without_layers_of_this_library():
    with (
        pytest.raises(ValueError, match="accumulate_statistics: Sequential has no layer"),
        accumulate_statistics(nn.Sequential(nn.BatchNorm1d(2))),
    ):
        pass
    with (
        pytest.raises(TypeError, match="accumulate_statistics: model must be"),
        accumulate_statistics([BatchNorm(2)]),
    ):
        pass
    mixed = nn.Sequential(BatchNorm(2), nn.BatchNorm1d(2))
    with (
        pytest.warns(UserWarning, match=r"1 of torch's own layers \(1\)"),
        accumulate_statistics(mixed),
    ):
        mixed(torch.randn(4, 2))


def test_options_cannot_change_inside():
    layer = BatchNorm(2)
    with (
        pytest.raises(RuntimeError, match="BatchNorm: options cannot change inside"),
        accumulate_statistics(layer),
    ):
        layer.configure(virtual_batch_size=2)


def test_other_statistics_than_the_layers_own_are_refused():
    layer, x = BatchNorm(2), torch.randn(4, 2)
    others = {name: a.clone() for name, a in layer.named_buffers()}
    with (
        pytest.raises(RuntimeError, match="has other running statistics"),
        accumulate_statistics(layer),
    ):
        torch.func.functional_call(layer, others, (x,))
    assert others["num_batches_tracked"] == 0


@pytest.mark.parametrize("fused", [None, False])
def test_functions_that_are_transformed_are_refused(fused):
    layer, x = BatchNorm(2, fused=fused), torch.randn(4, 2)
    before = state(layer)
    with (
        pytest.raises(RuntimeError, match=r"BatchNorm: .*torch\.func transforms cannot add"),
        accumulate_statistics(layer),
    ):
        torch.func.grad(lambda x: layer(x).square().sum())(x)
    assert_unmoved(layer, before)


def test_statistics_that_are_replaced_inside_are_refused():
    model = nn.Sequential(BatchNorm(2), BatchNorm(2))
    before = state(model)

    def replace():
        with accumulate_statistics(model):
            model(torch.randn(4, 2))
            model[1].double()

    with pytest.raises(RuntimeError, match=r"accumulate_statistics: .*other running statistics"):
        replace()
    torch.testing.assert_close(state(model), before, check_dtype=False)


def test_blocks_of_one_kind_share_a_graph():
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model = nn.Sequential(*(BatchNorm(2) for _ in range(10))).requires_grad_(False)
    for layer in model:
        layer.compile(fullgraph=True, backend=counter)
    for _ in range(2):
        with accumulate_statistics(model):
            model(torch.randn(4, 2))
            model(torch.randn(4, 2))
    assert [layer.num_batches_tracked.item() for layer in model] == [2] * 10
    assert counter.frame_count == 1


def test_export_inside_is_refused():
    layer = BatchNorm(2)
    with (
        pytest.raises(RuntimeError, match="cannot be part of a step of several passes"),
        pytest.warns(UserWarning, match=r"torch\.export"),
        accumulate_statistics(layer),
    ):
        torch.export.export(layer, (torch.randn(4, 2),), strict=False)


def test_copies_made_inside_are_no_part_of_it():
    layer = BatchNorm(2)
    with accumulate_statistics(layer):
        other = copy.deepcopy(layer)
        other(torch.randn(4, 2))
        assert other.num_batches_tracked == 1
    assert layer.num_batches_tracked == 0


def test_jagged_inputs():
    layer = BatchNorm(2, axis=-1, momentum=1.0)
    parts = [torch.randn(n, 2) for n in (3, 5, 2)]
    with accumulate_statistics(layer):
        for some in (parts[:2], parts[2:]):
            layer(torch.nested.nested_tensor(some, layout=torch.jagged))
    torch.testing.assert_close(layer.running_mean, torch.cat(parts).mean(0))


def test_nothing_of_an_input_is_kept():
    layer = BatchNorm(2)
    with accumulate_statistics(layer):
        x = torch.randn(4, 2)
        layer(x)
        gone = weakref.ref(x)
        del x
        gc.collect()
        assert gone() is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_accumulated_in_full_precision(dtype):
    layer = BatchNorm(1, momentum=1.0, affine=False)
    x = (torch.randn(64, 1) + 100).to(dtype)
    with accumulate_statistics(layer):
        for part in x.split(16):
            layer(part)
    torch.testing.assert_close(layer.running_mean, x.float().mean(0), rtol=1e-6, atol=0.0)
    torch.testing.assert_close(layer.running_var, x.double().var(0).float(), rtol=1e-5, atol=0.0)


def test_numpy_reference_at_a_large_offset():
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(4096, 3)) + 1e6).astype(np.float32)
    layer = BatchNorm(3, momentum=1.0)
    with accumulate_statistics(layer):
        for part in np.split(x, 64):
            layer(torch.from_numpy(part))
    expected = x.astype(np.float64).var(0, ddof=1)
    np.testing.assert_allclose(layer.running_var, expected, rtol=5e-6)
