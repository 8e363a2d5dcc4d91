"""The explicit layer: every sentence of its description, one by one."""

from __future__ import annotations

import contextlib
import copy
import io
import math
import pickle

import pytest
import torch
from torch import Tensor

from batchnorm.torch.explicit import BatchNorm

SHAPES = pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 3, 4)], ids=str)
HALVES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
BATCH = 7
MASK = torch.tensor([True, False, True, True, False, True, True])


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def close(actual: Tensor, expected: Tensor, count: int = BATCH) -> None:
    """Equal up to the rounding of sums of `count` terms."""
    bound = 16 * math.sqrt(count) * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=bound, atol=bound)


def make(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64, **options) -> BatchNorm:
    """A layer with random parameters and statistics."""
    layer = BatchNorm(**options)
    layer.initialise_layer(input_shape=shape, data_type=dtype)
    for a in (layer.gamma, layer.beta, layer.running_mean, layer.running_var):
        a.uniform_(0.5, 2.0)
    return layer


def data(shape: tuple[int, ...] = (3,), dtype: torch.dtype = torch.float64) -> Tensor:
    return (torch.randn(BATCH, *shape, dtype=torch.float64) * 3 + 5).to(dtype)


def formula(x: Tensor, gamma: Tensor, beta: Tensor, eps: float = 1e-6) -> Tensor:
    """The training formula in torch's own operations: the unbiased variance of the batch."""
    mean = x.mean(0)
    var = (x - mean).square().sum(0) / (x.shape[0] - 1)
    return (x - mean) / torch.sqrt(var + eps) * gamma + beta


def by_running(layer: BatchNorm, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
    rstd = 1 / torch.sqrt(layer.running_var.clone() + 1e-6)
    return (x - layer.running_mean.clone()) * rstd * gamma + beta


def autograd(function, layer: BatchNorm, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """dx, dgamma and dbeta of function(x, gamma, beta)."""
    leaves = [a.clone().requires_grad_() for a in (x, layer.gamma, layer.beta)]
    return torch.autograd.grad(function(*leaves), leaves, dy)


class TestConstructor:
    def test_patience_is_0_9_by_default(self):
        assert BatchNorm().patience == 0.9

    @pytest.mark.parametrize("patience", [0.001, 0.5, 0.999])
    def test_patience_between_0_and_1_is_taken(self, patience):
        assert BatchNorm(patience).patience == patience

    @pytest.mark.parametrize("patience", [0, 1, 0.0, 1.0, -0.1, 1.1, math.nan, math.inf])
    def test_patience_outside_is_a_value_error(self, patience):
        with pytest.raises(ValueError, match="strictly between 0 and 1"):
            BatchNorm(patience)

    @pytest.mark.parametrize("patience", ["0.9", None, True, [0.9]])
    def test_patience_that_is_no_number_is_a_type_error(self, patience):
        with pytest.raises(TypeError, match="patience must be a number"):
            BatchNorm(patience)

    @pytest.mark.parametrize("reduction", ["average", "SUM", None, 1])
    def test_unknown_parameter_gradient_is_a_value_error(self, reduction):
        with pytest.raises(ValueError, match="parameter_gradient"):
            BatchNorm(parameter_gradient=reduction)

    def test_parameter_gradient_is_a_keyword(self):
        with pytest.raises(TypeError, match="positional"):
            BatchNorm(0.9, "mean")

    def test_unknown_padded_output_is_a_value_error(self):
        with pytest.raises(ValueError, match=r'padded_output must be "normalize" or "zero"; got 0'):
            BatchNorm(padded_output=0)

    def test_other_keywords_are_ignored(self):
        assert BatchNorm(0.9, learning_rate=1.0, units=3).patience == 0.9

    def test_epsilon_is_1e_6(self):
        assert BatchNorm().epsilon == 1e-6

    def test_name_is_the_originals(self):
        assert BatchNorm().name == "Batch normalisation"


class TestInitialise:
    STATE = pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])

    @STATE
    @SHAPES
    def test_every_tensor_has_the_whole_shape(self, name, shape):
        assert getattr(make(shape), name).shape == shape

    @pytest.mark.parametrize(
        ("name", "value"), [("gamma", 1), ("beta", 0), ("running_mean", 0), ("running_var", 1)]
    )
    def test_initial_values(self, name, value):
        layer = BatchNorm()
        layer.initialise_layer(input_shape=(3,))
        assert (getattr(layer, name) == value).all()

    @SHAPES
    def test_nparams_is_twice_the_product(self, shape):
        assert make(shape).nparams == 2 * math.prod(shape)

    @SHAPES
    def test_output_shape_is_input_shape(self, shape):
        assert make(shape).output_shape == shape

    @STATE
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_wide_data_type_is_everybodys(self, name, dtype):
        assert getattr(make(dtype=dtype), name).dtype == dtype

    @HALVES
    @pytest.mark.parametrize("name", ["gamma", "beta"])
    def test_half_data_type_is_the_parameters(self, name, dtype):
        assert getattr(make(dtype=dtype), name).dtype == dtype

    @HALVES
    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_half_data_type_leaves_running_buffers_float32(self, name, dtype):
        assert getattr(make(dtype=dtype), name).dtype == torch.float32

    @STATE
    def test_device_is_that_asked_for(self, name):
        layer = BatchNorm()
        layer.initialise_layer(input_shape=(3,), device="meta")
        assert getattr(layer, name).device.type == "meta"

    def test_arguments_are_keywords(self):
        with pytest.raises(TypeError, match="positional"):
            BatchNorm().initialise_layer((3,))

    @pytest.mark.parametrize("shape", [(3.0,), "ab", (None,), None])
    def test_shape_that_is_no_sequence_of_sizes_is_a_type_error(self, shape):
        with pytest.raises(TypeError, match=r"input_shape|iterable"):
            BatchNorm().initialise_layer(input_shape=shape)

    @pytest.mark.parametrize("dtype", [torch.int32, torch.complex64, "float32", float])
    def test_data_type_that_is_not_floating_is_a_type_error(self, dtype):
        with pytest.raises(TypeError, match="data_type"):
            BatchNorm().initialise_layer(input_shape=(3,), data_type=dtype)

    def test_initialising_again_forgets_the_pass(self):
        layer = make()
        layer.forward(data(), training=True)
        layer.initialise_layer(input_shape=(3,))
        with pytest.raises(RuntimeError, match="forward pass"):
            layer.backward(data())

    @pytest.mark.parametrize(
        "call",
        [lambda b: b.forward(data()), lambda b: b.get_parameters(), lambda b: b.summary()],
        ids=["forward", "get_parameters", "summary"],
    )
    def test_use_before_is_a_runtime_error(self, call):
        with pytest.raises(RuntimeError, match="initialise_layer"):
            call(BatchNorm())


class TestForward:
    @SHAPES
    def test_training_uses_the_unbiased_variance(self, shape):
        layer, x = make(shape), data(shape)
        close(layer.forward(x, training=True), formula(x, layer.gamma, layer.beta))

    def test_hand_worked_numbers(self):
        layer = make((1,))
        layer.gamma.fill_(3.0)
        layer.beta.fill_(1.0)
        y = layer.forward(torch.tensor([[0.0], [2.0]], dtype=torch.float64), training=True)
        root = 3 / math.sqrt(2 + 1e-6)
        close(y, torch.tensor([[1 - root], [1 + root]], dtype=torch.float64))

    def test_images_have_statistics_for_every_pixel(self):
        layer, x = make((2, 4, 4)), data((2, 4, 4))
        layer.gamma.fill_(1.0)
        layer.beta.fill_(0.0)
        y = layer.forward(x, training=True)
        close(y.mean(0), torch.zeros(2, 4, 4, dtype=torch.float64))

    @SHAPES
    def test_evaluation_uses_the_running_statistics(self, shape):
        layer, x = make(shape), data(shape)
        close(layer.forward(x), by_running(layer, x, layer.gamma, layer.beta))

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_evaluation_changes_no_statistics(self, name):
        layer = make()
        before = getattr(layer, name).clone()
        layer.forward(data())
        assert torch.equal(getattr(layer, name), before)

    @SHAPES
    def test_training_moves_the_mean(self, shape):
        layer, x = make(shape, patience=0.75), data(shape)
        expected = 0.75 * layer.running_mean + 0.25 * x.mean(0)
        layer.forward(x, training=True)
        close(layer.running_mean, expected)

    @SHAPES
    def test_training_stores_the_unbiased_variance(self, shape):
        layer, x = make(shape, patience=0.75), data(shape)
        expected = 0.75 * layer.running_var + 0.25 * x.var(0, correction=1)
        layer.forward(x, training=True)
        close(layer.running_var, expected)

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_running_buffers_are_updated_in_place(self, name):
        layer = make()
        buffer, address = getattr(layer, name), getattr(layer, name).data_ptr()
        layer.forward(data(), training=True)
        assert getattr(layer, name) is buffer
        assert buffer.data_ptr() == address

    @pytest.mark.parametrize("training", [True, False])
    def test_no_graph_is_recorded(self, training):
        assert not make().forward(data().requires_grad_(), training=training).requires_grad

    @pytest.mark.parametrize("training", [True, False])
    def test_input_is_not_changed(self, training):
        x = data()
        before = x.clone()
        make().forward(x, training=training)
        assert torch.equal(x, before)

    def test_evaluation_is_the_default(self):
        layer, x = make(), data()
        assert torch.equal(layer.forward(x), layer.forward(x, training=False))

    def test_other_keywords_are_ignored(self):
        layer, x = make(), data()
        assert torch.equal(layer.forward(x, step=3, verbose=True), layer.forward(x))

    @pytest.mark.parametrize("x", [[[1.0, 2.0, 3.0]], None, 1.0, "input"])
    def test_input_that_is_no_tensor_is_a_type_error(self, x):
        with pytest.raises(TypeError, match="input must be a"):
            make().forward(x)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_input_that_is_not_floating_is_a_type_error(self, dtype):
        with pytest.raises(TypeError, match="input must be float16"):
            make().forward(torch.ones(BATCH, 3, dtype=dtype))

    @pytest.mark.parametrize("training", [1, 0, None, "yes", torch.tensor(True)])
    def test_training_that_is_no_bool_is_a_type_error(self, training):
        with pytest.raises(TypeError, match="training must be True or False"):
            make().forward(data(), training=training)

    @pytest.mark.parametrize("shape", [(3,), (7, 4), (7, 3, 1), (7,), ()])
    @pytest.mark.parametrize("training", [True, False])
    def test_another_shape_is_a_value_error(self, shape, training):
        with pytest.raises(ValueError, match=r"\(N, \*\(3,\)\)"):
            make().forward(torch.randn(shape), training=training)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_batch_below_2_in_training_is_a_value_error(self, batch):
        with pytest.raises(ValueError, match=rf"at least 2; got {batch}"):
            make().forward(torch.randn(batch, 3), training=True)

    @pytest.mark.parametrize("batch", [0, 1])
    def test_batch_below_2_in_evaluation_is_fine(self, batch):
        layer, x = make(), data()[:batch]
        close(layer.forward(x), by_running(layer, x, layer.gamma, layer.beta))

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    @pytest.mark.parametrize(
        "arguments",
        [
            {"input": torch.ones(1, 3)},
            {"input": torch.ones(7, 4)},
            {"input": torch.ones(7, 3), "mask": torch.ones(6, dtype=torch.bool)},
            {"input": torch.ones(7, 3), "mask": torch.ones(7)},
        ],
        ids=["batch of 1", "shape", "mask shape", "mask type"],
    )
    def test_failed_training_leaves_statistics_unchanged(self, arguments, name):
        layer = make()
        before = getattr(layer, name).clone()
        with contextlib.suppress(ValueError, TypeError):
            layer.forward(training=True, **arguments)
        assert torch.equal(getattr(layer, name), before)


class TestBackward:
    @SHAPES
    @pytest.mark.parametrize("index", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
    def test_training_gradient_equals_autograds(self, shape, index):
        layer, x, dy = make(shape), data(shape), torch.randn(BATCH, *shape, dtype=torch.float64)
        expected = autograd(formula, layer, x, dy)
        layer.forward(x, training=True)
        found = (layer.backward(dy), layer.gamma.grad, layer.beta.grad)
        close(found[index], expected[index])

    @SHAPES
    @pytest.mark.parametrize("index", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
    def test_evaluation_gradient_equals_autograds(self, shape, index):
        layer, x, dy = make(shape), data(shape), torch.randn(BATCH, *shape, dtype=torch.float64)
        expected = autograd(lambda *a: by_running(layer, *a), layer, x, dy)
        layer.forward(x)
        found = (layer.backward(dy), layer.gamma.grad, layer.beta.grad)
        close(found[index], expected[index])

    @pytest.mark.parametrize("training", [True, False])
    @pytest.mark.parametrize("masked", [True, False])
    def test_dx_equals_finite_differences(self, training, masked):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        mask = MASK if masked else None
        rows = MASK[:, None] if masked else torch.ones(BATCH, 1, dtype=torch.bool)
        direction = torch.randn_like(x) * rows  # the padded rows are constants
        step = 1e-5

        def loss(x: Tensor) -> Tensor:
            y = copy.deepcopy(layer).forward(x, training=training, mask=mask)
            return (torch.where(rows, y, 0.0) * dy).sum()

        slope = (loss(x + step * direction) - loss(x - step * direction)) / (2 * step)
        layer.forward(x, training=training, mask=mask)
        found = (layer.backward(dy) * direction).sum()
        # Truncation step² and rounding eps/step, for terms of order one.
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-8)

    @pytest.mark.parametrize("name", ["gamma", "beta"])
    def test_parameter_gradient_equals_finite_differences(self, name):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        direction, step = torch.randn(3, dtype=torch.float64), 1e-5

        def loss(sign: int) -> Tensor:
            moved = copy.deepcopy(layer)
            getattr(moved, name).add_(sign * step * direction)
            return (moved.forward(x, training=True) * dy).sum()

        slope = (loss(1) - loss(-1)) / (2 * step)
        layer.forward(x, training=True)
        layer.backward(dy)
        found = (getattr(layer, name).grad * direction).sum()
        torch.testing.assert_close(found, slope, rtol=1e-8, atol=1e-8)

    def test_gradient_of_a_batch_of_1_in_evaluation(self):
        layer, dy = make(), torch.randn(1, 3, dtype=torch.float64)
        layer.forward(data()[:1])
        close(layer.backward(dy), dy * layer.gamma / torch.sqrt(layer.running_var + 1e-6))

    def test_gradient_of_an_empty_batch_in_evaluation(self):
        layer = make()
        layer.forward(data()[:0])
        assert layer.backward(torch.zeros(0, 3, dtype=torch.float64)).shape == (0, 3)

    @pytest.mark.parametrize("mode", ["sum", "mean"])
    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    @pytest.mark.parametrize("training", [True, False])
    def test_parameter_gradient_is_the_sum_or_the_mean_over_the_batch(
        self, mode, parameter, training
    ):
        true, layer = make(), make(parameter_gradient=mode)
        layer.gamma.copy_(true.gamma)
        layer.running_mean.copy_(true.running_mean)
        layer.running_var.copy_(true.running_var)
        x, dy = data(), torch.randn(BATCH, 3, dtype=torch.float64)
        for one in (true, layer):
            one.forward(x, training=training)
            one.backward(dy)
        divisor = BATCH if mode == "mean" else 1
        close(getattr(layer, parameter).grad, getattr(true, parameter).grad / divisor)

    def test_dx_does_not_depend_on_the_parameter_gradient(self):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        twin = copy.deepcopy(layer)
        twin.parameter_gradient = "mean"
        layer.forward(x, training=True)
        twin.forward(x, training=True)
        assert torch.equal(twin.backward(dy), layer.backward(dy))

    @pytest.mark.parametrize(
        ("mask", "rows"),
        [
            (MASK, [5, 5, 5]),
            (MASK.int(), [5, 5, 5]),
            (MASK[:, None], [5, 5, 5]),
            (torch.stack([MASK, ~MASK, MASK | True], 1), [5, 2, 7]),
            (torch.tensor([[True, True, True]]), [7, 7, 7]),
            (torch.tensor([[True]]), [7, 7, 7]),
        ],
        ids=["(N,)", "int", "(N, 1)", "(N, C)", "(1, C)", "(1, 1)"],
    )
    @pytest.mark.parametrize("training", [True, False])
    def test_mean_divides_by_the_number_of_real_rows(self, mask, rows, training):
        layer, dy = make(parameter_gradient="mean"), torch.randn(BATCH, 3, dtype=torch.float64)
        layer.forward(data(), training=training, mask=mask)
        layer.backward(dy)
        real = (mask if mask.dim() == 2 else mask[:, None]).bool().expand(BATCH, 3)
        expected = torch.where(real, dy, 0.0).sum(0) / torch.tensor(rows, dtype=torch.float64)
        close(layer.beta.grad, expected)

    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    def test_missing_gradient_is_created(self, parameter):
        layer = make()
        layer.forward(data(), training=True)
        assert getattr(layer, parameter).grad is None
        layer.backward(data())
        assert getattr(layer, parameter).grad.shape == (3,)

    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    def test_gradient_is_added_to_the_one_there_in_place(self, parameter):
        layer, dy = make(), torch.randn(BATCH, 3, dtype=torch.float64)
        layer.forward(data(), training=True)
        layer.backward(dy)
        there = getattr(layer, parameter).grad
        once = there.clone()
        layer.backward(dy)
        assert getattr(layer, parameter).grad is there
        assert torch.equal(there, 2 * once)

    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    def test_gradients_of_several_passes_add_up(self, parameter):
        layer, (x, z) = make(), (data(), data())
        dx, dz = torch.randn(2, BATCH, 3, dtype=torch.float64)
        index = ("gamma", "beta").index(parameter) + 1
        expected = autograd(formula, layer, x, dx)[index] + autograd(formula, layer, z, dz)[index]
        for a, dy in ((x, dx), (z, dz)):
            layer.forward(a, training=True)
            layer.backward(dy)
        close(getattr(layer, parameter).grad, expected)

    def test_before_any_forward_pass_is_a_runtime_error(self):
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            make().backward(data())

    @pytest.mark.parametrize("dy", [[[1.0]], None, 1.0])
    def test_gradient_that_is_no_tensor_is_a_type_error(self, dy):
        layer = make()
        layer.forward(data())
        with pytest.raises(TypeError, match="dCdy must be a"):
            layer.backward(dy)

    @pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
    def test_gradient_that_is_not_floating_is_a_type_error(self, dtype):
        layer = make()
        layer.forward(data())
        with pytest.raises(TypeError, match="dCdy must be float16"):
            layer.backward(torch.ones(BATCH, 3, dtype=dtype))

    @pytest.mark.parametrize("shape", [(3,), (6, 3), (7, 4), (7, 3, 1), (1, 3), ()])
    def test_gradient_of_another_shape_is_a_value_error(self, shape):
        layer = make()
        layer.forward(data())
        with pytest.raises(ValueError, match=r"output's shape \(7, 3\)"):
            layer.backward(torch.randn(shape))

    def test_refused_gradient_leaves_parameters_without_one(self):
        layer = make()
        layer.forward(data())
        with pytest.raises(ValueError, match="shape"):
            layer.backward(torch.randn(6, 3))
        assert layer.gamma.grad is None

    def test_other_keywords_are_ignored(self):
        layer, dy = make(), data()
        layer.forward(data(), training=True)
        assert torch.equal(layer.backward(dy, step=3), layer.backward(dy))

    def test_dx_carries_no_graph(self):
        layer = make()
        layer.forward(data(), training=True)
        assert not layer.backward(data().requires_grad_()).requires_grad

    def test_cotangent_is_not_changed(self):
        layer, dy = make(), data()
        before = dy.clone()
        layer.forward(data(), training=True)
        layer.backward(dy)
        assert torch.equal(dy, before)


class TestWhichPass:
    """backward differentiates the latest forward pass, with the values of that pass."""

    def test_evaluation_after_training_gives_the_gradient_of_evaluation(self):
        layer, dy = make(), torch.randn(BATCH, 3, dtype=torch.float64)
        layer.forward(data(), training=True)
        layer.forward(data())
        close(layer.backward(dy), dy * layer.gamma / torch.sqrt(layer.running_var + 1e-6))

    def test_training_after_evaluation_gives_the_gradient_of_training(self):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        expected, _, _ = autograd(formula, layer, x, dy)
        layer.forward(data())
        layer.forward(x, training=True)
        close(layer.backward(dy), expected)

    @pytest.mark.parametrize(
        "arguments",
        [
            {"input": None},
            {"input": torch.ones(1, 3), "training": True},
            {"input": torch.ones(7, 4)},
            {"input": torch.ones(7, 3), "training": 1},
            {"input": torch.ones(7, 3), "mask": torch.ones(6, dtype=torch.bool)},
            {"input": torch.ones(7, 3), "mask": torch.ones(7)},
        ],
        ids=["type", "batch of 1", "shape", "training", "mask shape", "mask type"],
    )
    def test_failed_forward_leaves_no_pass_to_use(self, arguments):
        layer = make()
        layer.forward(data(), training=True)
        with contextlib.suppress(ValueError, TypeError):
            layer.forward(**arguments)
        with pytest.raises(RuntimeError, match="needs a forward pass"):
            layer.backward(data())

    CHANGES = pytest.mark.parametrize(
        "change",
        [
            lambda layer, x, mask, y: x.fill_(99.0),
            lambda layer, x, mask, y: y.fill_(99.0),
            lambda layer, x, mask, y: mask.fill_(True),
            lambda layer, x, mask, y: layer.gamma.fill_(99.0),
            lambda layer, x, mask, y: layer.beta.fill_(99.0),
            lambda layer, x, mask, y: layer.running_mean.fill_(99.0),
            lambda layer, x, mask, y: layer.running_var.fill_(99.0),
        ],
        ids=["input", "output", "mask", "gamma", "beta", "running_mean", "running_var"],
    )

    @CHANGES
    @pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
    @pytest.mark.parametrize("index", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
    def test_change_in_place_between_the_passes_changes_no_gradient(
        self, change, training, dtype, index
    ):
        layer, x, mask = make(dtype=dtype), data(dtype=dtype), MASK.clone()
        twin, dy = copy.deepcopy(layer), torch.randn(BATCH, 3, dtype=dtype)
        twin.forward(x, training=training, mask=mask)
        expected = (twin.backward(dy), twin.gamma.grad, twin.beta.grad)
        y = layer.forward(x, training=training, mask=mask)
        change(layer, x, mask, y)
        found = (layer.backward(dy), layer.gamma.grad, layer.beta.grad)
        assert torch.equal(found[index], expected[index])

    def test_optimizers_step_between_the_passes_does_not_change_dx(self):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        layer.forward(x, training=True)
        expected = layer.backward(dy)
        torch.optim.SGD(layer.get_parameters(), lr=0.5).step()
        assert torch.equal(layer.backward(dy), expected)


class TestParameters:
    def test_gamma_then_beta(self):
        layer = make()
        gamma, beta = layer.get_parameters()
        assert gamma is layer.gamma
        assert beta is layer.beta

    def test_always_the_same_two_tensors(self):
        layer = make()
        before = layer.get_parameters()
        layer.forward(data(), training=True)
        layer.backward(data())
        assert all(a is b for a, b in zip(layer.get_parameters(), before, strict=True))

    def test_optimizer_updates_the_layer_in_place(self):
        layer, dy = make(), torch.randn(BATCH, 3, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.get_parameters(), lr=0.1)
        layer.forward(data(), training=True)
        layer.backward(dy)
        expected = layer.beta - 0.1 * dy.sum(0)
        optimizer.step()
        close(layer.beta, expected)

    def test_forward_after_a_step_uses_the_new_parameters(self):
        layer, x = make(), data()
        optimizer = torch.optim.SGD(layer.get_parameters(), lr=0.1)
        layer.forward(x, training=True)
        layer.backward(torch.randn(BATCH, 3, dtype=torch.float64))
        optimizer.step()
        close(layer.forward(x, training=True), formula(x, layer.gamma, layer.beta))

    def test_descent_lowers_the_cost(self):
        layer, x, target = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.get_parameters(), lr=0.05)
        costs = []
        for _ in range(50):
            optimizer.zero_grad()
            error = layer.forward(x, training=True) - target
            costs.append(error.square().sum())
            layer.backward(2 * error)
            optimizer.step()
        assert costs[-1] < 0.5 * costs[0]

    def test_zero_grad_of_an_optimizer_makes_backward_start_anew(self):
        layer, dy = make(), torch.randn(BATCH, 3, dtype=torch.float64)
        optimizer = torch.optim.SGD(layer.get_parameters(), lr=0.1)
        layer.forward(data(), training=True)
        layer.backward(dy)
        optimizer.zero_grad()
        layer.backward(dy)
        close(layer.beta.grad, dy.sum(0))

    @SHAPES
    def test_summary_is_one_line_with_the_offset(self, shape):
        summary = make(shape).summary(offset="  > ")
        assert summary.startswith("  > Batch normalisation")
        assert "\n" not in summary

    def test_summary_needs_no_offset(self):
        assert make().summary().startswith("Batch normalisation")


class TestHalf:
    DTYPES = pytest.mark.parametrize(
        "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str
    )

    @DTYPES
    @pytest.mark.parametrize("training", [True, False])
    def test_output_has_the_inputs_type(self, dtype, training):
        assert make(dtype=dtype).forward(data(dtype=dtype), training=training).dtype == dtype

    @DTYPES
    @pytest.mark.parametrize("training", [True, False])
    def test_dx_has_the_inputs_type(self, dtype, training):
        layer = make(dtype=dtype)
        layer.forward(data(dtype=dtype), training=training)
        assert layer.backward(data(dtype=dtype)).dtype == dtype

    @DTYPES
    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    def test_parameter_gradients_have_the_parameters_type(self, dtype, parameter):
        layer = make(dtype=dtype)
        layer.forward(data(dtype=dtype), training=True)
        layer.backward(data(dtype=dtype))
        assert getattr(layer, parameter).grad.dtype == dtype

    @HALVES
    @pytest.mark.parametrize("training", [True, False])
    def test_output_is_the_wide_result_rounded_once(self, dtype, training):
        layer, x = make(dtype=dtype), data(dtype=dtype)
        wide = make()
        for name in ("gamma", "beta", "running_mean", "running_var"):
            getattr(wide, name).copy_(getattr(layer, name))
        expected = wide.forward(x.double(), training=training).to(dtype)
        torch.testing.assert_close(
            layer.forward(x, training=training), expected, rtol=torch.finfo(dtype).eps, atol=1e-6
        )

    @HALVES
    def test_running_statistics_keep_float32_digits(self, dtype):
        layer, x = make(dtype=dtype), data(dtype=dtype)
        expected = 0.9 * layer.running_mean + 0.1 * x.float().mean(0)
        layer.forward(x, training=True)
        close(layer.running_mean, expected)

    def test_large_float16_values_overflow_nothing(self):
        layer = make(dtype=torch.float16)
        x = torch.tensor([[60000.0] * 3, [-60000.0] * 3], dtype=torch.float16)
        assert layer.forward(x, training=True).isfinite().all()

    def test_float32_at_a_large_offset_keeps_its_digits(self):
        layer, x = make(dtype=torch.float32), data(dtype=torch.float32) + 1e6
        expected = formula(x.double(), layer.gamma.double(), layer.beta.double())
        found = layer.forward(x, training=True)
        torch.testing.assert_close(found.double(), expected, rtol=5e-5, atol=5e-5)  # S3

    def test_double_input_to_a_float32_layer_is_computed_in_double(self):
        layer, x = make(dtype=torch.float32), data()
        expected = formula(x, layer.gamma.double(), layer.beta.double())
        close(layer.forward(x, training=True), expected)


class TestMasks:
    FORMS = pytest.mark.parametrize(
        "mask",
        [MASK, MASK.int(), MASK.to(torch.uint64), MASK[:, None], MASK[:, None].expand(-1, 3)],
        ids=["bool", "int32", "uint64", "(N, 1)", "(N, C)"],
    )

    @FORMS
    def test_real_rows_of_the_output_equal_the_packed_ones(self, mask):
        layer, x = make(), data()
        expected = copy.deepcopy(layer).forward(x[MASK], training=True)
        close(layer.forward(x, training=True, mask=mask)[MASK], expected)

    @FORMS
    @pytest.mark.parametrize("training", [True, False])
    def test_dx_equals_the_packed_one_and_is_zero_elsewhere(self, mask, training):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        packed = copy.deepcopy(layer)
        packed.forward(x[MASK], training=training)
        expected = torch.zeros_like(x)
        expected[MASK] = packed.backward(dy[MASK])
        layer.forward(x, training=training, mask=mask)
        close(layer.backward(dy), expected)

    @FORMS
    @pytest.mark.parametrize("parameter", ["gamma", "beta"])
    def test_parameter_gradients_equal_the_packed_ones(self, mask, parameter):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        packed = copy.deepcopy(layer)
        packed.forward(x[MASK], training=True)
        packed.backward(dy[MASK])
        layer.forward(x, training=True, mask=mask)
        layer.backward(dy)
        close(getattr(layer, parameter).grad, getattr(packed, parameter).grad)

    @FORMS
    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_running_statistics_equal_the_packed_ones(self, mask, name):
        layer, x = make(), data()
        packed = copy.deepcopy(layer)
        packed.forward(x[MASK], training=True)
        layer.forward(x, training=True, mask=mask)
        close(getattr(layer, name), getattr(packed, name))

    @pytest.mark.parametrize("poison", [math.nan, math.inf, 1e300])
    def test_poison_in_padding_reaches_no_real_row(self, poison):
        layer, x = make(), data()
        expected = copy.deepcopy(layer).forward(x, training=True, mask=MASK)[MASK]
        x[~MASK] = poison
        assert torch.equal(layer.forward(x, training=True, mask=MASK)[MASK], expected)

    @pytest.mark.parametrize("poison", [math.nan, math.inf])
    @pytest.mark.parametrize("training", [True, False])
    def test_poison_in_padding_reaches_no_gradient(self, poison, training):
        layer, x, dy = make(), data(), torch.randn(BATCH, 3, dtype=torch.float64)
        x[~MASK] = poison
        dy[~MASK] = poison
        layer.forward(x, training=training, mask=MASK)
        found = torch.cat([layer.backward(dy), layer.gamma.grad[None], layer.beta.grad[None]])
        assert found.isfinite().all()

    def test_padded_rows_of_the_output_are_finite(self):
        assert make().forward(data(), training=True, mask=MASK).isfinite().all()

    NONE = torch.zeros(BATCH, dtype=torch.bool)

    @pytest.mark.parametrize("name", ["running_mean", "running_var"])
    def test_no_real_row_leaves_running_statistics_unchanged(self, name):
        layer = make()
        before = getattr(layer, name).clone()
        layer.forward(data(), training=True, mask=self.NONE)
        assert torch.equal(getattr(layer, name), before)

    def test_no_real_row_normalizes_by_the_running_statistics(self):
        layer, x = make(), data()
        expected = by_running(layer, x, layer.gamma, layer.beta)
        close(layer.forward(x, training=True, mask=self.NONE), expected)

    @pytest.mark.parametrize("reduction", ["sum", "mean"])
    @pytest.mark.parametrize("index", [0, 1, 2], ids=["dx", "dgamma", "dbeta"])
    @pytest.mark.parametrize("training", [True, False])
    def test_no_real_row_gives_zero_gradients(self, reduction, index, training):
        layer = make(parameter_gradient=reduction)
        layer.forward(data(), training=training, mask=self.NONE)
        found = (layer.backward(data()), layer.gamma.grad, layer.beta.grad)
        assert (found[index] == 0).all()

    ONE = torch.arange(BATCH) == 2

    def test_one_real_row_comes_out_as_beta(self):
        layer = make()
        assert torch.equal(layer.forward(data(), training=True, mask=self.ONE)[2], layer.beta)

    def test_one_real_row_has_no_gradient(self):
        layer = make()
        layer.forward(data(), training=True, mask=self.ONE)
        assert (layer.backward(data()) == 0).all()

    def test_one_real_row_leaves_every_output_finite(self):
        assert make().forward(data(), training=True, mask=self.ONE).isfinite().all()

    def test_one_real_row_stores_variance_0(self):
        layer = make(patience=0.75)
        expected = 0.75 * layer.running_var
        layer.forward(data(), training=True, mask=self.ONE)
        close(layer.running_var, expected)

    @pytest.mark.parametrize("pixel", [(0, 0), (1, 2)])
    def test_masks_of_pixels_give_each_pixel_its_own_rows(self, pixel):
        layer, x = make((2, 3)), data((2, 3))
        mask = torch.rand(BATCH, 2, 3) > 0.4
        y = layer.forward(x, training=True, mask=mask)
        rows = mask[(slice(None), *pixel)]
        one = formula(x[(slice(None), *pixel)][rows], layer.gamma[pixel], layer.beta[pixel])
        close(y[(slice(None), *pixel)][rows], one)

    def test_masks_of_pixels_zero_dx_where_they_are_false(self):
        layer, mask = make((2, 3)), torch.rand(BATCH, 2, 3) > 0.4
        layer.forward(data((2, 3)), training=True, mask=mask)
        assert (layer.backward(data((2, 3)))[~mask] == 0).all()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.complex64])
    def test_mask_of_another_type_is_a_type_error(self, dtype):
        with pytest.raises(TypeError, match="mask must be boolean or integer"):
            make().forward(data(), mask=MASK.to(dtype))

    def test_mask_that_is_no_tensor_is_a_type_error(self):
        with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor"):
            make().forward(data(), mask=MASK.tolist())

    @pytest.mark.parametrize("shape", [(3,), (6,), (), (6, 3), (7, 2), (7, 3, 1)])
    @pytest.mark.parametrize("training", [True, False])
    def test_mask_of_another_shape_is_a_value_error(self, shape, training):
        with pytest.raises(ValueError, match="mask must have shape"):
            make().forward(data(), training=training, mask=torch.ones(shape, dtype=torch.bool))

    @pytest.mark.parametrize("training", [True, False])
    def test_zeroed_padding_is_0_and_changes_nothing_else(self, training):
        zeroed, other = make(padded_output="zero"), make()
        for name in ("gamma", "beta", "running_mean", "running_var"):
            getattr(zeroed, name).copy_(getattr(other, name))
        x = data()
        x[~MASK] = math.nan
        found, expected = (a.forward(x, training=training, mask=MASK) for a in (zeroed, other))
        assert torch.equal(found[~MASK], torch.zeros(2, 3, dtype=torch.float64))
        assert torch.equal(found[MASK], expected[MASK])
        dy = data()
        assert torch.equal(zeroed.backward(dy), other.backward(dy))


def pickled(layer: BatchNorm) -> BatchNorm:
    return pickle.loads(pickle.dumps(layer))


def saved(layer: BatchNorm) -> BatchNorm:
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


class TestCopies:
    COPIES = pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled, saved])

    @COPIES
    def test_copy_computes_the_same(self, duplicate):
        layer, x = make(), data()
        assert torch.equal(duplicate(layer).forward(x), layer.forward(x))

    @COPIES
    @pytest.mark.parametrize("training", [True, False])
    def test_copy_taken_between_the_passes_gives_the_same_gradient(self, duplicate, training):
        layer, dy = make(), torch.randn(BATCH, 3, dtype=torch.float64)
        layer.forward(data(), training=training, mask=MASK)
        assert torch.equal(duplicate(layer).backward(dy), layer.backward(dy))

    @COPIES
    @pytest.mark.parametrize("name", ["gamma", "beta", "running_mean", "running_var"])
    def test_copy_shares_no_memory(self, duplicate, name):
        layer = make()
        twin = duplicate(layer)
        before = getattr(layer, name).clone()
        getattr(twin, name).fill_(9.0)
        assert torch.equal(getattr(layer, name), before)

    @COPIES
    def test_copy_keeps_its_settings(self, duplicate):
        twin = duplicate(make((2, 3), patience=0.7, parameter_gradient="mean"))
        assert (twin.patience, twin.parameter_gradient, twin.input_shape, twin.nparams) == (
            0.7,
            "mean",
            (2, 3),
            12,
        )

    @COPIES
    def test_layer_not_initialised_yet_can_be_copied(self, duplicate):
        twin = duplicate(BatchNorm(0.7))
        twin.initialise_layer(input_shape=(3,))
        assert twin.patience == 0.7
