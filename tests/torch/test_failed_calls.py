"""A call that fails, wherever it fails, changes no running statistic (S9)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call, vmap
from torch.masked import masked_tensor
from torch.utils.checkpoint import checkpoint

from batchnorm.torch import BatchNorm, RenormStatistics, batch_norm, rollback
from batchnorm.torch.explicit import BatchNorm as Explicit
from batchnorm.torch.recompute import PastSteps
from batchnorm.torch.rollback import unmoved_on_failure

N, C, L = 6, 4, 5
MASK = torch.arange(L) < torch.tensor([5, 2, 4, 1, 3, 0])[:, None]


class BrokenError(Exception):
    """The error that a test raises on purpose."""


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def bits(layer: torch.nn.Module) -> dict[str, list[int]]:
    """The layer's state, NaN and signed zeros told apart."""
    state = layer.state_dict().items()
    return {name: a.contiguous().view(torch.uint8).tolist() for name, a in state if a.dim()} | {
        name: a.item() for name, a in state if not a.dim()
    }


WAYS = {
    "kernels": {},
    "cumulative": {"momentum": None},
    "no parameters": {"affine": False},
    "relu": {"activation": "relu"},
    "renormalization": {"renorm": True},
    "renormalization and relu": {"renorm": True, "activation": "relu"},
    "ghost batches": {"virtual_batch_size": 3},
    "array code": {"fused": False},
    "array code, relu": {"fused": False, "activation": "relu"},
    "array code, renormalization": {"fused": False, "renorm": True},
    "array code, ghost batches": {"fused": False, "virtual_batch_size": 3},
    "adjustment": {"adjustment": lambda shape: (torch.full((1,), 2.0), None)},
}
every_way = pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
used = pytest.mark.parametrize("calls", [0, 3], ids=["first call", "repeated call"])


def layer_after(calls: int, x: Tensor, **options) -> BatchNorm:
    layer = BatchNorm(C, **options)
    for _ in range(calls):
        layer(x)
    return layer


def failing_at(number: int) -> saved_tensors_hooks:
    """Hooks that raise on the saved tensor with this number, counted from 0."""
    seen: list[Tensor] = []

    def pack(a: Tensor) -> Tensor:
        seen.append(a)
        if len(seen) > number:
            raise BrokenError
        return a

    return saved_tensors_hooks(pack, lambda a: a)


def fail_at_every_hook(layer: BatchNorm, *args) -> int:
    """The number of a call's saved tensors; asserts that a raising hook changes no statistics."""
    for number in range(100):
        before = bits(layer)
        try:
            with failing_at(number):
                layer(*args)
        except BrokenError:
            assert bits(layer) == before, f"moved, and then tensor {number} was not saved"
        else:
            assert bits(layer) != before
            return number
    raise AssertionError("no call went through")


@used
@pytest.mark.parametrize("masked", [False, True], ids=["unmasked", "masked"])
@every_way
def test_hook_on_saved_tensors_that_raises(options, masked, calls):
    x = torch.randn(N, C, L, requires_grad=True)
    layer = layer_after(calls, x, **options)
    assert fail_at_every_hook(layer, x, MASK if masked else None) > 0


def test_hook_that_raises_beside_a_residual():
    x, residual = torch.randn(N, C, L), torch.randn(N, C, L, requires_grad=True)
    assert fail_at_every_hook(BatchNorm(C, activation="relu"), x, None, residual) > 1


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"activation": "relu"}], ids=str)
def test_hook_that_raises_where_a_jagged_output_is_wrapped(options):
    rows = [torch.randn(n, C) for n in (3, 5)]
    x = torch.nested.nested_tensor(rows, layout=torch.jagged, requires_grad=True)
    assert fail_at_every_hook(BatchNorm(C, axis=-1, **options), x) > 1


def test_hooks_get_the_output_that_the_backward_pass_needs():
    """With an activation y is saved, so it must be computed before hooks get it."""
    x = torch.randn(N, C, L, requires_grad=True)
    found, dy = [], torch.randn(N, C, L)
    for hooks in (saved_tensors_hooks(torch.clone, torch.clone), torch.enable_grad()):
        layer = BatchNorm(C, activation="leaky_relu")
        with hooks:
            y = layer(x, None, 0.1 * x.detach())
        found.append([y, *torch.autograd.grad(y, (x, layer.weight), dy), layer.running_mean])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("early_stop", [True, False])
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}], ids=str)
def test_checkpointed_layer_has_the_gradients_of_the_plain_one(options, early_stop):
    x, dy, found = torch.randn(N, C, L, requires_grad=True), torch.randn(N, C, L), []
    for again in (True, False):
        layer = BatchNorm(C, **options)
        with torch.utils.checkpoint.set_checkpoint_early_stop(early_stop):
            y = checkpoint(layer, x, use_reentrant=False) if again else layer(x)
            found.append([*torch.autograd.grad(y, (x, layer.weight), dy), layer.running_var])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


# Inference tensors


@used
@every_way
def test_inference_tensors_that_autograd_cannot_save(options, calls):
    with torch.inference_mode():
        x, mask = torch.randn(N, C, L), MASK.clone()
    layer = layer_after(calls, torch.randn(N, C, L), **options)
    for given in ((x, None), (x, mask), (torch.randn(N, C, L, requires_grad=True), mask)):
        before = bits(layer)
        try:
            layer(*given)
        except RuntimeError:
            assert bits(layer) == before


def test_inference_input_raises_as_in_torch():
    with torch.inference_mode():
        x = torch.randn(N, C, L)
    for layer in (torch.nn.BatchNorm1d(C), BatchNorm(C)):
        with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
            layer(x)


@used
@every_way
def test_inference_statistics_are_not_written_outside_of_inference_mode(options, calls):
    x = torch.randn(N, C, L)
    with torch.inference_mode():
        layer = layer_after(calls, x, **options)
    before = bits(layer)
    with pytest.raises(RuntimeError, match=r"running_mean is updated in place.*clone\(\)"):
        layer(x)
    assert bits(layer) == before
    with torch.inference_mode():
        layer(x)
    assert bits(layer) != before
    with torch.no_grad():
        assert layer.eval()(x).isfinite().all()


def test_explicit_layer_does_not_write_inference_statistics():
    layer = Explicit()
    with torch.inference_mode():
        layer.initialise_layer(input_shape=(C,))
    with pytest.raises(RuntimeError, match="running_mean is updated in place"):
        layer.forward(torch.randn(N, C), training=True)
    assert torch.equal(layer.running_mean, torch.zeros(C))


# One running statistic that cannot be written


def one_number(shape: tuple[int, ...]) -> Tensor:
    """A tensor that torch refuses to write: all elements share one memory location."""
    return torch.ones(1).expand(shape)


@pytest.mark.parametrize("name", ["running_mean", "running_var"])
def test_statistic_that_cannot_be_written(name):
    statistics = {"running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    statistics[name] = one_number((C,))
    before = {key: a.clone() for key, a in statistics.items()}
    with pytest.raises(RuntimeError, match="single memory location"):
        batch_norm(torch.randn(N, C, L), **statistics, training=True)
    assert all(torch.equal(a, before[key]) for key, a in statistics.items())


@pytest.mark.parametrize("broken", range(3))
def test_renormalization_statistic_that_cannot_be_written(broken):
    names = RenormStatistics._fields
    given = [one_number((C,)) if i == broken else torch.ones(C) for i in range(len(names))]
    mean, var = torch.zeros(C), torch.ones(C)
    with pytest.raises(RuntimeError, match="single memory location"):
        batch_norm(torch.randn(N, C, L), mean, var, training=True, renorm=RenormStatistics(*given))
    for a in (var, *given):
        assert torch.equal(a, torch.ones(C))
    assert torch.equal(mean, torch.zeros(C))


def test_counter_that_cannot_be_written():
    layer = BatchNorm(C, fused=False)
    layer.num_batches_tracked = torch.zeros((), dtype=torch.int64)[None].expand(2)
    before = bits(layer)
    with pytest.raises(RuntimeError):
        layer(torch.randn(N, C, L))
    assert bits(layer) == before


def test_statistics_that_a_transformation_cannot_write():
    layer = BatchNorm(C)
    before = bits(layer)
    with pytest.raises(RuntimeError, match="vmap"):
        vmap(layer)(torch.randn(2, N, C, L))
    assert bits(layer) == before


def test_batched_statistics_of_which_one_cannot_be_written():
    """Values of batched tensors cannot be compared, so writing them back must not compare."""
    layer, x = BatchNorm(C, momentum=0.5), torch.randn(2, N, C, L)
    means = torch.zeros(2, C)

    def call(mean, a):
        return functional_call(layer, {"running_mean": mean}, (a,))

    with pytest.raises(RuntimeError, match="cannot be moved under torch"):
        vmap(call)(means, x)
    assert torch.equal(means, torch.zeros(2, C))


# Everything else that can fail


def raising(*args, **kwargs):
    raise BrokenError


def test_adjustment_that_raises():
    layer = BatchNorm(C, adjustment=raising)
    before = bits(layer)
    with pytest.raises(BrokenError):
        layer(torch.randn(N, C, L))
    assert bits(layer) == before


@used
@pytest.mark.parametrize("options", [{}, {"activation": "relu"}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("requires_grad", [True, False])
def test_output_without_memory(monkeypatch, requires_grad, options, calls):
    x = torch.randn(N, C, L, requires_grad=requires_grad)
    layer = layer_after(calls, x, affine=False, **options)
    before = bits(layer)
    monkeypatch.setattr("batchnorm.torch.kernels.autograd.empty_output", raising)
    with pytest.raises(BrokenError):
        layer(x)
    assert bits(layer) == before


def test_history_of_renormalization_that_cannot_be_kept(monkeypatch):
    monkeypatch.setattr(PastSteps, "record", raising)
    layer = BatchNorm(C, renorm=True)
    before = bits(layer)
    with pytest.raises(BrokenError):
        layer(torch.randn(N, C, L))
    assert bits(layer) == before


def test_output_that_cannot_be_cast(monkeypatch):
    layer, x = BatchNorm(C, fused=False), torch.randn(N, C, L).half()
    before = bits(layer)
    written = []
    monkeypatch.setattr(rollback, "write_all", written.append)
    cast = Tensor.to

    def to(a, dtype, *args, **kwargs):
        if dtype is torch.float16:
            raise BrokenError
        return cast(a, dtype, *args, **kwargs)

    monkeypatch.setattr(Tensor, "to", to)
    with pytest.raises(BrokenError):
        layer(x)
    assert bits(layer) == before
    assert not written


def test_block_that_fails_is_undone_to_the_bit():
    a = torch.tensor([float("nan"), -0.0, 1e-45, 3.0])
    before = a.clone()

    def fail():
        with unmoved_on_failure([a, None]):
            a.fill_(7.0)
            raise BrokenError

    with pytest.raises(BrokenError):
        fail()
    assert a.view(torch.int32).tolist() == before.view(torch.int32).tolist()


def test_block_that_succeeds_is_kept():
    a = torch.zeros(3)
    with unmoved_on_failure([a]):
        a.fill_(7.0)
    assert a.tolist() == [7.0] * 3


# Tensors of kinds that a batch norm does not take: a TypeError, and no change of state

EXOTIC = {
    "masked": lambda x: masked_tensor(x, torch.ones_like(x, dtype=torch.bool)),
    "sparse": lambda x: x.to_sparse(),
    "mkldnn": lambda x: x.to_mkldnn(),
    "quantized": lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8),
    "complex": lambda x: x + 0j,
}
exotic = [
    pytest.mark.filterwarnings("ignore::UserWarning"),  # torch calls most of these prototypes
    pytest.mark.parametrize("change", EXOTIC.values(), ids=EXOTIC),
    pytest.mark.parametrize("fused", [None, False]),
]


def every_exotic(test):
    for mark in exotic:
        test = mark(test)
    return test


@every_exotic
@pytest.mark.parametrize("name", ["x", "residual"])
def test_exotic_input_or_residual(change, fused, name):
    layer, x = BatchNorm(C, fused=fused), torch.randn(N, C, L)
    before = bits(layer)
    given = (change(x),) if name == "x" else (x, None, change(x))
    with pytest.raises(TypeError, match=f"BatchNorm: {name} must be"):
        layer(*given)
    assert bits(layer) == before


@every_exotic
@pytest.mark.parametrize("name", ["weight", "bias", "running_mean", "running_var"])
def test_exotic_parameter_or_statistic(change, fused, name):
    given = {"running_mean": torch.zeros(C), "running_var": torch.ones(C)}
    given[name] = change(torch.ones(C))
    with pytest.raises(TypeError, match=f"batch_norm: {name} must be"):
        batch_norm(torch.randn(N, C, L), **given, training=True, fused=fused)


@pytest.mark.filterwarnings("ignore:The PyTorch API of MaskedTensors")
def test_masked_tensor_says_what_to_pass():
    with pytest.raises(TypeError, match=r"get_data\(\).*get_mask\(\) as mask"):
        BatchNorm(C)(EXOTIC["masked"](torch.randn(N, C, L)))


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_zeros_without_memory_are_zeros(name):
    x, zeros = torch.randn(N, C, L), torch._efficientzerotensor((C,))
    y = batch_norm(x, None, None, **{name: zeros}, training=True)
    expected = batch_norm(x, None, None, **{name: torch.zeros(C)}, training=True)
    torch.testing.assert_close(y, expected)
