"""padded_output="zero": real outputs of a whole model do not depend on its padding (S4)."""

from __future__ import annotations

import copy
import math
import sys

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from batchnorm import explain
from batchnorm.tools import fold
from batchnorm.torch import (
    BatchNorm,
    BatchNorm1d,
    batch_norm,
    convert_batchnorm,
    padding_mask,
    revert_batchnorm,
    sequence_mask,
)

pytestmark = pytest.mark.sample(2)

ZERO = {"padded_output": "zero"}
OPTIONS = {
    "plain": {},
    "relu": {"activation": "relu"},
    "leaky": {"activation": "leaky_relu"},
    "ghost": {"virtual_batch_size": 2},
    "renorm": {"renorm": True},
    "arrays": {"fused": False},
}


@pytest.fixture(autouse=True)
def _fresh() -> None:
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:  # which gives up on a function that it has compiled often
        torch._dynamo.reset()


def randomize(layer: BatchNorm) -> BatchNorm:
    """The layer with parameters and statistics as after some training."""
    with torch.no_grad():
        for a in (layer.weight, layer.running_var):
            a.uniform_(0.5, 1.5)
        for a in (layer.bias, layer.running_mean):
            a.normal_()
    return layer


def stack(depth: int, channels: int = 8, activation: type[nn.Module] = nn.ReLU) -> nn.Sequential:
    """Convolution, norm, activation, `depth` times, and a last convolution."""
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [
            nn.Conv1d(channels, channels, 5, padding=2),
            randomize(BatchNorm1d(channels, momentum=1.0, **ZERO)),
            activation(),
        ]
    return nn.Sequential(*layers, nn.Conv1d(channels, channels, 5, padding=2)).double()


def padded(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """x with zeros up to `size` positions, and its mask."""
    mask = sequence_mask(torch.full((len(x),), x.shape[-1]), size)
    return nn.functional.pad(x, (0, size - x.shape[-1])), mask


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize(("depth", "activation"), [(1, nn.SiLU), (3, nn.ReLU)])
def test_more_padding_moves_no_real_output(depth, activation, training):
    model = stack(depth, activation=activation).train(training)
    x = torch.randn(1 if depth == 1 else 4, 8, 40, dtype=torch.float64)
    found, means = [], []
    for size in (40, 100):
        each = copy.deepcopy(model)
        wide, mask = padded(x, size)
        with padding_mask(mask):
            found.append(each(wide)[..., :40])
        means.append(torch.cat([m.running_mean for m in each if isinstance(m, BatchNorm)]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(means[1], means[0], rtol=1e-6, atol=1e-6)  # float32 buffers


def test_normalized_padding_moves_them():
    model = stack(3)
    for layer in model:
        if isinstance(layer, BatchNorm):
            layer.configure(padded_output="normalize")
    x, found = torch.randn(4, 8, 40, dtype=torch.float64), []
    for size in (40, 70):
        wide, mask = padded(x, size)
        with padding_mask(mask):
            found.append(model.eval()(wide)[..., :40])
    assert (found[1] - found[0]).abs().max() > 0.05


@pytest.mark.parametrize("mode", ["training", "evaluation", "frozen"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_padding_is_zero_whatever_is_there(options, mode):
    layer = randomize(BatchNorm(3, **ZERO, **options)).train(mode != "evaluation")
    if mode == "frozen":
        layer.freeze()
    mask, x, residual = torch.rand(4, 5) < 0.5, torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    real = mask[:, None].expand_as(x)
    x, residual = (a.where(real, math.nan).requires_grad_() for a in (x, residual))
    y = layer(x, mask, residual)
    assert torch.equal(y[~real], torch.zeros_like(y[~real]))
    assert not torch.signbit(y[~real]).any()
    assert y[real].isfinite().all()
    y.backward(torch.randn_like(y).where(real, math.nan))
    for gradient in (x.grad, residual.grad):
        assert torch.equal(gradient[~real], torch.zeros_like(gradient[~real]))
        assert gradient[real].isfinite().all()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_real_rows_are_those_of_normalized_padding_to_the_bit(options):
    zero, other = (randomize(BatchNorm(3, **options, **more)) for more in (ZERO, {}))
    other.load_state_dict(zero.state_dict())
    mask, x = torch.rand(4, 5) < 0.5, torch.randn(4, 3, 5)
    real = mask[:, None].expand_as(x)
    assert torch.equal(zero(x, mask)[real], other(x, mask)[real])
    assert torch.equal(zero.running_var, other.running_var)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("activation", [None, "leaky_relu"])
def test_higher_derivatives_agree_with_differences(activation, fused):
    layer = randomize(BatchNorm(2, fused=fused, activation=activation, **ZERO)).double()
    mask = torch.tensor([[1, 1, 0], [1, 0, 1], [1, 1, 1]])
    inputs = [torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    run = lambda x, residual: layer(x, mask, residual)  # noqa: E731
    assert torch.autograd.gradcheck(run, inputs)
    assert torch.autograd.gradgradcheck(run, inputs)


def test_without_a_mask_it_changes_nothing():
    zero = randomize(BatchNorm(3, **ZERO))
    other = BatchNorm(3)
    other.load_state_dict(zero.state_dict())
    x = torch.randn(4, 3, 5)
    assert torch.equal(zero(x), other(x))


def test_evaluation_without_gradients_reads_the_mask_of_padding_mask():
    layer = randomize(BatchNorm1d(3, **ZERO)).eval()
    mask, x = sequence_mask(torch.tensor([2, 5]), 5), torch.randn(2, 3, 5)
    with torch.no_grad(), padding_mask(mask):
        assert torch.equal(layer(x)[0, :, 2:], torch.zeros(3, 3))


def test_recomputation_zeroes_too():
    layer = randomize(BatchNorm1d(3, **ZERO))
    mask, x = sequence_mask(torch.tensor([2, 5]), 5), torch.randn(2, 3, 5, requires_grad=True)
    expected = torch.autograd.grad(copy.deepcopy(layer)(x, mask).square().sum(), x)
    with padding_mask(mask):
        y = checkpoint(layer, x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.square().sum(), x)[0], expected[0])


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_compiled_layer_zeroes_in_both_settings(training):
    layer = randomize(BatchNorm1d(3, **ZERO)).train(training)
    compiled = torch.compile(copy.deepcopy(layer), fullgraph=True, backend="aot_eager")
    mask, x = sequence_mask(torch.tensor([2, 5]), 5), torch.randn(2, 3, 5)
    torch.testing.assert_close(compiled(x, mask), layer(x, mask), rtol=1e-5, atol=1e-5)
    compiled.configure(padded_output="normalize")
    assert (compiled(x, mask)[0, :, 2:] != 0).all()


def test_exported_program_zeroes():
    layer = randomize(BatchNorm1d(3, **ZERO)).eval()
    mask, x = sequence_mask(torch.tensor([2, 5]), 5), torch.randn(2, 3, 5)
    program = torch.export.export(layer, (x, mask)).module()
    torch.testing.assert_close(program(x, mask), layer(x, mask), rtol=1e-5, atol=1e-5)
    assert torch.equal(program(x, mask)[0, :, 2:], torch.zeros(3, 3))


def test_function_takes_it():
    x, mask = torch.randn(4, 3), torch.tensor([1, 1, 1, 0])
    y = batch_norm(x, None, None, training=True, mask=mask, **ZERO)
    assert torch.equal(y[3], torch.zeros(3))


@pytest.mark.parametrize("value", ["zeros", None, 0, True])
def test_other_values_are_refused(value):
    with pytest.raises(
        ValueError, match=r'^BatchNorm: padded_output must be "normalize" or "zero"'
    ):
        BatchNorm(3, padded_output=value)


def test_repr_and_conversion_carry_it():
    layer = convert_batchnorm(nn.BatchNorm1d(3), **ZERO)
    assert "padded_output=zero" in repr(layer)
    assert copy.deepcopy(layer).padded_output == "zero"


def test_reverting_says_what_torchs_layer_lacks():
    with pytest.raises(ValueError, match="layer '0' has padded_output='zero'"):
        revert_batchnorm(nn.Sequential(BatchNorm1d(3, **ZERO)))


def test_folding_keeps_the_layer():
    model = nn.Sequential(nn.Conv1d(3, 3, 1), BatchNorm1d(3, **ZERO)).eval()
    assert "zeroes padded rows" in str(fold(model, torch.randn(2, 3, 4)))


def test_kernels_compute_it():
    layer, x = BatchNorm(3, **ZERO), torch.randn(4, 3, 5)
    assert "array code" not in str(explain(layer, x, mask=torch.ones(4, 5, dtype=torch.bool)))


class TestPaddingMask:
    """`padding_mask(..., padded_output=)`, for all layers inside."""

    X = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0))
    MASK = sequence_mask(torch.tensor([2, 5]), 5)

    def is_zero(self, layer: nn.Module, *mask: Tensor) -> bool:
        return torch.equal(layer(self.X, *mask)[0, :, 2:], torch.zeros(3, 3))

    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("backend", [None, "aot_eager"])
    def test_block_decides_and_ends(self, backend, training):
        layer = randomize(BatchNorm1d(3)).train(training)
        if backend:
            layer = torch.compile(layer, fullgraph=True, backend=backend)
        assert not self.is_zero(layer, self.MASK)
        for _ in range(2):
            with padding_mask(self.MASK, padded_output="zero"):
                assert self.is_zero(layer)
                assert self.is_zero(layer, self.MASK)
                with padding_mask(self.MASK, padded_output="normalize"):
                    assert not self.is_zero(layer)
                with padding_mask(self.MASK):  # says nothing, so that the outer block does
                    assert self.is_zero(layer)
            assert not self.is_zero(layer, self.MASK)

    def test_normalize_wins_over_the_layers_own(self):
        layer = randomize(BatchNorm1d(3, **ZERO))
        with padding_mask(self.MASK, padded_output="normalize"):
            assert not self.is_zero(layer)
        assert self.is_zero(layer, self.MASK)

    @pytest.mark.parametrize("explicit", [True, False], ids=["mask", "block's mask"])
    def test_recomputation_after_the_block_zeroes_too(self, explicit):
        layer, masks = randomize(BatchNorm1d(3)), (self.MASK,) if explicit else ()
        following = nn.Conv1d(3, 3, 3, padding=1)
        x = self.X.clone().requires_grad_()
        run = lambda x: following(layer(x, *masks)).square().sum()  # noqa: E731
        with padding_mask(None if explicit else self.MASK, padded_output="zero"):
            expected = torch.autograd.grad(run(x), x)[0]
            y = checkpoint(run, x, use_reentrant=False)
        assert torch.equal(torch.autograd.grad(y, x)[0], expected)

    def test_compiled_gradients_are_those_of_the_layers_own(self):
        layer, own = randomize(BatchNorm1d(3, fused=True)), BatchNorm1d(3, **ZERO)
        own.load_state_dict(layer.state_dict())
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        inputs = [self.X.clone().requires_grad_() for _ in range(2)]
        with padding_mask(self.MASK, padded_output="zero"):
            compiled(inputs[0]).square().sum().backward()
        own(inputs[1], self.MASK).square().sum().backward()
        torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-5, atol=1e-6)
