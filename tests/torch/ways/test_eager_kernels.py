"""The compiled kernels behind the layers: the same numbers, to the bit where the specification
says so, and another path where there is no kernel.
"""

from __future__ import annotations

import contextlib
import copy
import io
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import jvp, vmap

import batchnorm.torch.kernels.autograd as kernels
from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm, RenormStatistics, batch_norm
from batchnorm.torch.kernels.decision import decide

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)

KERNEL = 5e-6  # S3
EXACT = {"rtol": 0, "atol": 0, "equal_nan": True}
# Sums of the same terms that walk along rows here and along positions there: five roundings of
# float32 for a term at most (native/passes/soundness.hpp), and up to 300 normal terms.
REORDERED = {"rtol": 5 * 2.0**-24, "atol": 5 * 2.0**-24 * 300}
F64 = {"rtol": 1e-9, "atol": 1e-9}  # float64, a few hundred terms, up to three derivatives
# torch's own sums err by some float32 roundings, the plain path's and the kernels' by fewer.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}

every_mode = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
# torch.func's forward mode scripts a decomposition with torch.jit.script, deprecated by itself.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def threads():
    """`torch.set_num_threads`, undone afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def instructions():
    """Choose instructions, or skip; undone afterwards."""
    before = extension.instructions()

    def use(name):
        try:
            extension.use_instructions(name)
        except ValueError:
            pytest.skip(f"this machine does not run {name} instructions")

    yield use
    extension.use_instructions(before)


def layer_for(channels, **options):
    """A layer with random parameters, and the last batch's statistics."""
    layer = BatchNorm(channels, **{"momentum": 1.0} | options)
    generator = torch.Generator().manual_seed(1)
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.5, 1.5, generator=generator)
    return layer


def step(layer, x, dy, mask=None, residual=None):
    """The results of a training step, by name; the layer itself does not change."""
    layer = copy.deepcopy(layer)
    x = x.detach().requires_grad_()
    residual = None if residual is None else residual.detach().requires_grad_()
    y = layer(x, mask, residual)
    y.backward(dy)
    found = {
        "y": y.detach(),
        "dx": x.grad,
        "dresidual": None if residual is None else residual.grad,
        **{f"d{name}": p.grad for name, p in layer.named_parameters()},
        **{name: b.clone() for name, b in layer.named_buffers()},
    }
    return {name: value for name, value in found.items() if value is not None}


def assert_same(actual, expected, **tolerance):
    torch.testing.assert_close(actual, expected, **(tolerance or EXACT))


def scaled(found, rows):
    """A step's results; sums over rows are divided by the number of rows."""
    found = dict(found)
    for name in ("dweight", "dbias"):
        found[name] = found[name] / rows
    return found


def forbid_kernels(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a kernel was used")

    monkeypatch.setattr(kernels, "forward", refuse)


# Determinism (S17)


def rows_mask(*shape):
    return torch.rand(shape) < 0.6


def channels_last(*shape):
    return torch.randn(shape).to(memory_format=torch.channels_last)


BITS = {
    "rows": lambda: ({}, torch.randn(20000, 24), None),
    "rows, masked": lambda: ({}, torch.randn(20000, 24), rows_mask(20000)),
    "rows, one channel": lambda: ({}, torch.randn(300000, 1), rows_mask(300000)),
    "rows, many channels": lambda: ({}, torch.randn(500, 1030), rows_mask(500)),
    "rows, ghost batches": lambda: (
        {"virtual_batch_size": 4000},
        torch.randn(20000, 24),
        rows_mask(20000),
    ),
    "images": lambda: ({}, torch.randn(8, 40, 33, 31), None),
    "images, masked": lambda: ({}, torch.randn(8, 40, 33, 31), rows_mask(8, 33, 31)),
    "images, samples masked": lambda: ({}, torch.randn(8, 40, 33, 31), torch.arange(8) % 3 > 0),
    "images, ghost batches": lambda: (
        {"virtual_batch_size": 2},
        torch.randn(8, 40, 33, 31),
        rows_mask(8, 33, 31),
    ),
    "channels last": lambda: ({}, channels_last(8, 40, 33, 31), None),
    "channels last, masked": lambda: ({}, channels_last(8, 40, 33, 31), rows_mask(8, 33, 31)),
    "channels last, ghost batches": lambda: (
        {"virtual_batch_size": 2},
        channels_last(8, 40, 33, 31),
        rows_mask(8, 33, 31),
    ),
    "float64": lambda: ({"dtype": torch.float64}, torch.randn(20000, 24).double(), None),
    "float64 images, masked": lambda: (
        {"dtype": torch.float64},
        torch.randn(8, 40, 33, 31).double(),
        rows_mask(8, 33, 31),
    ),
    "bfloat16, masked": lambda: ({}, torch.randn(20000, 24).bfloat16(), rows_mask(20000)),
    "bfloat16 images": lambda: ({}, torch.randn(8, 40, 33, 31).bfloat16(), None),
    "float16": lambda: ({}, torch.randn(20000, 24).half(), None),
    "relu": lambda: ({"activation": "relu"}, torch.randn(20000, 24), rows_mask(20000)),
    "renorm": lambda: ({"renorm": True}, torch.randn(20000, 24), rows_mask(20000)),
}


@pytest.mark.parametrize("count", [2, 3, 8, 16])
@pytest.mark.parametrize("make", BITS.values(), ids=BITS)
def test_number_of_threads_changes_no_bit(make, count, threads):
    options, x, mask = make()
    layer, dy = layer_for(x.shape[1], **options, fused=True), torch.randn(x.shape).to(x)
    threads(1)
    expected = step(layer, x, dy, mask)
    threads(count)
    assert_same(step(layer, x, dy, mask), expected)


@pytest.mark.parametrize("name", ["avx2", "avx512"])
@pytest.mark.parametrize("make", BITS.values(), ids=BITS)
def test_instruction_set_changes_no_bit(make, name, instructions):
    options, x, mask = make()
    layer, dy = layer_for(x.shape[1], **options, fused=True), torch.randn(x.shape).to(x)
    instructions("baseline")
    expected = step(layer, x, dy, mask)
    instructions(name)
    assert_same(step(layer, x, dy, mask), expected)


LARGE = [
    "rows, masked",
    "rows, many channels",
    "images, masked",
    "images, ghost batches",
    "channels last, masked",
    "bfloat16 images",
    "float16",
    "relu",
    "renorm",
]


@pytest.mark.parametrize("name", LARGE)
def test_large_step_agrees_with_the_plain_path(name):
    options, x, mask = BITS[name]()
    dy = torch.randn(x.shape).to(x)
    found = step(layer_for(x.shape[1], **options, fused=True), x, dy, mask)
    expected = step(layer_for(x.shape[1], **options, fused=False), x, dy, mask)
    rows = x.numel() // x.shape[1]
    tolerance = CLOSE
    if x.dtype in (torch.bfloat16, torch.float16):
        # One rounding, which may go either way.
        bits = 2 * torch.finfo(x.dtype).eps
        tolerance = {"rtol": bits, "atol": bits}
    assert_same(scaled(found, rows), scaled(expected, rows), **tolerance)


def test_one_thread_and_back_gives_the_same_bits(threads):
    layer, x, dy = layer_for(24), torch.randn(20000, 24), torch.randn(20000, 24)
    expected = step(layer, x, dy)
    before = torch.get_num_threads()
    threads(1)
    step(layer, x, dy)
    threads(before)
    assert_same(step(layer, x, dy), expected)


# Packing (S5)


def packed_step(layer, x, dy, mask):
    """A step on real rows alone; rows are the channels-last ones."""
    x, dy = (a.movedim(1, -1)[mask] for a in (x, dy))
    return step(layer, x, dy)


def real_rows(found, mask):
    """A masked step's results in the form of `packed_step`'s."""
    return found | {name: found[name].movedim(1, -1)[mask] for name in ("y", "dx")}


WIDTHS = [1, 3, 24, 64, 129]
dtypes = pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16], ids=["f32", "f64", "bf16"]
)


@dtypes
@pytest.mark.parametrize("share", [0.02, 0.6, 1.0])
@pytest.mark.parametrize("channels", WIDTHS)
def test_masked_rows_equal_packed_ones_to_the_bit(channels, share, dtype):
    x, dy = torch.randn(2, 5003, channels).to(dtype)
    mask = torch.rand(5003) < share
    layer = layer_for(channels, fused=True)
    found = real_rows(step(layer, x, dy, mask), mask)
    assert_same(found, packed_step(layer, x, dy, mask))


@pytest.mark.parametrize("channels", WIDTHS)
def test_masked_channels_last_images_equal_packed_rows_to_the_bit(channels):
    x, dy = channels_last(5, channels, 21, 19), channels_last(5, channels, 21, 19)
    mask = rows_mask(5, 21, 19)
    layer = layer_for(channels, fused=True)
    found = real_rows(step(layer, x, dy, mask), mask)
    assert_same(found, packed_step(layer, x, dy, mask))


@pytest.mark.parametrize("channels", WIDTHS)
def test_masked_channels_first_images_equal_packed_rows(channels):
    x, dy = torch.randn(2, 5, channels, 21, 19)
    mask = rows_mask(5, 21, 19)
    layer = layer_for(channels, fused=True)
    found = real_rows(step(layer, x, dy, mask), mask)
    expected = packed_step(layer, x, dy, mask)
    rows = int(mask.sum())
    assert_same(scaled(found, rows), scaled(expected, rows), rtol=KERNEL, atol=KERNEL)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("shape", [(500, 7), (20, 7, 25)], ids=["rows", "signal"])
def test_padded_rows_get_no_gradient(shape, training):
    x, dy = torch.randn(2, *shape)
    mask = rows_mask(shape[0], *shape[2:])
    found = step(layer_for(7, fused=True).train(training), x, dy, mask)
    assert found["dx"].movedim(1, -1)[~mask].eq(0).all()
    assert found["dx"].movedim(1, -1)[mask].ne(0).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -3e38])
@pytest.mark.parametrize("shape", [(500, 7), (20, 7, 25)], ids=["rows", "signal"])
def test_padding_changes_no_bit(shape, value):
    x, dy = torch.randn(2, *shape)
    mask = rows_mask(shape[0], *shape[2:])
    rows = mask if len(shape) == 2 else mask[:, None].expand(shape)
    layer = layer_for(7, fused=True)
    expected = real_rows(step(layer, x, dy, mask), mask)
    x[~rows], dy[~rows] = value, value
    assert_same(real_rows(step(layer, x, dy, mask), mask), expected)


@pytest.mark.parametrize("shape", [(600, 7), (24, 7, 25)], ids=["rows", "signal"])
def test_each_ghost_batch_is_normalized_by_itself(shape):
    x, mask = torch.randn(shape), rows_mask(shape[0], *shape[2:])
    groups = 3
    layer = layer_for(7, virtual_batch_size=shape[0] // groups, fused=True)
    alone = layer_for(7, fused=True)
    expected = torch.empty_like(x)
    for g in range(groups):
        expected[g::groups] = alone(x[g::groups].contiguous(), mask[g::groups].contiguous())
    assert_same(layer(x, mask), expected, rtol=KERNEL, atol=KERNEL)


# Masks of every type and stride


def as_it_is(mask):
    return mask


def transposed(mask):
    return mask.mT.contiguous().mT


def of_a_wider_buffer(mask):
    wide = torch.ones(mask.shape[0], mask.shape[1] + 3, dtype=mask.dtype)
    wide[:, : mask.shape[1]] = mask
    return wide[:, : mask.shape[1]]


def every_second_column(mask):
    wide = torch.ones(mask.shape[0], 2 * mask.shape[1], dtype=mask.dtype)
    wide[:, ::2] = mask
    return wide[:, ::2]


MASK_TYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
]
mask_types = pytest.mark.parametrize("dtype", MASK_TYPES, ids=str)
mask_strides = pytest.mark.parametrize(
    "strided", [as_it_is, transposed, of_a_wider_buffer, every_second_column]
)
MASKED = {
    "channels first": lambda: torch.randn(9, 4, 33),
    "channels last": lambda: torch.randn(9, 33, 4).mT,
    "samples inside": lambda: torch.randn(33, 9, 4).permute(1, 2, 0),
    "sliced": lambda: torch.randn(9, 6, 33)[:, :4],
}
masked_inputs = pytest.mark.parametrize("make", MASKED.values(), ids=MASKED)


@masked_inputs
@mask_strides
@mask_types
def test_mask_means_the_same_in_any_type_and_stride(dtype, strided, make):
    x, mask = make(), rows_mask(9, 33)
    dy, layer = torch.randn(x.shape), layer_for(4, fused=True)
    found = step(layer, x, dy, strided(mask.to(dtype)))
    assert_same(found, step(layer, x, dy, mask))


@masked_inputs
@pytest.mark.parametrize("kind", ["samples", "rows of ones", "columns of ones"])
def test_expanded_mask_equals_the_written_out_one(kind, make):
    x, layer = make(), layer_for(4, fused=True)
    samples, columns = rows_mask(9, 1), rows_mask(1, 33)
    mask = columns.expand(9, 33) if kind == "columns of ones" else samples.expand(9, 33)
    given = {"samples": samples[:, 0], "rows of ones": mask, "columns of ones": mask}[kind]
    dy = torch.randn(x.shape)
    assert_same(step(layer, x, dy, given), step(layer, x, dy, mask.contiguous()), **REORDERED)


@masked_inputs
@mask_strides
def test_awkward_mask_does_not_copy_x(strided, make):
    x, addresses = make(), []
    with saved_tensors_hooks(lambda a: addresses.append(a.data_ptr()) or a, lambda a: a):
        layer_for(4, fused=True)(x, strided(rows_mask(9, 33)))
    assert x.data_ptr() in addresses


@pytest.mark.parametrize("mask_shape", [(6, 1, 5, 7), (1, 1, 5, 7), (6, 1, 1, 7), (1, 1, 1, 1)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_mask_of_own_rank_equals_the_written_out_one(mask_shape, memory_format):
    x = torch.randn(6, 3, 5, 7).to(memory_format=memory_format)
    mask = torch.rand(mask_shape) < 0.7
    mask.flatten()[0] = True
    layer, dy = layer_for(3, fused=True), torch.randn(x.shape)
    whole = mask.expand(6, 1, 5, 7)[:, 0].contiguous()
    assert_same(step(layer, x, dy, mask), step(layer, x, dy, whole), **REORDERED)


# Strided inputs

INPUTS = {
    "columns of a wider buffer": lambda: torch.randn(40, 16)[:, 5:8],
    "every second row": lambda: torch.randn(80, 3)[::2],
    "every second column": lambda: torch.randn(40, 6)[:, ::2],
    "transposed": lambda: torch.randn(3, 40).T,
    "transposed columns": lambda: torch.randn(9, 40)[::3].T,
    "expanded rows": lambda: torch.randn(40, 1, 3).expand(40, 5, 3).movedim(-1, 1),
    "expanded samples": lambda: torch.randn(1, 3, 5).expand(40, 3, 5),
    "expanded channels": lambda: torch.randn(40, 1).expand(40, 3),
    "expanded channels of a wider buffer": lambda: torch.randn(40, 8)[:, :1].expand(40, 3),
    "expanded but for the rows": lambda: torch.randn(40, 15)[:, :1, None].expand(40, 3, 5),
    "one sample, expanded channels": lambda: torch.randn(1, 1, 5).expand(1, 3, 5),
    "overlapping windows": lambda: torch.randn(42).unfold(0, 3, 1),
    "overlapping windows with a step": lambda: torch.randn(82).unfold(0, 3, 2),
    "channels_last": lambda: channels_last(4, 3, 5, 6),
    "channels_last, sliced": lambda: channels_last(4, 8, 5, 6)[:, :3],
    "channels_last, every second sample": lambda: channels_last(8, 3, 5, 6)[::2],
    "channels_last, cropped": lambda: channels_last(4, 3, 9, 9)[:, :, 1:6, 2:8],
    "channels_last_3d": lambda: torch.randn(2, 3, 4, 5, 6).to(memory_format=torch.channels_last_3d),
    "samples inside": lambda: torch.randn(3, 4, 5, 6).transpose(0, 1),
    "cropped": lambda: torch.randn(4, 3, 9, 9)[:, :, 1:6, 2:8],
    "one sample": lambda: torch.randn(1, 3, 5, 6),
    "one position": lambda: torch.randn(40, 3, 1, 1),
    "unaligned": lambda: torch.randn(121)[1:].view(40, 3),
}
inputs = pytest.mark.parametrize("make", INPUTS.values(), ids=INPUTS)


@every_mode
@inputs
def test_strided_input_equals_the_contiguous_one(make, training):
    x = make()
    dy = torch.randn(x.shape)
    found = step(layer_for(3, fused=True).train(training), x, dy)
    expected = step(layer_for(3, fused=False).train(training), x.contiguous(), dy)
    assert_same(found, expected, **CLOSE)


@inputs
def test_strided_cotangent_equals_the_contiguous_one(make):
    dy = make()
    x, layer = torch.randn(dy.shape), layer_for(3, fused=True)
    assert_same(step(layer, x, dy), step(layer, x, dy.contiguous()), **CLOSE)


@inputs
def test_strided_cotangent_of_a_strided_input_equals_contiguous_ones(make):
    x, dy = make(), make()
    expected = step(layer_for(3, fused=False), x.contiguous(), dy.contiguous())
    assert_same(step(layer_for(3, fused=True), x, dy), expected, **CLOSE)


@pytest.mark.parametrize("activation", [None, "relu"])
@inputs
def test_strided_residual_equals_the_contiguous_one(make, activation):
    residual = make()
    x, dy = torch.randn(2, *residual.shape)
    layer = layer_for(3, activation=activation, fused=True)
    found = step(layer, x, dy, residual=residual)
    assert_same(found, step(layer, x, dy, residual=residual.contiguous()), **CLOSE)


@every_mode
@pytest.mark.parametrize("shape", [(1, 3, 5), (1, 3, 5, 6), (40, 3), (4, 3, 5), (1, 3, 1, 5)])
def test_expanded_cotangent_of_a_sum_is_one_everywhere(shape, training):
    layer, x = layer_for(3, fused=True).train(training), torch.randn(shape, requires_grad=True)
    layer(x).sum().backward()
    rows = x.numel() / 3
    torch.testing.assert_close(layer.bias.grad, torch.full((3,), rows))


@pytest.mark.parametrize("shape", [(1, 3, 5), (40, 3), (4, 3, 5)])
def test_gradient_of_a_sum_agrees_with_the_plain_path(shape):
    x = torch.randn(shape)
    one = torch.ones(())
    found = step(layer_for(3, fused=True), x, one.expand(shape))
    expected = step(layer_for(3, fused=False), x, torch.ones(shape))
    assert_same(found, expected, **CLOSE)


STRIDES_OF_TORCH = [
    "every second row",
    "columns of a wider buffer",
    "channels_last",
    "channels_last, every second sample",
    "one sample",
    "one position",
    "unaligned",
]


@every_mode
@pytest.mark.parametrize("name", STRIDES_OF_TORCH)
def test_output_lies_in_memory_as_torchs_does(name, training):
    x = INPUTS[name]()
    theirs = (nn.BatchNorm1d if x.dim() < 4 else nn.BatchNorm2d)(3).train(training)
    assert layer_for(3, fused=True).train(training)(x).stride() == theirs(x).stride()


MEMORY_FORMATS = [(torch.channels_last, 4), (torch.channels_last_3d, 5)]


@every_mode
@pytest.mark.parametrize(("memory_format", "rank"), MEMORY_FORMATS, ids=["2d", "3d"])
def test_channels_last_stays_channels_last(memory_format, rank, training):
    x = torch.randn(2, 3, *(4, 5, 6)[: rank - 2]).to(memory_format=memory_format)
    x.requires_grad_()
    y = layer_for(3, fused=True).train(training)(x)
    y.backward(torch.randn(y.shape))
    assert y.is_contiguous(memory_format=memory_format)
    assert x.grad.is_contiguous(memory_format=memory_format)


@pytest.mark.parametrize("axis", [(1, 3), (0, 2), (0, 3)], ids=["apart", "first and third", "ends"])
def test_channel_axes_apart_take_the_plain_path(axis):
    x = torch.randn(4, 3, 5, 2)
    sizes = tuple(x.shape[a] for a in axis)
    dy = torch.randn(x.shape)
    found = step(layer_for(sizes, axis=axis), x, dy)
    assert_same(found, step(layer_for(sizes, axis=axis, fused=False), x, dy))


def test_channel_axes_apart_are_no_case_for_fused():
    layer = layer_for((3, 2), axis=(1, 3), fused=True)
    with pytest.raises(ValueError, match=r"fused=True .* channel axes \(1, 3\) are apart in mem"):
        layer(torch.randn(4, 3, 5, 2))


def test_channel_axes_apart_in_shape_but_not_in_memory_are_fused():
    x = torch.randn(4, 5, 3, 2).transpose(1, 2)
    dy = torch.randn(x.shape)
    found = step(layer_for((3, 2), axis=(1, 3), fused=True), x, dy)
    assert_same(found, step(layer_for((3, 2), axis=(1, 3), fused=False), x, dy), **CLOSE)


def test_channel_axes_the_wrong_way_round_in_memory_are_copied():
    x = torch.randn(40, 3, 2).transpose(1, 2)
    dy = torch.randn(x.shape)
    found = step(layer_for((2, 3), axis=(1, 2), fused=True), x, dy)
    assert_same(found, step(layer_for((2, 3), axis=(1, 2), fused=False), x, dy), **CLOSE)


# Tensors whose values differ from those in their memory


def negated(*shape):
    """A lazily negated tensor; with one element per row it counts as dense."""
    a = torch.randn(*shape, dtype=torch.complex64).conj().imag
    assert a.is_neg()
    return a


@pytest.mark.parametrize("name", ["input", "residual", "weight", "bias", "running_mean"])
def test_lazily_negated_tensor_means_its_values(name):
    given = {
        "input": torch.randn(6, 1),
        "running_mean": torch.zeros(1),
        "running_var": torch.ones(1),
        "weight": torch.ones(1),
        "bias": torch.zeros(1),
        "residual": torch.randn(6, 1),
    }
    given[name] = negated(*given[name].shape)
    plain = given | {name: given[name].resolve_neg()}
    training = name != "running_mean"
    expected = batch_norm(**plain, training=training, fused=False)
    assert_same(batch_norm(**given, training=training), expected, **CLOSE)


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_parameter_of_an_integer_type_works_as_on_the_plain_path(name):
    x, given = torch.randn(6, 3), {name: torch.tensor([1, 2, 3])}
    expected = batch_norm(x, None, None, training=True, fused=False, **given)
    assert_same(batch_norm(x, None, None, training=True, **given), expected, **CLOSE)


@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_strided_state_means_its_values(name):
    given = {n: torch.rand(3) + 0.5 for n in ("running_mean", "running_var", "weight", "bias")}
    plain = {n: a.clone() for n, a in given.items()}
    given[name] = torch.stack([given[name], torch.zeros(3)], 1)[:, 0]
    x = torch.randn(6, 3)
    expected = batch_norm(x, **plain, training=True, fused=False)
    assert_same(batch_norm(x, **given, training=True), expected, **CLOSE)
    assert_same(given[name], plain[name], **CLOSE)


# Where there is no kernel

REASON = r"layer: fused=True demands a kernel, but .*{}".replace("layer", "BatchNorm")


def test_adjustment_is_refused_by_fused():
    layer = BatchNorm(3, adjustment=lambda shape: (1.0, 0.0), fused=True)
    with pytest.raises(ValueError, match=REASON.format("none takes an adjustment")):
        layer(torch.randn(4, 3))


def test_adjusted_layer_in_evaluation_is_fused():
    layer = BatchNorm(3, adjustment=lambda shape: (1.0, 0.0), fused=True).eval()
    assert layer(torch.randn(4, 3)).isfinite().all()


def test_mask_per_channel_is_refused_by_fused():
    with pytest.raises(ValueError, match=REASON.format("a mask that differs between channels")):
        BatchNorm(3, fused=True)(torch.randn(4, 3), torch.rand(4, 3) < 0.5)


def test_meta_device_is_refused_by_fused():
    with pytest.raises(ValueError, match=REASON.format("there is none for device meta")):
        BatchNorm(3, fused=True, device="meta")(torch.randn(4, 3, device="meta"))


def test_vmap_is_refused_by_fused():
    layer = BatchNorm(3, track_running_stats=False, fused=True)
    with pytest.raises(ValueError, match=REASON.format("transformation of torch is at work")):
        vmap(layer)(torch.randn(2, 4, 3))


@forward_mode
def test_forward_mode_is_refused_by_fused():
    layer = BatchNorm(3, track_running_stats=False, fused=True)
    x = torch.randn(4, 3)
    with pytest.raises(ValueError, match=REASON.format("transformation of torch is at work")):
        jvp(layer, (x,), (x,))


def test_subclass_of_tensor_is_refused_by_fused():
    class Named(torch.Tensor):
        pass

    with pytest.raises(ValueError, match=REASON.format("x is not a plain tensor")):
        BatchNorm(3, fused=True)(torch.randn(4, 3).as_subclass(Named))


def test_refused_call_leaves_the_statistics_alone():
    layer = BatchNorm(3, fused=True)
    before = copy.deepcopy(layer.state_dict())
    with pytest.raises(ValueError, match="fused=True"):
        layer(torch.randn(4, 3), torch.rand(4, 3) < 0.5)
    assert_same(dict(layer.state_dict()), dict(before))


def test_adjustment_falls_back_without_fused():
    adjustment = (torch.full((4, 1), 2.0), torch.full((1, 3), 0.5))
    x, plain = torch.randn(4, 3), batch_norm(torch.zeros(4, 3), None, None, training=True)
    y = BatchNorm(3, adjustment=lambda shape: adjustment)(x)
    expected = 2 * BatchNorm(3)(x) + 0.5 + plain
    assert_same(y, expected, **CLOSE)


def test_mask_per_channel_falls_back_without_fused():
    x, mask = torch.randn(8, 2), torch.rand(8, 2) < 0.7
    y = BatchNorm(2)(x, mask)
    columns = [BatchNorm(1)(x[:, c : c + 1], mask[:, c]) for c in range(2)]
    assert_same(y, torch.cat(columns, 1), **CLOSE)


def test_meta_device_falls_back_without_fused():
    assert BatchNorm(3, device="meta")(torch.randn(4, 3, device="meta")).shape == (4, 3)


def test_vmap_falls_back_without_fused():
    x = torch.randn(2, 4, 3)
    layer = BatchNorm(3, track_running_stats=False)
    assert_same(vmap(layer)(x), torch.stack([layer(a) for a in x]), **CLOSE)


@forward_mode
def test_forward_mode_falls_back_without_fused():
    layer = BatchNorm(3, track_running_stats=False).double()
    x, v = torch.randn(2, 6, 3).double()
    _, found = jvp(layer, (x,), (v,))
    step = 1e-6
    expected = (layer(x + step * v) - layer(x - step * v)) / (2 * step)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@every_mode
def test_fused_false_uses_no_kernel(monkeypatch, training):
    forbid_kernels(monkeypatch)
    layer = BatchNorm(3, fused=False).train(training)
    layer(torch.randn(4, 3)), layer(torch.randn(4, 3))
    batch_norm(torch.randn(4, 3), None, None, training=True, fused=False)


@every_mode
@pytest.mark.parametrize("fused", [None, True])
def test_layer_uses_a_kernel_unless_told_otherwise(monkeypatch, fused, training):
    forbid_kernels(monkeypatch)
    with pytest.raises(AssertionError, match="a kernel was used"):
        BatchNorm(3, fused=fused).train(training)(torch.randn(4, 3))


@pytest.fixture
def missing_extension(monkeypatch):
    monkeypatch.setattr(extension, "_cpu", None)
    monkeypatch.setattr(
        extension, "_reason", "the compiled extension is missing (test)", raising=False
    )
    decide.cache_clear()
    yield
    decide.cache_clear()


@pytest.mark.usefixtures("missing_extension")
@pytest.mark.parametrize("shape", [(40, 3), (4, 3, 5)], ids=["rows", "signal"])
def test_without_the_extension_layers_take_the_plain_path(shape):
    x, dy = torch.randn(2, *shape)
    mask = rows_mask(shape[0])
    found = step(layer_for(3), x, dy, mask)
    assert_same(found, step(layer_for(3, fused=False), x, dy, mask))


@pytest.mark.usefixtures("missing_extension")
def test_without_the_extension_fused_says_why():
    with pytest.raises(ValueError, match=REASON.format("the compiled extension is missing")):
        BatchNorm(3, fused=True)(torch.randn(4, 3))


@pytest.mark.usefixtures("missing_extension")
def test_without_the_extension_importing_warns():
    with pytest.warns(RuntimeWarning, match="the compiled extension is missing"):
        extension.warn_if_missing()


# Derivatives of every order


def renormed(x, weight, bias, fused):
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    statistics = RenormStatistics(torch.ones(3).double(), mean + 0.1, torch.ones(3).double())
    return batch_norm(
        x, mean, var, weight, bias, True, renorm=statistics, eps=EPS, fused=fused, mask=MASK
    )


def ghosts_renormed(x, weight, bias, fused):
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    statistics = RenormStatistics(torch.ones(3).double(), mean + 0.1, torch.ones(3).double())
    return batch_norm(
        x,
        mean,
        var,
        weight,
        bias,
        True,
        renorm=statistics,
        virtual_batch_size=3,
        activation="leaky_relu",
        eps=EPS,
        fused=fused,
    )


EPS = 1e-2
MASK = torch.tensor([True, False, True, True, False, True, True, True, False])
RESIDUAL = torch.randn(9, 3, generator=torch.Generator().manual_seed(2)).double()
STATISTICS = (torch.arange(3).double(), torch.arange(1, 4).double())
OPTIONS = {
    "training": {},
    "masked": {"mask": MASK},
    "empty": {"mask": torch.zeros(9, dtype=torch.bool)},
    "one real row": {"mask": torch.arange(9) == 4},
    "ghost batches": {"virtual_batch_size": 3},
    "ghost batches, masked": {"virtual_batch_size": 3, "mask": MASK},
    "ghost batches, one empty": {"virtual_batch_size": 3, "mask": torch.arange(9) % 3 > 0},
    "relu": {"activation": "relu"},
    "residual, relu": {"activation": "relu", "residual": RESIDUAL, "mask": MASK},
    "residual, leaky relu": {"activation": "leaky_relu", "residual": RESIDUAL},
    "residual": {"residual": RESIDUAL, "mask": MASK},
}


def function_with(options, *statistics, training=True):
    def function(x, weight, bias, fused):
        mean, var = statistics or (None, None)
        return batch_norm(x, mean, var, weight, bias, training, eps=EPS, fused=fused, **options)

    return function


FUNCTIONS = (
    {name: function_with(options) for name, options in OPTIONS.items()}
    | {
        f"evaluation, {name}": function_with(OPTIONS[name], *STATISTICS, training=False)
        for name in ("training", "masked", "empty", "residual, relu")
    }
    | {"renorm": renormed, "renorm, ghost batches": ghosts_renormed}
)
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


def leaves(dtype=torch.float64):
    generator = torch.Generator().manual_seed(3)
    return tuple(
        torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()
        for shape in ((9, 3), (3,), (3,))
    )


def derivatives(function, order, fused):
    """Gradients of nested random contractions, up to `order`, with respect to everything."""
    inputs, generator = leaves(), torch.Generator().manual_seed(4)
    found = [function(*inputs, fused)]
    for remaining in reversed(range(order)):
        total = sum(
            (a * torch.randn(a.shape, generator=generator, dtype=a.dtype)).sum() for a in found
        )
        keep = {"create_graph": remaining > 0, "materialize_grads": True}
        found = list(torch.autograd.grad(total, inputs, **keep))
    return found


@pytest.mark.parametrize("order", [1, 2, 3])
@functions
def test_derivatives_agree_with_the_plain_path(function, order):
    found = derivatives(function, order, True)
    assert_same(found, derivatives(function, order, False), **F64)


GRADCHECKED = {
    "masked": {"mask": MASK},
    "ghost batches": {"virtual_batch_size": 3},
    "residual, leaky relu": {"activation": "leaky_relu", "residual": RESIDUAL},
}


@pytest.mark.parametrize("options", GRADCHECKED.values(), ids=GRADCHECKED)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_second_derivative_agrees_with_finite_differences(options, training):
    if not training:
        options = {k: v for k, v in options.items() if k != "virtual_batch_size"}
    function = function_with(options, *(a.clone() for a in STATISTICS), training=training)
    real = options.get("mask", torch.ones(9, dtype=torch.bool))

    def at_real_rows(x, weight, bias):  # padded outputs are constants by contract
        return function(x, weight, bias, True)[real]

    assert torch.autograd.gradgradcheck(at_real_rows, leaves())


def test_second_derivative_by_the_residual_agrees_with_the_plain_path():
    def found(fused):
        x, weight, bias = leaves()
        residual = RESIDUAL.clone().requires_grad_()
        y = batch_norm(
            x, None, None, weight, bias, True, residual=residual, activation="relu", fused=fused
        )
        generator = torch.Generator().manual_seed(5)
        cotangent = torch.randn(9, 3, generator=generator).double().requires_grad_()
        first = torch.autograd.grad(y, (x, residual), cotangent, create_graph=True)
        total = sum((a * a.detach().cos()).sum() for a in first)
        return torch.autograd.grad(total, (x, weight, cotangent))

    assert_same(found(True), found(False), **F64)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_second_derivative_in_narrow_types_is_near_the_plain_path(dtype):
    def found(fused):
        x = leaves()[0].detach().to(dtype).requires_grad_()
        weight = torch.ones(3, requires_grad=True)
        y = batch_norm(x, None, None, weight, None, True, eps=EPS, mask=MASK, fused=fused)
        (first,) = torch.autograd.grad(y, x, torch.cos(x.detach()), create_graph=True)
        return torch.autograd.grad(first, (x, weight), torch.sin(x.detach()))

    bound = 20 * torch.finfo(dtype).eps
    assert_same(found(True), found(False), rtol=bound, atol=bound)


@functions
def test_batched_cotangents_agree_with_single_ones(function):
    inputs, cotangents = leaves(), torch.randn(4, 9, 3).double()
    y = function(*inputs, True)
    found = torch.autograd.grad(y, inputs, cotangents, retain_graph=True, is_grads_batched=True)
    single = [torch.autograd.grad(y, inputs, dy, retain_graph=True) for dy in cotangents]
    assert_same(found, tuple(torch.stack(a) for a in zip(*single, strict=True)), **F64)


@functions
def test_second_backward_through_a_retained_graph_gives_the_same(function):
    inputs = leaves()
    y, dy = function(*inputs, True), torch.randn(9, 3).double()
    first = torch.autograd.grad(y, inputs, dy, retain_graph=True)
    assert_same(torch.autograd.grad(y, inputs, dy), first)


def test_second_backward_without_retained_graph_raises():
    x, *_ = leaves()
    y = batch_norm(x, None, None, training=True, fused=True)
    y.backward(torch.randn(9, 3).double())
    with pytest.raises(RuntimeError, match="second time"):
        y.backward(torch.randn(9, 3).double())


def test_gradients_accumulate():
    x, dy = torch.randn(2, 40, 3)
    layer = layer_for(3, fused=True)
    expected = step(layer, x, dy)
    x.requires_grad_()
    layer(x).backward(dy)
    layer(x).backward(dy)
    assert_same(layer.weight.grad, 2 * expected["dweight"])
    assert_same(x.grad, 2 * expected["dx"])


# Tensors that autograd keeps

SAVERS = {
    "nothing": lambda a: a,
    "clone": lambda a: a.clone(),
    "contiguous": lambda a: a.clone(memory_format=torch.contiguous_format),
    "innermost axis first": lambda a: a.transpose(0, -1).contiguous().transpose(0, -1),
    "a wider buffer": lambda a: torch.cat([a, a], -1)[..., : a.shape[-1]],
}
SAVED = {
    "rows": (lambda: torch.randn(40, 3), {}),
    "columns of a wider buffer": (lambda: torch.randn(40, 16)[:, :3], {}),
    "channels last": (lambda: channels_last(4, 3, 5, 6), {}),
    "relu": (lambda: channels_last(4, 3, 5, 6), {"activation": "relu"}),
    "masked": (lambda: torch.randn(40, 16)[:, :3], {"masked": True}),
    "residual, relu": (
        lambda: channels_last(4, 3, 5, 6),
        {"activation": "relu", "residual": True},
    ),
}


@pytest.mark.parametrize("save", SAVERS.values(), ids=SAVERS)
@pytest.mark.parametrize(("make", "options"), SAVED.values(), ids=SAVED)
def test_saved_tensors_may_come_back_in_other_memory(make, options, save):
    options = dict(options)
    x = make()
    mask = rows_mask(40) if options.pop("masked", False) else None
    residual = torch.randn(x.shape) if options.pop("residual", False) else None
    dy, layer = torch.randn(x.shape), layer_for(3, **options, fused=True)
    expected = step(layer, x, dy, mask, residual)
    with saved_tensors_hooks(save, lambda a: a):
        found = step(layer, x, dy, mask, residual)
    assert_same(found, expected, **CLOSE)


def test_saved_tensors_survive_storage():
    def pack(a):
        buffer = io.BytesIO()
        torch.save(a.detach(), buffer)
        return buffer

    def unpack(buffer):
        buffer.seek(0)
        return torch.load(buffer)

    x, dy = channels_last(4, 3, 5, 6), torch.randn(4, 3, 5, 6)
    mask, layer = rows_mask(4, 5, 6), layer_for(3, activation="relu", fused=True)
    expected = step(layer, x, dy, mask)
    with saved_tensors_hooks(pack, unpack):
        found = step(layer, x, dy, mask)
    assert_same(found, expected)


CHANGED = ["x", "weight", "mask", "y"]


@pytest.mark.parametrize("name", CHANGED)
def test_change_in_place_between_forward_and_backward_raises(name):
    layer = layer_for(3, activation="relu", fused=True)
    leaf, mask = torch.randn(40, 3, requires_grad=True), rows_mask(40)
    x = leaf.clone()
    y = layer(x, mask, torch.randn(40, 3))
    changed = {"x": x, "weight": layer.weight, "mask": mask, "y": y}[name]
    with torch.no_grad():
        changed.copy_(changed.clone())
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(torch.randn(40, 3))


def test_output_without_activation_may_be_changed_in_place():
    x, dy = torch.randn(2, 40, 3)
    layer = layer_for(3, fused=True)
    expected = step(layer, x, dy)["dx"]
    x.requires_grad_()
    layer(x).add_(1.0).backward(dy)
    assert_same(x.grad, expected)


def test_statistics_may_move_between_forward_and_backward():
    x, dy = torch.randn(2, 40, 3)
    layer = layer_for(3, fused=True).eval()
    expected = step(layer, x, dy)["dx"]
    x.requires_grad_()
    y = layer(x)
    layer.running_mean.add_(7.0), layer.running_var.mul_(3.0)
    y.backward(dy)
    assert_same(x.grad, expected)


BUFFERS = ["running_mean", "running_var", "num_batches_tracked"]


@pytest.mark.parametrize("name", BUFFERS)
def test_training_step_raises_the_version_of(name):
    layer = layer_for(3, fused=True)
    before = getattr(layer, name)._version
    layer(torch.randn(4, 3))
    assert getattr(layer, name)._version > before


@pytest.mark.parametrize("name", BUFFERS)
def test_repeated_training_step_raises_the_version_of(name):
    layer, x = layer_for(3, fused=True), torch.randn(4, 3)
    layer(x)
    before = getattr(layer, name)._version
    layer(x)
    assert getattr(layer, name)._version > before


@pytest.mark.parametrize("name", BUFFERS)
def test_evaluation_keeps_the_version_of(name):
    layer = layer_for(3, fused=True).eval()
    before = getattr(layer, name)._version
    layer(torch.randn(4, 3))
    assert getattr(layer, name)._version == before


# Partial gradients

PARTS = {
    "none": (),
    "input": ("input",),
    "weight": ("weight",),
    "bias": ("bias",),
    "residual": ("residual",),
    "weight and bias": ("weight", "bias"),
    "input and residual": ("input", "residual"),
    "all": ("input", "weight", "bias", "residual"),
}


def partial(wanted, fused, training, activation):
    generator = torch.Generator().manual_seed(6)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    given = {
        "input": draw(40, 3),
        "weight": draw(3),
        "bias": draw(3),
        "residual": draw(40, 3),
    }
    for name in wanted:
        given[name].requires_grad_()
    y = batch_norm(
        running_mean=torch.zeros(3),
        running_var=torch.ones(3),
        training=training,
        activation=activation,
        mask=torch.arange(40) % 3 > 0,
        fused=fused,
        **given,
    )
    assert y.requires_grad == bool(wanted)
    if wanted:
        y.backward(draw(40, 3))
    return {name: a.grad for name, a in given.items()}


@every_mode
@pytest.mark.parametrize("activation", [None, "relu"])
@pytest.mark.parametrize("wanted", PARTS.values(), ids=PARTS)
def test_only_wanted_gradients_are_made(wanted, activation, training):
    found = partial(wanted, True, training, activation)
    expected = partial(wanted, False, training, activation)
    assert {name for name, a in found.items() if a is not None} == set(wanted)
    assert_same([found[n] for n in wanted], [expected[n] for n in wanted], **CLOSE)


def test_no_graph_is_recorded_without_grad_mode():
    layer = layer_for(3, fused=True)
    with torch.no_grad():
        assert layer(torch.randn(4, 3, requires_grad=True)).grad_fn is None


def test_inference_mode_trains_the_statistics():
    x = torch.randn(40, 3)
    expected, layer = layer_for(3, fused=True), layer_for(3, fused=True)
    expected(x)
    with torch.inference_mode():
        layer(x)
    assert_same(dict(layer.named_buffers()), dict(expected.named_buffers()))


@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_default_device_does_not_matter(device):
    x, dy = torch.randn(2, 40, 3)
    layer = layer_for(3, activation="relu", fused=True)
    expected = step(layer, x, dy)
    with torch.device(device):
        found = step(layer, x, dy)
    assert_same(found, expected)


# Processes and threads


def run_script(script):
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


FORK = """
import os, signal, torch
from batchnorm.torch import BatchNorm
torch.manual_seed(0)
torch.set_num_threads(2)
x, dy = torch.randn(20000, 24), torch.randn(20000, 24)
def step():
    # torch's own large operations may not run in the child: its OpenMP does not survive a fork
    layer = BatchNorm(24, fused=True)
    y = layer(x)
    y.backward(dy)
    return torch.cat([y.flatten()[:1000].detach(), layer.weight.grad, layer.running_var])
expected = step()
child = os.fork()
if child == 0:
    signal.alarm(60)
    os._exit(0 if torch.equal(step(), expected) and torch.equal(step(), expected) else 1)
print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(int(torch.equal(step(), expected)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_forked_child_computes_the_same_bits():
    assert run_script(FORK) == ["0", "1"]


LOADER = """
import torch
from torch.utils.data import DataLoader
from batchnorm.torch import BatchNorm
torch.manual_seed(0)
data = torch.randn(8, 5000, 24)
def collate(samples):
    return BatchNorm(24, fused=True)(torch.cat(samples)).detach()
collate([data[0]])
loader = DataLoader(
    data, 2, collate_fn=collate, num_workers=2, multiprocessing_context="fork", timeout=60
)
for found, x in zip(loader, data.split(2), strict=True):
    print(int(torch.equal(found, collate(list(x)))))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_layer_runs_in_the_workers_of_a_data_loader():
    assert run_script(LOADER) == ["1"] * 4


@pytest.mark.parametrize("shape", [(20000, 24), (64, 8)], ids=["large", "small"])
def test_python_threads_do_not_disturb_each_other(shape):
    layer = layer_for(shape[1], fused=True)
    cases = [tuple(torch.randn(2, *shape)) for _ in range(8)]
    expected = [step(layer, *case) for case in cases]

    def steps(case):
        return [step(layer, *case) for _ in range(5)][-1]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(steps, cases))
    assert_same(found, expected)


def test_python_threads_may_share_one_layer():
    layer = layer_for(24, fused=True).eval()
    cases = torch.randn(8, 5000, 24)
    expected = [layer(x).detach() for x in cases]

    def last(x):
        return [layer(x).detach() for _ in range(5)][-1]

    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(last, cases))
    assert_same(found, expected)


# Types (S16)

HALVES = [torch.float16, torch.bfloat16]
PARAMETER_TYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@every_mode
@pytest.mark.parametrize("parameters", PARAMETER_TYPES, ids=str)
@pytest.mark.parametrize("dtype", PARAMETER_TYPES, ids=str)
def test_types_of_x_and_parameters_mix(dtype, parameters, training):
    x, dy = torch.randn(2, 40, 3).to(dtype)
    options = {"dtype": parameters, "activation": "relu"}
    found = step(layer_for(3, **options, fused=True).train(training), x, dy)
    expected = step(layer_for(3, **options, fused=False).train(training), x, dy)
    # One rounding to the type of each result, which may go either way.
    for name, value in expected.items():
        bound = max(2 * torch.finfo(value.dtype).eps, 2e-5) if value.is_floating_point() else 0
        torch.testing.assert_close(found[name], value, rtol=bound, atol=bound, msg=name)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_output_is_the_float32_one_rounded_once(dtype):
    x = torch.randn(400, 3).to(dtype)
    layer = layer_for(3, fused=True)
    assert_same(layer(x), layer(x.float()).to(dtype))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_half_layer_keeps_float32_statistics(dtype):
    x = torch.randn(400, 3).to(dtype)
    layer, wide = layer_for(3, fused=True).to(dtype), layer_for(3, fused=True)
    layer(x), wide(x.float())
    assert_same(layer.running_var, wide.running_var)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_residual_of_a_wider_type_is_rounded_as_on_the_plain_path(dtype):
    x, residual = torch.randn(400, 3).to(dtype), torch.randn(400, 3)
    found = batch_norm(x, None, None, training=True, residual=residual, fused=None)
    expected = batch_norm(x, None, None, training=True, residual=residual, fused=False)
    assert (found != expected).float().mean() < 0.01  # both round once


def test_float64_input_keeps_its_digits():
    x = torch.randn(1000, 3, dtype=torch.float64) + 1e6
    y = layer_for(3, fused=True)(x).detach()
    d = x - x.mean(0)
    d = d - d.mean(0)
    layer = layer_for(3, fused=True)
    expected = d / (d.square().mean(0) + layer.eps).sqrt() * layer.weight + layer.bias
    torch.testing.assert_close(y, expected.detach(), rtol=1e-9, atol=1e-9)


# Accuracy (S3)

ROWS = 100_000


def rows_first(a):
    return torch.tensor(a)


def channels_first(a):
    return torch.tensor(a.reshape(4, ROWS // 4, -1).transpose(0, 2, 1).copy())


def images_last(a):
    return torch.tensor(a.reshape(10, 100, 100, -1)).movedim(-1, 1)


def back(y):
    """(rows, channels) from the output of one of the three functions above."""
    return y.detach().movedim(1, -1).reshape(ROWS, -1).double().numpy()


def offset(rng):
    return rng.normal(size=(ROWS, 3)) * [1.0, 10.0, 1e-3] + [1e6, -1e7, 1e3]


def outlier(rng):
    x = rng.normal(size=(ROWS, 3)) * [1.0, 1e-2, 1e-6] + [0.0, 5.0, -1.0]
    x[0] += [1e3, 10.0, 1e-3]
    return x


def outlier_before_constant(rng):
    x = np.full((ROWS, 3), [0.1, 5.0, -1e4])
    x[0] += [1e3, -1e3, 1.0]
    return x


def enormous(rng):
    return rng.uniform(-1, 1, size=(ROWS, 3)) * [1e18, 1e16, 1e18] + [0.0, 1e18, 0.0]


def small(rng):
    return rng.normal(size=(ROWS, 3)) * [1e-12, 1e-6, 1e-15] + [0.0, 1e-3, 0.0]


ACCURACY = [offset, outlier, outlier_before_constant, enormous, small]
layouts = pytest.mark.parametrize("layout", [rows_first, channels_first, images_last])
hard = pytest.mark.parametrize("make", ACCURACY)


def moments_of(x):
    mean = x.mean(axis=0)
    mean = mean + (x - mean).mean(axis=0)
    return mean, np.square(x - mean).mean(axis=0)


def hard_rows(make):
    x = make(np.random.default_rng(0)).astype(np.float32)
    return np.clip(x, np.float32(-9.999e17), np.float32(9.999e17))


@layouts
@hard
def test_output_is_accurate_for(make, layout):
    a = hard_rows(make)
    x = a.astype(np.float64)
    layer = layer_for(3, fused=True)
    mean, var = moments_of(x)
    gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    expected = (x - mean) / np.sqrt(var + layer.eps) * gamma + beta
    error = np.abs(back(layer(layout(a))) - expected)
    assert (error <= KERNEL * (1 + np.abs(expected - beta) + np.abs(beta))).all()


@layouts
@hard
def test_statistics_are_accurate_for(make, layout):
    a = hard_rows(make)
    mean, var = moments_of(a.astype(np.float64))
    layer = layer_for(3, fused=True)
    layer(layout(a))
    found_mean, found_var = (b.double().numpy() for b in (layer.running_mean, layer.running_var))
    unbiased = var * ROWS / (ROWS - 1)
    wide = var >= 1e-30
    assert np.all(np.abs(found_var - unbiased)[wide] <= KERNEL * unbiased[wide])
    rounding = np.abs(mean) * 2.0**-24
    assert np.all(np.abs(found_mean - mean) <= KERNEL * np.sqrt(var) + rounding)


@layouts
@hard
def test_gradient_is_accurate_for(make, layout):
    a, dy = hard_rows(make), np.random.default_rng(1).normal(size=(ROWS, 3)).astype(np.float32)
    x, g = a.astype(np.float64), dy.astype(np.float64)
    layer = layer_for(3, fused=True)
    mean, var = moments_of(x)
    rstd = 1 / np.sqrt(var + layer.eps)
    z = (x - mean) * rstd
    gamma = layer.weight.detach().double().numpy()
    expected = rstd * gamma * (g - g.mean(axis=0) - z * (g * z).mean(axis=0))
    given = layout(a).requires_grad_()
    layer(given).backward(layout(dy))
    bound = KERNEL * rstd * gamma * np.abs(dy).max() * (1 + np.abs(z))
    assert (np.abs(back(given.grad) - expected) <= bound).all()


@layouts
@hard
def test_masked_outlier_and_offset_do_no_harm_to(make, layout):
    a = hard_rows(make)
    mask = np.arange(ROWS) % 7 > 0  # the first row is padding
    x = a[mask].astype(np.float64)
    mean, var = moments_of(x)
    layer = layer_for(3, fused=True)
    gamma, beta = (p.detach().double().numpy() for p in (layer.weight, layer.bias))
    expected = (x - mean) / np.sqrt(var + layer.eps) * gamma + beta
    given = layout(a)
    rows = torch.tensor(mask).reshape(given.shape[0], *given.shape[2:])
    error = np.abs(back(layer(given, rows))[mask] - expected)
    assert (error <= KERNEL * (1 + np.abs(expected - beta) + np.abs(beta))).all()


# Empty batches and single rows (S6, S7)

EMPTY = {
    "no rows": ((0, 3), None),
    "no rows, masked": ((0, 3), (0,)),
    "no images": ((0, 3, 4, 5), None),
    "no positions": ((4, 3, 0), None),
    "no positions, masked": ((4, 3, 0), (4, 0)),
    "no real rows": ((5, 3), (5,)),
    "no real positions": ((4, 3, 5), (4, 5)),
    "no real samples": ((4, 3, 5), (4,)),
}


@pytest.mark.parametrize("options", [{}, {"virtual_batch_size": 1}, {"renorm": True}])
@pytest.mark.parametrize(("shape", "mask_shape"), EMPTY.values(), ids=EMPTY)
def test_empty_batch_is_normalized_by_running_statistics(shape, mask_shape, options):
    layer = layer_for(3, **options, fused=True)
    layer.running_mean.copy_(torch.tensor([1.0, 2.0, 3.0]))
    layer.running_var.fill_(4.0)
    mask = None if mask_shape is None else torch.zeros(mask_shape, dtype=torch.bool)
    x, dy = torch.randn(shape), torch.randn(shape)
    found = step(layer, x, dy, mask)
    expected = step(copy.deepcopy(layer).eval(), x, dy)
    assert_same(found["y"], expected["y"], rtol=KERNEL, atol=KERNEL)
    assert not found["dx"].any()
    assert not found["dweight"].any()
    assert not found["dbias"].any()
    assert_same({n: found[n] for n in BUFFERS}, {n: expected[n] for n in BUFFERS})


@pytest.mark.parametrize("shape", [(5, 3), (4, 3, 5)], ids=["rows", "signal"])
def test_empty_batch_without_statistics_is_normalized_by_0_and_1(shape):
    x = torch.randn(shape)
    mask = torch.zeros(shape[0], dtype=torch.bool)
    y = batch_norm(x, None, None, training=True, mask=mask, eps=3.0, fused=True)
    assert_same(y, x / 2, rtol=KERNEL, atol=KERNEL)


@pytest.mark.parametrize("shape", [(5, 0), (5, 0, 4), (0, 0)])
@pytest.mark.parametrize("masked", [False, True])
def test_no_channels_are_no_trouble(shape, masked):
    mask = torch.ones(shape[0], dtype=torch.bool) if masked else None
    found = step(layer_for(0, fused=True), torch.randn(shape), torch.randn(shape), mask)
    assert found["y"].shape == found["dx"].shape == shape


ONE_ROW = {
    "rows": ((5, 3), (5,)),
    "signal": ((4, 3, 5), (4, 5)),
    "single": ((1, 3), (1,)),
}


@pytest.mark.parametrize("value", [0.0, 1e6, 1e18])
@pytest.mark.parametrize(("shape", "mask_shape"), ONE_ROW.values(), ids=ONE_ROW)
def test_single_real_row_gives_beta(shape, mask_shape, value):
    mask = torch.zeros(mask_shape, dtype=torch.bool)
    mask.view(-1)[-1] = True
    x, dy = torch.randn(2, *shape)
    layer = layer_for(3, fused=True)
    found = step(layer, x + value, dy, mask)
    real = found["y"].movedim(1, -1)[mask]
    assert_same(real, layer.bias.detach().expand_as(real))
    assert not found["dx"].any()
    assert found["y"].isfinite().all()
    assert not found["running_var"].any()


def test_single_value_without_mask_is_still_an_error():
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        layer_for(3, fused=True)(torch.randn(1, 3))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("shape", [(50, 3), (5, 3, 10)], ids=["rows", "signal"])
def test_channel_that_is_not_finite_keeps_its_statistics(shape, value):
    x, layer = torch.randn(shape), layer_for(3, fused=True)
    x[2, 1] = value
    before = copy.deepcopy(dict(layer.named_buffers()))
    y = layer(x)
    assert y[:, 1].isnan().any()
    assert layer.running_mean[1] == before["running_mean"][1]
    assert layer.running_var[1] == before["running_var"][1]
    assert layer.running_mean[0] != before["running_mean"][0]
    assert layer.num_batches_tracked == 1


@contextlib.contextmanager
def flushed():
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


def test_flushed_denormals_change_no_bit_with_the_number_of_threads(threads):
    x, layer = torch.randn(20000, 24) * 1e-38, layer_for(24, eps=0.0, fused=True)
    dy = torch.randn(20000, 24)
    with flushed():
        threads(1)
        expected = step(layer, x, dy)
        threads(4)
        assert_same(step(layer, x, dy), expected)
