"""Integer masks of any width: 0 and 1 in eager code; elsewhere every value but 0 is real."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.export import Dim, export
from torch.func import vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.masked import masked_tensor

from batchnorm.torch import BatchNorm, BatchNorm1d, batch_norm, padding_mask, sequence_mask
from batchnorm.torch.explicit import BatchNorm as Explicit

pytestmark = pytest.mark.sample(2)

UNSIGNED = [torch.uint8, torch.uint16, torch.uint32, torch.uint64]
INTEGERS = [*UNSIGNED, torch.int8, torch.int16, torch.int32, torch.int64]
every_type = pytest.mark.parametrize("dtype", INTEGERS, ids=str)
N, C, L = 4, 3, 6
MASK = torch.arange(L) < torch.tensor([6, 2, 4, 1])[:, None]

WAYS = {
    "kernels": {},
    "array code": {"fused": False},
    "array code for kernels' options": {"adjustment": lambda shape: (None, None)},
    "ghost batches": {"virtual_batch_size": 2},
    "renormalization": {"renorm": True},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)


@pytest.fixture(autouse=True)
def _fresh():
    torch.manual_seed(0)
    torch._dynamo.reset()


def token_numbers(dtype: torch.dtype) -> Tensor:
    """Integers that are 0 where MASK is False; among them the least and the greatest."""
    values = [1, torch.iinfo(dtype).min or 2, torch.iinfo(dtype).max, 16]
    rows = [[values[i % 4] if real else 0 for i, real in enumerate(row)] for row in MASK.tolist()]
    return torch.tensor(rows, dtype=dtype)


def step(layer: BatchNorm, mask: Tensor) -> list[Tensor]:
    x = torch.linspace(-1, 3, N * C * L).square().reshape(N, C, L).requires_grad_()
    y = layer(x, mask)
    y.backward(torch.linspace(2, -1, y.numel()).reshape(y.shape))
    return [y.detach(), x.grad, layer.weight.grad, layer.running_mean, layer.running_var]


# Zeros and ones


@every_type
@every_way
def test_integer_mask_means_what_the_boolean_one_does(options, dtype):
    found, expected = (step(BatchNorm(C, **options), m) for m in (MASK.to(dtype), MASK))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.sample(3)
@every_type
def test_compiled_integer_mask_means_what_the_boolean_one_does(dtype):
    layer = BatchNorm(C)
    found = step(torch.compile(layer, fullgraph=True, backend="aot_eager"), MASK.to(dtype))
    expected = step(BatchNorm(C), MASK)
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b)


@every_type
def test_jagged_input_takes_integer_masks(dtype):
    rows = [torch.randn(n, C) for n in (6, 2, 4, 1)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged)
    samples = torch.tensor([1, 0, 1, 1])
    expected = BatchNorm(C, axis=-1)(x, samples.bool()).values()
    assert torch.equal(BatchNorm(C, axis=-1)(x, samples.to(dtype)).values(), expected)
    packed = samples.repeat_interleave(torch.tensor([6, 2, 4, 1]))
    ragged = torch.nested.nested_tensor_from_jagged(packed.to(dtype), x.offsets())
    assert torch.equal(BatchNorm(C, axis=-1)(x, ragged).values(), expected)


# Other values are refused where they can be read


def explicitly(mask: Tensor) -> Tensor:
    layer = Explicit()
    layer.initialise_layer(input_shape=(C,))
    return layer.forward(torch.randn(N, C), training=True, mask=mask[:, 0])


def in_context(mask: Tensor) -> None:
    with padding_mask(mask):
        raise AssertionError("padding_mask checks its mask at once")


ENTRANCES = {
    "layer": lambda mask: BatchNorm1d(C)(torch.randn(N, C, L), mask),
    "array code": lambda mask: BatchNorm1d(C, fused=False)(torch.randn(N, C, L), mask),
    "evaluation": lambda mask: BatchNorm1d(C).eval()(torch.randn(N, C, L), mask),
    "function": lambda mask: batch_norm(torch.randn(N, C, L), None, None, training=True, mask=mask),
    "explicit layer": explicitly,
    "padding_mask": in_context,
}


@every_type
@pytest.mark.parametrize("enter", ENTRANCES.values(), ids=ENTRANCES)
def test_other_values_are_refused_with_both_remedies(enter, dtype):
    value = torch.iinfo(dtype).max
    mask = MASK.to(dtype)
    mask[1, 0] = torch.tensor(value, dtype=dtype)
    with pytest.raises(ValueError, match=rf"got the value {value}\. ") as caught:
        enter(mask)
    assert "mask != 0" in str(caught.value)
    assert "sequence_mask(lengths, size)" in str(caught.value)


@pytest.mark.parametrize(("value", "dtype"), [(-1, torch.int8), (-(2**63), torch.int64)])
def test_negative_values_are_shown(value, dtype):
    mask = MASK.to(dtype)
    mask[0, 0] = value
    with pytest.raises(ValueError, match=re.escape(f"got the value {value}.")):
        BatchNorm(C)(torch.randn(N, C, L), mask)


def test_refused_mask_moves_nothing():
    layer = BatchNorm(C)
    before = {name: a.clone() for name, a in layer.state_dict().items()}
    with pytest.raises(ValueError, match="got the value 6"):
        layer(torch.randn(N, C, L), torch.tensor([6, 2, 4, 1]))
    assert all(torch.equal(a, before[name]) for name, a in layer.state_dict().items())


def test_jagged_mask_of_other_values_is_refused():
    x = torch.nested.nested_tensor([torch.randn(n, C) for n in (2, 3)], layout=torch.jagged)
    with pytest.raises(ValueError, match="got the value 3"):
        BatchNorm(C, axis=-1)(x, torch.tensor([2, 3]))
    ragged = torch.nested.nested_tensor_from_jagged(torch.arange(5), x.offsets())
    with pytest.raises(ValueError, match="got the value 4"):
        BatchNorm(C, axis=-1)(x, ragged)


def test_values_are_read_in_forward_mode():
    with forward_ad.dual_level():
        x = forward_ad.make_dual(torch.randn(N, C, L), torch.randn(N, C, L))
        with pytest.raises(ValueError, match="got the value 6"):
            BatchNorm(C, track_running_stats=False)(x, torch.tensor([6, 2, 4, 1]))


def test_values_are_read_of_a_subclass_that_only_has_a_name():
    class Named(Tensor):
        pass

    with pytest.raises(ValueError, match="got the value 6"):
        BatchNorm(C)(torch.randn(N, C, L), torch.tensor([6, 2, 4, 1]).as_subclass(Named))


def test_empty_integer_mask_has_no_values_to_refuse():
    y = BatchNorm(C)(torch.ones(0, C, L), torch.ones(0, L, dtype=torch.int64))
    assert y.shape == (0, C, L)


# Where values cannot be read, every value but 0 is real


@pytest.mark.sample(3)
@every_type
def test_compiled_token_numbers_are_real_where_not_zero(dtype):
    layer = torch.compile(BatchNorm(C), fullgraph=True, backend="aot_eager")
    found = step(layer, token_numbers(dtype))
    for a, b in zip(found, step(BatchNorm(C), MASK), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_exported_program_takes_token_numbers(strict):
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = BatchNorm(C, track_running_stats=False)

        def forward(self, x, mask):
            return self.norm(x, mask)

    x, model, mask = torch.randn(N, C, L), Model(), token_numbers(torch.int64)
    program = export(model, (x, mask), dynamic_shapes=({2: Dim("l")}, {1: Dim("l")}), strict=strict)
    torch.testing.assert_close(program.module()(x, mask), model(x, MASK))


def test_vmapped_token_numbers_are_real_where_not_zero():
    x = torch.randn(2, N, C, L)
    masks = torch.stack([token_numbers(torch.int64), token_numbers(torch.int64).flip(0)])
    layer = BatchNorm(C, track_running_stats=False)
    expected = torch.stack([layer(a, m != 0) for a, m in zip(x, masks, strict=True)])
    torch.testing.assert_close(vmap(layer)(x, masks), expected)


def test_traced_token_numbers_are_real_where_not_zero():
    x, layer, mask = torch.randn(N, C, L), BatchNorm(C).eval(), token_numbers(torch.int32)
    graph = make_fx(layer)(x, mask)
    torch.testing.assert_close(graph(x, mask), layer(x, MASK))


def test_fake_masks_are_not_read():
    with FakeTensorMode():
        layer = BatchNorm(C)
        mask = torch.ones(N, L, dtype=torch.int64)
        assert layer(torch.randn(N, C, L), mask).shape == (N, C, L)


# Arguments that are no masks


EXOTIC = {
    "masked": (lambda: masked_tensor(MASK, MASK), "MaskedTensor"),
    "sparse": (MASK.to_sparse, "layout torch.sparse_coo"),
    "sparse rows": (MASK.int().to_sparse_csr, "layout torch.sparse_csr"),
    "nested": (lambda: torch.nested.nested_tensor([MASK[0]] * N), "be a dense"),
    "quantized": (lambda: torch.quantize_per_tensor(MASK.float(), 1.0, 0, torch.qint8), "qint8"),
    "complex": (lambda: MASK + 0j, "complex64"),
    "floating": (MASK.float, "float32"),
}


@pytest.mark.filterwarnings("ignore::UserWarning")  # torch calls most of these prototypes
@pytest.mark.parametrize(("make", "text"), EXOTIC.values(), ids=EXOTIC)
def test_exotic_mask_is_one_type_error(make, text):
    with pytest.raises(TypeError, match=rf"BatchNorm: mask must.*{text}"):
        BatchNorm(C)(torch.randn(N, C, L), make())


# sequence_mask


@every_type
def test_sequence_mask_marks_what_lies_below_the_length(dtype):
    found = sequence_mask(torch.tensor([6, 2, 4, 1], dtype=dtype), L)
    assert found.dtype is torch.bool
    assert torch.equal(found, MASK)


def test_sequence_mask_of_any_shape():
    assert sequence_mask(torch.tensor(2), 3).tolist() == [True, True, False]
    nested = sequence_mask(torch.tensor([[0, 3], [1, 2]]), 3)
    assert nested.int().tolist() == [[[0, 0, 0], [1, 1, 1]], [[1, 0, 0], [1, 1, 0]]]
    assert sequence_mask(torch.zeros(0, dtype=torch.int32), 3).shape == (0, 3)
    assert sequence_mask(torch.zeros(2, dtype=torch.int32), 0).shape == (2, 0)


REFUSED = {
    "too long": ((torch.tensor([1, 7]), 6), ValueError, "between 0 and size=6; got 7"),
    "negative": ((torch.tensor([-1, 7]), 6), ValueError, "between 0 and size=6; got -1"),
    "huge": ((torch.tensor([2**64 - 1], dtype=torch.uint64), 6), ValueError, f"got {2**64 - 1}"),
    "boolean": ((torch.tensor([True]), 6), TypeError, "tensor of integers; got.*bool"),
    "floating": ((torch.tensor([1.0]), 6), TypeError, "tensor of integers; got.*float32"),
    "sparse": ((torch.tensor([1]).to_sparse(), 6), TypeError, "dense tensor of integers"),
    "a list": (([1, 2], 6), TypeError, "lengths must be a torch.Tensor; got list"),
    "negative size": ((torch.tensor([0]), -1), ValueError, "size must be at least 0; got -1"),
    "floating size": ((torch.tensor([0]), 6.0), TypeError, "size must be an int; got 6.0"),
    "boolean size": ((torch.tensor([0]), True), TypeError, "size must be an int; got True"),
}


@pytest.mark.parametrize(("given", "error", "text"), REFUSED.values(), ids=REFUSED)
def test_sequence_mask_refuses(given, error, text):
    with pytest.raises(error, match=f"sequence_mask: .*{text}"):
        sequence_mask(*given)


def test_sequence_mask_compiles_once_for_all_sizes():
    compiled = torch.compile(sequence_mask, fullgraph=True, dynamic=True, backend="aot_eager")
    for size in (6, 7, 9):
        given = torch.tensor([6, 2, 4, 1])
        assert torch.equal(compiled(given, size), sequence_mask(given, size))


@pytest.mark.parametrize("strict", [True, False], ids=["strict", "not strict"])
def test_sequence_mask_exports(strict):
    class Model(torch.nn.Module):
        def forward(self, x, lengths):
            return sequence_mask(lengths, x.shape[1])

    given = (torch.ones(2, 4), torch.tensor([1, 3]))
    program = export(Model(), given, dynamic_shapes=({1: Dim("n")}, None), strict=strict)
    found = program.module()(torch.ones(2, 6), torch.tensor([6, 0]))
    assert torch.equal(found, sequence_mask(torch.tensor([6, 0]), 6))


def test_sequence_mask_is_a_mask():
    x, layer = torch.randn(N, C, L), BatchNorm(C)
    given = torch.tensor([6, 2, 4, 1])
    assert torch.equal(layer(x, sequence_mask(given, L)), BatchNorm(C)(x, MASK))
