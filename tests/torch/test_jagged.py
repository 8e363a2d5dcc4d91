"""Jagged nested tensors: the packed values are the batch."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import Tensor

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, batch_norm

C = 3
ROWS = (4, 1, 5, 2)
TOTAL = sum(ROWS)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, count: int = TOTAL) -> None:
    """Equal up to the rounding of sums of `count` terms."""
    bound = 8 * math.sqrt(count) * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def offsets(rows: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *rows]).cumsum(0)


def jagged(*sizes: int, rows: tuple[int, ...] = ROWS, dtype: torch.dtype = torch.float32):
    """(N, ragged, *sizes), of random values."""
    values = torch.randn(sum(rows), *sizes, dtype=dtype)
    return torch.nested.nested_tensor_from_jagged(values, offsets(rows))


def like(x: Tensor, values: Tensor) -> Tensor:
    """A tensor as ragged as x, with other values."""
    return torch.nested.nested_tensor_from_jagged(values, x.offsets(), jagged_dim=x._ragged_idx)


def ragged_mask(x: Tensor) -> Tensor:
    """A jagged mask (N, ragged) with a real and a padded row at least."""
    real = torch.rand(TOTAL) > 0.4
    real[0], real[1] = True, False
    return like_rows(x, real)


def like_rows(x: Tensor, rows: Tensor) -> Tensor:
    return torch.nested.nested_tensor_from_jagged(rows, x.offsets())


def packed(x: Tensor) -> Tensor:
    """The values as (rows, channels), for channels on the last axis."""
    return x.values().reshape(-1, x.shape[-1])


class TestValues:
    def test_output_equals_that_of_the_packed_rows(self):
        x = jagged(C)
        assert torch.equal(BatchNorm(C, axis=-1)(x).values(), BatchNorm1d(C)(x.values()))

    def test_statistics_equal_those_of_the_packed_rows(self):
        x, layer, dense = jagged(C), BatchNorm(C, axis=-1), BatchNorm1d(C)
        layer(x)
        dense(x.values())
        assert torch.equal(layer.running_var, dense.running_var)

    def test_one_batch_is_counted(self):
        layer = BatchNorm(C, axis=-1)
        layer(jagged(C))
        assert layer.num_batches_tracked.item() == 1

    @pytest.mark.parametrize("axis", [2, -1, (2,)])
    def test_every_spelling_of_the_axis_is_the_same(self, axis):
        x = jagged(C)
        assert torch.equal(BatchNorm(C, axis=axis)(x).values(), BatchNorm1d(C)(x.values()))

    def test_channels_before_the_ragged_axis(self):
        x = jagged(C).transpose(1, 2)
        y = BatchNorm1d(C)(x)
        close(y.values().T, BatchNorm1d(C)(x.values().T))

    def test_channels_before_the_ragged_axis_keep_their_shape(self):
        x = jagged(C).transpose(1, 2)
        y = BatchNorm1d(C)(x)
        assert (y.shape, y._ragged_idx) == (x.shape, 2)

    def test_further_dense_axes_are_reduced(self):
        x = jagged(5, C)
        y = BatchNorm(C, axis=-1)(x)
        close(packed(y), BatchNorm1d(C)(packed(x)), TOTAL * 5)

    def test_channels_between_the_ragged_axis_and_a_dense_one(self):
        x = jagged(C, 5)
        y = BatchNorm(C, axis=2)(x)
        close(y.values(), BatchNorm1d(C)(x.values()), TOTAL * 5)

    def test_several_channel_axes(self):
        x = jagged(2, C)
        y = BatchNorm((2, C), axis=(2, 3))(x)
        close(y.values().flatten(1), BatchNorm1d(2 * C)(x.values().flatten(1)))

    def test_layer_of_rank_4_takes_images_of_ragged_height(self):
        x = jagged(5, C).transpose(1, 3).transpose(2, 3)  # (N, C, ragged, 5)
        expected = BatchNorm1d(C)(x.values().flatten(1).T).T.reshape(x.values().shape)
        close(BatchNorm2d(C)(x).values(), expected, TOTAL * 5)

    def test_function_takes_jagged_input(self):
        x = jagged(C)
        y = batch_norm(x, None, None, training=True, axis=-1)
        assert torch.equal(y.values(), batch_norm(x.values(), None, None, training=True))

    @pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )
    def test_output_has_the_inputs_type(self, dtype):
        x = jagged(C, dtype=dtype)
        assert BatchNorm(C, axis=-1).to(dtype)(x).dtype == dtype

    def test_result_can_be_added_to_the_input(self):
        x = jagged(C)
        y = BatchNorm(C, axis=-1)(x)
        assert torch.equal((x + y).values(), x.values() + y.values())

    def test_result_of_a_transposed_input_can_be_added_to_it(self):
        x = jagged(C).transpose(1, 2)
        y = BatchNorm1d(C)(x)
        assert torch.equal((x + y).values(), x.values() + y.values())

    def test_result_is_a_jagged_tensor_of_the_same_shape(self):
        x = jagged(C)
        y = BatchNorm(C, axis=-1)(x)
        assert (y.layout, y.shape) == (torch.jagged, x.shape)

    @pytest.mark.parametrize("mode", ["eval", "frozen"])
    def test_running_statistics_serve_evaluation(self, mode):
        x, layer = jagged(C), BatchNorm(C, axis=-1)
        layer(jagged(C))
        layer = layer.eval() if mode == "eval" else layer.freeze()
        expected = (x.values() - layer.running_mean) / torch.sqrt(layer.running_var + layer.eps)
        close(layer(x).values(), expected)

    def test_evaluation_changes_no_statistics(self):
        layer = BatchNorm(C, axis=-1).eval()
        layer(jagged(C))
        assert (layer.running_mean == 0).all()

    @pytest.mark.parametrize("activation", ["relu", "leaky_relu"])
    def test_activation_equals_that_of_the_packed_rows(self, activation):
        x = jagged(C)
        y = BatchNorm(C, axis=-1, activation=activation)(x)
        assert torch.equal(y.values(), BatchNorm1d(C, activation=activation)(x.values()))

    def test_residual_equals_that_of_the_packed_rows(self):
        x = jagged(C)
        residual = like(x, torch.randn(TOTAL, C))
        y = BatchNorm(C, axis=-1, activation="relu")(x, residual=residual)
        dense = BatchNorm1d(C, activation="relu")
        assert torch.equal(y.values(), dense(x.values(), residual=residual.values()))

    def test_residual_with_equal_lengths_of_its_own_is_taken(self):
        x, residual = jagged(C), jagged(C)
        y = BatchNorm(C, axis=-1)(x, residual=residual)
        assert torch.equal(y.values(), BatchNorm1d(C)(x.values(), residual=residual.values()))

    def test_renormalization_equals_that_of_the_packed_rows(self):
        x = jagged(C)
        y = BatchNorm(C, axis=-1, renorm=True)(x)
        assert torch.equal(y.values(), BatchNorm1d(C, renorm=True)(x.values()))


class TestGradients:
    @staticmethod
    def leaf() -> Tensor:
        return torch.nested.nested_tensor(
            [torch.randn(n, C) for n in ROWS], layout=torch.jagged, requires_grad=True
        )

    def test_gradient_reaches_the_nested_leaf(self):
        x, dy = self.leaf(), torch.randn(TOTAL, C)
        values = x.detach().values().clone().requires_grad_()
        (expected,) = torch.autograd.grad(BatchNorm1d(C)(values), values, dy)
        BatchNorm(C, axis=-1)(x).values().backward(dy)
        assert torch.equal(x.grad.values(), expected)

    def test_gradient_of_the_leaf_is_ragged_as_the_leaf(self):
        x = self.leaf()
        BatchNorm(C, axis=-1)(x).values().backward(torch.randn(TOTAL, C))
        assert x.grad.shape == x.shape

    def test_gradient_from_a_nested_cotangent(self):
        x, dy = self.leaf(), torch.randn(TOTAL, C)
        values = x.detach().values().clone().requires_grad_()
        (expected,) = torch.autograd.grad(BatchNorm1d(C)(values), values, dy)
        y = BatchNorm(C, axis=-1)(x)
        y.backward(like(y, dy))
        assert torch.equal(x.grad.values(), expected)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_parameter_gradients_equal_those_of_the_packed_rows(self, name):
        x, dy = jagged(C), torch.randn(TOTAL, C)
        layer, dense = BatchNorm(C, axis=-1), BatchNorm1d(C)
        layer(x).values().backward(dy)
        dense(x.values()).backward(dy)
        assert torch.equal(getattr(layer, name).grad, getattr(dense, name).grad)

    def test_gradient_through_a_transposed_view(self):
        x, dy = self.leaf(), torch.randn(TOTAL, C)
        values = x.detach().values().clone().requires_grad_()
        (expected,) = torch.autograd.grad(BatchNorm1d(C)(values), values, dy)
        BatchNorm1d(C)(x.transpose(1, 2)).values().backward(dy.T)
        close(x.grad.values(), expected)

    def test_masked_rows_have_no_gradient(self):
        x = self.leaf()
        mask = ragged_mask(x)
        BatchNorm(C, axis=-1)(x, mask=mask).values().backward(torch.randn(TOTAL, C))
        assert (x.grad.values()[~mask.values()] == 0).all()


class TestMasks:
    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32])
    def test_jagged_mask_equals_that_of_the_packed_rows(self, dtype):
        x = jagged(C)
        mask = ragged_mask(x)
        y = BatchNorm(C, axis=-1)(x, mask=like_rows(x, mask.values().to(dtype)))
        assert torch.equal(y.values(), BatchNorm1d(C)(x.values(), mask=mask.values()))

    def test_jagged_mask_of_equal_lengths_but_its_own_structure_is_taken(self):
        x, real = jagged(C), torch.arange(TOTAL) % 3 > 0
        mask = torch.nested.nested_tensor_from_jagged(real, offsets(ROWS))
        y = BatchNorm(C, axis=-1)(x, mask=mask)
        assert torch.equal(y.values(), BatchNorm1d(C)(x.values(), mask=real))

    def test_jagged_mask_of_a_transposed_input(self):
        x = jagged(C).transpose(1, 2)
        mask = ragged_mask(x)
        y = BatchNorm1d(C)(x, mask=mask)
        close(y.values().T, BatchNorm1d(C)(x.values().T, mask=mask.values()))

    SAMPLES = torch.tensor([True, False, True, False])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
    def test_mask_of_samples_marks_all_of_their_rows(self, dtype):
        x = jagged(C)
        rows = self.SAMPLES.repeat_interleave(torch.tensor(ROWS))
        y = BatchNorm(C, axis=-1)(x, mask=self.SAMPLES.to(dtype))
        assert torch.equal(y.values(), BatchNorm1d(C)(x.values(), mask=rows))

    def test_mask_of_samples_of_a_transposed_input(self):
        x = jagged(C).transpose(1, 2)
        rows = self.SAMPLES.repeat_interleave(torch.tensor(ROWS))
        y = BatchNorm1d(C)(x, mask=self.SAMPLES)
        close(y.values().T, BatchNorm1d(C)(x.values().T, mask=rows))

    def test_mask_of_samples_with_further_dense_axes(self):
        x = jagged(5, C)
        rows = self.SAMPLES.repeat_interleave(torch.tensor(ROWS) * 5)
        y = BatchNorm(C, axis=-1)(x, mask=self.SAMPLES)
        close(packed(y), BatchNorm1d(C)(packed(x), mask=rows), TOTAL * 5)

    def test_nan_in_padded_samples_reaches_no_real_row(self):
        x = jagged(C)
        rows = self.SAMPLES.repeat_interleave(torch.tensor(ROWS))
        expected = BatchNorm(C, axis=-1)(x, mask=self.SAMPLES).values()[rows]
        poisoned = like(x, torch.where(rows[:, None], x.values(), math.nan))
        y = BatchNorm(C, axis=-1)(poisoned, mask=self.SAMPLES)
        assert torch.equal(y.values()[rows], expected)

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
    def test_no_real_sample_leaves_statistics_unchanged(self, name):
        layer = BatchNorm(C, axis=-1)
        before = getattr(layer, name).clone()
        layer(jagged(C), mask=torch.zeros(len(ROWS), dtype=torch.bool))
        assert torch.equal(getattr(layer, name), before)


class TestErrors:
    @pytest.mark.parametrize("axis", [1, (1, 2), -2])
    def test_ragged_axis_as_channel_is_named(self, axis):
        features = (C, C) if isinstance(axis, tuple) else C
        with pytest.raises(ValueError, match="ragged axis 1"):
            BatchNorm(features, axis=axis)(jagged(C))

    def test_ragged_axis_as_channel_is_named_by_the_default_layer_too(self):
        with pytest.raises(ValueError, match="use axis=-1"):
            BatchNorm1d(C)(jagged(C))

    @pytest.mark.parametrize("axis", [1, (1, 2)])
    def test_ragged_axis_as_channel_is_named_by_the_function(self, axis):
        with pytest.raises(ValueError, match="ragged axis 1"):
            batch_norm(jagged(C), None, None, training=True, axis=axis)

    def test_batch_axis_as_channel_raises(self):
        with pytest.raises(ValueError, match="batch axis 0"):
            BatchNorm(len(ROWS), axis=0)(jagged(C))

    def test_ghost_batches_raise_in_training(self):
        layer = BatchNorm(C, axis=-1, virtual_batch_size=2)
        with pytest.raises(ValueError, match="jagged x takes neither virtual_batch_size"):
            layer(jagged(C))

    def test_adjustment_raises_in_training(self):
        layer = BatchNorm(C, axis=-1, adjustment=lambda shape: (1.0, 0.0))
        with pytest.raises(ValueError, match="nor adjustment"):
            layer(jagged(C))

    @pytest.mark.parametrize(
        "options",
        [{"virtual_batch_size": 2}, {"adjustment": lambda shape: (1.0, 0.0)}],
        ids=["ghost", "adjustment"],
    )
    @pytest.mark.parametrize("mode", ["eval", "frozen"])
    def test_option_for_training_only_does_not_hinder_evaluation(self, options, mode):
        x, layer = jagged(C), BatchNorm(C, axis=-1, **options)
        layer = layer.eval() if mode == "eval" else layer.freeze()
        close(layer(x).values(), x.values() / math.sqrt(1 + layer.eps))

    def test_dense_residual_raises(self):
        with pytest.raises(ValueError, match="residual must be jagged like x"):
            BatchNorm(C, axis=-1)(jagged(C), residual=torch.randn(TOTAL, C))

    def test_jagged_residual_of_a_dense_input_raises(self):
        with pytest.raises(ValueError, match="residual"):
            BatchNorm1d(C)(torch.randn(len(ROWS), C, 3), residual=jagged(C))

    def test_jagged_mask_of_a_dense_input_raises(self):
        x = jagged(C)
        with pytest.raises(ValueError, match="mask"):
            BatchNorm1d(C)(torch.randn(len(ROWS), C, 3), mask=ragged_mask(x))

    @pytest.mark.parametrize("name", ["mask", "residual"])
    def test_other_row_lengths_raise(self, name):
        rows = (1, 4, 5, 2)
        other = jagged(rows=rows) > 0 if name == "mask" else jagged(C, rows=rows)
        with pytest.raises(ValueError, match=f"{name} must be ragged like x"):
            BatchNorm(C, axis=-1)(jagged(C), **{name: other})

    @pytest.mark.parametrize("shape", [(TOTAL,), (3,), (4, 5), (4, 1, 1), ()])
    def test_dense_mask_of_another_shape_raises(self, shape):
        with pytest.raises(ValueError, match=r"shape \(4,\) for whole samples"):
            BatchNorm(C, axis=-1)(jagged(C), mask=torch.ones(shape, dtype=torch.bool))

    def test_floating_mask_is_a_type_error(self):
        with pytest.raises(TypeError, match="boolean or integer"):
            BatchNorm(C, axis=-1)(jagged(C), mask=torch.ones(len(ROWS)))

    def test_floating_jagged_mask_is_a_type_error(self):
        with pytest.raises(TypeError, match="boolean or integer"):
            BatchNorm(C, axis=-1)(jagged(C), mask=jagged())

    @pytest.mark.parametrize("mask", [[True] * 4, True])
    def test_mask_that_is_no_tensor_is_a_type_error(self, mask):
        with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
            BatchNorm(C, axis=-1)(jagged(C), mask=mask)

    def test_other_number_of_channels_raises(self):
        with pytest.raises(ValueError, match="num_features=4"):
            BatchNorm(4, axis=-1)(jagged(C))

    def test_one_row_in_all_raises_as_torch_does(self):
        with pytest.raises(ValueError, match="more than 1 value per channel"):
            BatchNorm(C, axis=-1)(jagged(C, rows=(0, 1)))

    def test_integer_values_are_a_type_error(self):
        x = torch.nested.nested_tensor_from_jagged(torch.ones(5, C).int(), torch.tensor([0, 2, 5]))
        with pytest.raises(TypeError, match="float16"):
            BatchNorm(C, axis=-1)(x)

    @pytest.mark.parametrize("call", ["layer", "function"])
    def test_nested_tensor_that_is_not_jagged_is_a_type_error(self, call):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's: strided nesting is a prototype
            x = torch.nested.nested_tensor([torch.randn(n, C) for n in ROWS])
        functions = {
            "layer": BatchNorm(C, axis=-1),
            "function": lambda x: batch_norm(x, None, None, training=True, axis=-1),
        }
        with pytest.raises(TypeError, match="jagged"):
            functions[call](x)

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
    def test_failed_forward_leaves_statistics_unchanged(self, name):
        layer = BatchNorm(C, axis=-1)
        before = getattr(layer, name).clone()
        with pytest.raises(ValueError, match="residual"):
            layer(jagged(C), residual=torch.randn(TOTAL, C))
        assert torch.equal(getattr(layer, name), before)


class TestEmpty:
    SOME = (2, 0, 3, 0)
    NONE = (0, 0, 0)

    def test_sample_without_rows_counts_for_nothing(self):
        x = jagged(C, rows=self.SOME)
        assert torch.equal(BatchNorm(C, axis=-1)(x).values(), BatchNorm1d(C)(x.values()))

    def test_sample_without_rows_stays_without(self):
        x = jagged(C, rows=self.SOME)
        assert torch.equal(BatchNorm(C, axis=-1)(x).offsets(), x.offsets())

    def test_mask_that_leaves_only_samples_without_rows_counts_as_empty(self):
        layer = BatchNorm(C, axis=-1)
        layer(jagged(C, rows=self.SOME), mask=torch.tensor([False, True, False, True]))
        assert layer.num_batches_tracked.item() == 0

    @pytest.mark.parametrize("training", [True, False])
    def test_nothing_but_samples_without_rows_gives_the_same(self, training):
        x = jagged(C, rows=self.NONE)
        y = BatchNorm(C, axis=-1).train(training)(x)
        assert (y.shape, y.values().shape) == (x.shape, (0, C))

    @pytest.mark.parametrize("name", ["running_mean", "running_var", "num_batches_tracked"])
    def test_nothing_but_samples_without_rows_leaves_statistics_unchanged(self, name):
        layer = BatchNorm(C, axis=-1)
        before = getattr(layer, name).clone()
        layer(jagged(C, rows=self.NONE))
        assert torch.equal(getattr(layer, name), before)

    @pytest.mark.parametrize("name", ["weight", "bias"])
    def test_nothing_but_samples_without_rows_gives_zero_gradients(self, name):
        layer = BatchNorm(C, axis=-1)
        layer(jagged(C, rows=self.NONE)).values().backward(torch.randn(0, C))
        assert (getattr(layer, name).grad == 0).all()


class TestHoles:
    """Views whose rows do not fill the buffer: the values in between must have no effect."""

    STARTS, LENGTHS = torch.tensor([0, 1, 2]), torch.tensor([2, 0, 3])

    def padded(self) -> tuple[Tensor, Tensor]:
        """(N, 5, C), and a mask of the rows that the view shows; the others are NaN."""
        position = torch.arange(5)
        real = (position >= self.STARTS[:, None]) & (
            position < (self.STARTS + self.LENGTHS)[:, None]
        )
        return torch.where(real[..., None], torch.randn(3, 5, C), math.nan), real

    def view(self, x: Tensor) -> Tensor:
        return torch.nested.narrow(x, 1, self.STARTS, self.LENGTHS, layout=torch.jagged)

    def test_view_does_have_holes(self):
        x, _ = self.padded()
        assert self.view(x).values().isnan().any()

    def test_output_is_that_of_the_visible_rows(self):
        x, real = self.padded()
        y = BatchNorm(C, axis=-1)(self.view(x))
        assert torch.equal(y.values(), BatchNorm1d(C)(x[real]))

    def test_output_has_the_rows_lengths(self):
        x, _ = self.padded()
        y = BatchNorm(C, axis=-1)(self.view(x))
        assert [len(row) for row in y.unbind()] == self.LENGTHS.tolist()

    def test_statistics_are_those_of_the_visible_rows(self):
        x, real = self.padded()
        layer, dense = BatchNorm(C, axis=-1), BatchNorm1d(C)
        layer(self.view(x))
        dense(x[real])
        assert torch.equal(layer.running_var, dense.running_var)

    def test_evaluation_normalizes_the_visible_rows(self):
        x, real = self.padded()
        layer = BatchNorm(C, axis=-1).eval()
        close(layer(self.view(x)).values(), x[real] / math.sqrt(1 + layer.eps))

    def test_gradient_reaches_the_visible_rows_alone(self):
        x, real = self.padded()
        x.requires_grad_()
        dy = torch.randn(int(real.sum()), C)
        rows = x.detach()[real].requires_grad_()
        expected = torch.zeros(3, 5, C)
        (expected[real],) = torch.autograd.grad(BatchNorm1d(C)(rows), rows, dy)
        BatchNorm(C, axis=-1)(self.view(x)).values().backward(dy)
        close(x.grad, expected)

    def test_residual_with_holes_is_added_row_by_row(self):
        x, real = self.padded()
        residual, _ = self.padded()
        y = BatchNorm(C, axis=-1)(self.view(x), residual=self.view(residual))
        assert torch.equal(y.values(), BatchNorm1d(C)(x[real], residual=residual[real]))

    def test_mask_with_holes_marks_row_by_row(self):
        x, real = self.padded()
        mask = torch.arange(15).reshape(3, 5) % 3 > 0
        y = BatchNorm(C, axis=-1)(self.view(x), mask=self.view(mask))
        assert torch.equal(y.values(), BatchNorm1d(C)(x[real], mask=mask[real]))

    def test_mask_of_samples_marks_visible_rows(self):
        x, real = self.padded()
        samples = torch.tensor([True, True, False])
        y = BatchNorm(C, axis=-1)(self.view(x), mask=samples)
        rows = samples[:, None].expand(3, 5)[real]
        assert torch.equal(y.values(), BatchNorm1d(C)(x[real], mask=rows))
