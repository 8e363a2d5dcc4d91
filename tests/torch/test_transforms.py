"""Derivatives of every order and kind, and torch.func's transforms (S8)."""

import copy

import pytest
import torch
from torch import nn
from torch.func import (
    functional_call,
    grad,
    hessian,
    jacfwd,
    jacrev,
    jvp,
    replace_all_batch_norm_modules_,
    stack_module_state,
    vmap,
)

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, RenormStatistics, batch_norm

pytestmark = pytest.mark.sample(2)

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}  # float64, sums of a few dozen terms, three derivatives
EPS = 1e-2

# torch.func's forward mode scripts a decomposition with torch.jit.script, deprecated by itself.
forward_mode = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.float64)


def leaves(*shapes):
    return tuple(normal(*shape).requires_grad_() for shape in shapes)


def plain(x, weight, bias):
    return batch_norm(x, None, None, weight, bias, True, eps=EPS)


def tracked(x, weight, bias):
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    return batch_norm(x, mean, var, weight, bias, True, eps=EPS)


def masked(x, weight, bias):
    mask = torch.tensor([True, False, True, True, False, True])
    y = batch_norm(x, None, None, weight, bias, True, eps=EPS, mask=mask)
    return y[mask]  # padded outputs are constants by contract, whatever finite differences say


def masked_per_channel(x, weight, bias):
    mask = torch.arange(18).reshape(6, 3) % 4 != 0
    y = batch_norm(x, None, None, weight, bias, True, eps=EPS, mask=mask)
    return y[mask]


def one_real_row(x, weight, bias):
    mask = torch.arange(6) == 2
    y = batch_norm(x, None, None, weight, bias, True, eps=EPS, mask=mask)
    return y[mask]


def ghost(x, weight, bias):
    return batch_norm(x, None, None, weight, bias, True, eps=EPS, virtual_batch_size=3)


def ghost_masked(x, weight, bias):
    mask = torch.tensor([True, False, True, True, True, True])
    y = batch_norm(x, None, None, weight, bias, True, eps=EPS, mask=mask, virtual_batch_size=3)
    return y[mask]


def renorm(x, weight, bias):
    # Clipped to constants: finite differences would see r and d move with x, the contract does not.
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    statistics = RenormStatistics(torch.ones(3).double(), mean + 50, torch.ones(3).double())
    clipping = {"rmin": 1.3, "rmax": 1.3, "dmax": 0.2}
    return batch_norm(
        x, mean, var, weight, bias, True, eps=EPS, renorm=statistics, renorm_clipping=clipping
    )


def leaky(x, weight, bias):
    return batch_norm(x, None, None, weight, bias, True, eps=EPS, activation="leaky_relu")


def evaluated(x, weight, bias):
    mean, var = torch.arange(3).double(), torch.arange(1, 4).double()
    return batch_norm(x, mean, var, weight, bias, eps=EPS)


def evaluated_masked(x, weight, bias):
    mean, var = torch.arange(3).double(), torch.arange(1, 4).double()
    mask = torch.arange(6) % 3 != 0
    return batch_norm(x, mean, var, weight, bias, eps=EPS, mask=mask)[mask]


FUNCTIONS = {
    f.__name__: f
    for f in (
        plain,
        tracked,
        masked,
        masked_per_channel,
        one_real_row,
        ghost,
        ghost_masked,
        renorm,
        leaky,
        evaluated,
        evaluated_masked,
    )
}
functions = pytest.mark.parametrize("function", FUNCTIONS.values(), ids=FUNCTIONS)


# Finite differences


@functions
def test_gradient_agrees_with_finite_differences(function):
    assert torch.autograd.gradcheck(function, leaves((6, 3), (3,), (3,)))


@functions
def test_second_derivative_agrees_with_finite_differences(function):
    assert torch.autograd.gradgradcheck(function, leaves((6, 3), (3,), (3,)))


@forward_mode
@functions
def test_forward_mode_agrees_with_finite_differences(function):
    arguments = leaves((6, 3), (3,), (3,))
    assert torch.autograd.gradcheck(
        function, arguments, check_forward_ad=True, check_backward_ad=False
    )


@functions
def test_batched_gradient_agrees_with_single_ones(function):
    arguments = leaves((6, 3), (3,), (3,))
    assert torch.autograd.gradcheck(function, arguments, check_batched_grad=True)


def adjusted(x, s, t):
    return batch_norm(x, None, None, training=True, eps=EPS, adjustment=lambda shape: (s, t))


ADJUSTMENTS = {"scalar": ((), ()), "channel": ((3,), (3,)), "sample": ((6, 1), (6, 3))}
adjustments = pytest.mark.parametrize("shapes", ADJUSTMENTS.values(), ids=ADJUSTMENTS)


@adjustments
def test_adjustment_gradient_agrees_with_finite_differences(shapes):
    assert torch.autograd.gradcheck(adjusted, leaves((6, 3), *shapes))


@adjustments
def test_adjustment_second_derivative_agrees_with_finite_differences(shapes):
    assert torch.autograd.gradgradcheck(adjusted, leaves((6, 3), *shapes))


def with_residual(x, residual):
    return batch_norm(
        x, None, None, training=True, eps=EPS, residual=residual, activation="leaky_relu"
    )


def test_residual_gradient_agrees_with_finite_differences():
    assert torch.autograd.gradcheck(with_residual, leaves((6, 3), (6, 3)))


def test_residual_second_derivative_agrees_with_finite_differences():
    assert torch.autograd.gradgradcheck(with_residual, leaves((6, 3), (6, 3)))


AXES = {"last": (-1, (4,)), "two": ((1, 3), (2, 4)), "first": (0, (3,)), "outer": ((0, 2), (3, 2))}
axes = pytest.mark.parametrize(("axis", "sizes"), AXES.values(), ids=AXES)


@axes
def test_gradient_along_any_axes_agrees_with_finite_differences(axis, sizes):
    def function(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, True, eps=EPS, axis=axis)

    assert torch.autograd.gradcheck(function, leaves((3, 2, 2, 4), sizes, sizes))


@axes
def test_second_derivative_along_any_axes_agrees_with_finite_differences(axis, sizes):
    def function(x, weight, bias):
        return batch_norm(x, None, None, weight, bias, True, eps=EPS, axis=axis)

    arguments = leaves((3, 2, 2, 4), sizes, sizes)
    assert torch.autograd.gradgradcheck(function, arguments)


def test_frozen_layer_gradient_agrees_with_finite_differences():
    layer = BatchNorm1d(3, dtype=torch.float64).freeze()
    layer.running_mean.normal_()
    assert torch.autograd.gradcheck(layer, leaves((6, 3)))


def test_layer_for_images_agrees_with_finite_differences():
    layer = BatchNorm2d(2, dtype=torch.float64, activation="leaky_relu")
    assert torch.autograd.gradcheck(layer, leaves((3, 2, 2, 2)))


def test_output_of_padding_is_a_constant():
    x, weight, bias = leaves((6, 3), (3,), (3,))
    mask = torch.arange(6) % 2 == 0
    y = batch_norm(x, None, None, weight, bias, True, eps=EPS, mask=mask)
    found = torch.autograd.grad(y[~mask], (x, weight, bias), normal(3, 3))
    assert all(torch.equal(g, torch.zeros_like(g)) for g in found)


# Third derivatives; torch's own layer gets them wrong (pytorch#186256)


def formula(x, weight, bias):
    """Batch normalization in plain operations, for autograd."""
    d = x - x.mean(0)
    return d / torch.sqrt((d * d).mean(0) + EPS) * weight + bias


def formula_ghost(x, weight, bias):
    """Sample i belongs to group i mod G."""
    groups = len(x) // 3
    y = [formula(x[g::groups], weight, bias) for g in range(groups)]
    return torch.stack(y, dim=1).reshape(x.shape)


def formula_masked(x, weight, bias):
    return formula(x[[0, 2, 3, 5]], weight, bias)


def derivatives(function, arguments, cotangents):
    """All derivatives up to the third, along fixed directions."""
    x, *_ = arguments
    y = function(*arguments)
    (first,) = torch.autograd.grad(y, x, cotangents[0][: len(y)], create_graph=True)
    (second,) = torch.autograd.grad(first, x, cotangents[1], create_graph=True)
    return (first, second, *torch.autograd.grad(second, arguments[:2], cotangents[2]))


THIRD = {
    "plain": (plain, formula),
    "tracked": (tracked, formula),
    "masked": (masked, formula_masked),
    "ghost": (ghost, formula_ghost),
}


@pytest.mark.parametrize(("function", "expected"), THIRD.values(), ids=THIRD)
def test_third_derivative_is_that_of_the_formula(function, expected):
    arguments, cotangents = leaves((6, 3), (3,), (3,)), normal(3, 6, 3)
    torch.testing.assert_close(
        derivatives(function, arguments, cotangents),
        derivatives(expected, arguments, cotangents),
        **TOLERANCE,
    )


# torch.func


def loss(layer, x, c):
    return (layer(x) * c).sum()


def untracked():
    layer = BatchNorm1d(3, track_running_stats=False, dtype=torch.float64)
    nn.init.normal_(layer.weight)
    return layer


def evaluating():
    layer = BatchNorm1d(3, dtype=torch.float64).eval()
    layer.running_mean.normal_()
    layer.running_var.uniform_(0.5, 2)
    nn.init.normal_(layer.weight)
    return layer


MAKERS = {"training": untracked, "evaluation": evaluating}
makers = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


@makers
def test_func_grad_is_autograds(make):
    layer, (x,), c = make(), leaves((6, 3)), normal(6, 3)
    (expected,) = torch.autograd.grad(loss(layer, x, c), x)
    torch.testing.assert_close(grad(loss, argnums=1)(layer, x, c), expected, **TOLERANCE)


@makers
def test_jacrev_is_the_jacobian(make):
    layer, x = make(), normal(6, 3)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(jacrev(layer)(x), expected, **TOLERANCE)


@forward_mode
@makers
def test_jacfwd_is_the_jacobian(make):
    layer, x = make(), normal(6, 3)
    expected = torch.autograd.functional.jacobian(layer, x)
    torch.testing.assert_close(jacfwd(layer)(x), expected, **TOLERANCE)


@forward_mode
@makers
def test_hessian_is_autograds(make):
    layer, x, c = make(), normal(6, 3), normal(6, 3)

    def cubed(x):
        return (layer(x) ** 3 * c).sum()

    expected = torch.autograd.functional.hessian(cubed, x)
    torch.testing.assert_close(hessian(cubed)(x), expected, **TOLERANCE)


@forward_mode
@makers
def test_jvp_is_the_jacobian_times_the_tangent(make):
    layer, x, v = make(), normal(6, 3), normal(6, 3)
    y, tangent = jvp(layer, (x,), (v,))
    expected = torch.einsum("ncmd,md->nc", torch.autograd.functional.jacobian(layer, x), v)
    torch.testing.assert_close(y, layer(x), **TOLERANCE)
    torch.testing.assert_close(tangent, expected, **TOLERANCE)


@forward_mode
def test_forward_mode_agrees_with_reverse_mode_in_training():
    layer, x, v = BatchNorm1d(3, dtype=torch.float64), normal(6, 3), normal(6, 3)
    expected = torch.einsum(
        "ncmd,md->nc", torch.autograd.functional.jacobian(copy.deepcopy(layer), x), v
    )
    with torch.autograd.forward_ad.dual_level():
        y = layer(torch.autograd.forward_ad.make_dual(x, v))
        tangent = torch.autograd.forward_ad.unpack_dual(y).tangent
    torch.testing.assert_close(tangent, expected, **TOLERANCE)


@makers
def test_vmap_maps_over_batches(make):
    layer, x = make(), normal(5, 6, 3)
    expected = torch.stack([layer(batch) for batch in x])
    torch.testing.assert_close(vmap(layer)(x), expected, **TOLERANCE)


@makers
def test_vmap_maps_over_any_dimension(make):
    layer, x = make(), normal(6, 5, 3)
    expected = torch.stack([layer(batch) for batch in x.unbind(1)], dim=1)
    torch.testing.assert_close(vmap(layer, in_dims=1, out_dims=1)(x), expected, **TOLERANCE)


@makers
def test_vmap_maps_over_masks(make):
    layer, x, mask = make(), normal(5, 6, 3), torch.rand(5, 6) < 0.6
    expected = torch.stack([layer(a, mask=m) for a, m in zip(x, mask, strict=True)])
    torch.testing.assert_close(vmap(layer)(x, mask), expected, **TOLERANCE)


def test_vmap_maps_over_ghost_batches():
    layer = BatchNorm1d(3, track_running_stats=False, virtual_batch_size=2, dtype=torch.float64)
    x = normal(5, 6, 3)
    expected = torch.stack([layer(batch) for batch in x])
    torch.testing.assert_close(vmap(layer)(x), expected, **TOLERANCE)


@makers
def test_vmap_of_grad_is_the_gradient_of_each_batch(make):
    layer, x, c = make(), normal(5, 6, 3), normal(6, 3)
    expected = torch.stack([grad(loss, argnums=1)(layer, batch, c) for batch in x])
    mapped = vmap(grad(loss, argnums=1), in_dims=(None, 0, None))(layer, x, c)
    torch.testing.assert_close(mapped, expected, **TOLERANCE)


def test_per_sample_gradients_in_evaluation():
    layer, x, c = evaluating(), normal(7, 3), normal(7, 3)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def sample_loss(parameters, x, c):
        y = functional_call(layer, (parameters, buffers), (x[None],))
        return (y[0] * c).sum()

    found = vmap(grad(sample_loss), in_dims=(None, 0, 0))(parameters, x, c)
    xhat = (x - layer.running_mean) / torch.sqrt(layer.running_var + layer.eps)
    torch.testing.assert_close(found["weight"], (c * xhat), **TOLERANCE)
    torch.testing.assert_close(found["bias"], c, **TOLERANCE)


def ensemble(training):
    members = [BatchNorm1d(3, dtype=torch.float64).train(training) for _ in range(4)]
    for member in members:
        nn.init.normal_(member.weight)
        member.running_mean.normal_()
    return members


def run_ensemble(members, x):
    parameters, buffers = stack_module_state(members)

    def call(parameters, buffers, x):
        return functional_call(members[0], (parameters, buffers), (x,)), buffers

    return vmap(call, in_dims=(0, 0, None))(parameters, buffers, x)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_ensemble_computes_what_its_members_do(training):
    members, x = ensemble(training), normal(6, 3)
    y, _ = run_ensemble(copy.deepcopy(members), x)
    expected = torch.stack([member(x) for member in members])
    torch.testing.assert_close(y, expected, **TOLERANCE)


def test_ensemble_updates_the_statistics_of_its_members():
    members, x = ensemble(True), normal(6, 3)
    _, buffers = run_ensemble(copy.deepcopy(members), x)
    for member in members:
        member(x)
    _, expected = stack_module_state(members)
    torch.testing.assert_close(buffers, expected, **TOLERANCE)


def test_functional_call_updates_the_statistics_given():
    layer, x = BatchNorm1d(3, dtype=torch.float64), normal(6, 3)
    buffers = {name: buffer.clone() for name, buffer in layer.named_buffers()}
    functional_call(layer, buffers, (x,))
    torch.testing.assert_close(buffers["running_mean"], 0.1 * x.mean(0), **TOLERANCE)
    assert torch.equal(layer.running_mean, torch.zeros(3).double())


def test_func_grad_with_statistics_as_arguments_updates_them():
    layer, x, c = BatchNorm1d(3, dtype=torch.float64), normal(6, 3), normal(6, 3)
    parameters, buffers = dict(layer.named_parameters()), dict(layer.named_buffers())

    def trained(parameters, buffers):
        buffers = {name: buffer.clone() for name, buffer in buffers.items()}
        y = functional_call(layer, (parameters, buffers), (x,))
        return (y * c).sum(), buffers

    found, new = grad(trained, has_aux=True)(parameters, buffers)
    loss(layer, x, c).backward()
    torch.testing.assert_close(found["weight"], layer.weight.grad, **TOLERANCE)
    torch.testing.assert_close(new, dict(layer.named_buffers()), **TOLERANCE)


def test_layer_for_any_axes_maps_too():
    layer, x = BatchNorm(4, axis=-1, track_running_stats=False).double(), normal(5, 6, 2, 4)
    expected = torch.stack([layer(batch) for batch in x])
    torch.testing.assert_close(vmap(layer)(x), expected, **TOLERANCE)


# Running statistics that cannot move, or are gone


def test_function_names_the_remedy_under_func_grad():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^batch_norm: running statistics .* made inside"):
        grad(lambda x: batch_norm(x, mean, var, training=True).sum())(torch.randn(6, 3))
    assert torch.equal(mean, torch.zeros(3))


def test_function_names_the_remedy_under_vmap():
    mean, var = torch.zeros(3), torch.ones(3)
    with pytest.raises(RuntimeError, match=r"^batch_norm: running statistics .* mapped buffers"):
        vmap(lambda x: batch_norm(x, mean, var, training=True))(torch.randn(4, 6, 3))


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_renormalization_that_lost_its_statistics_raises(training):
    layer = BatchNorm1d(3, renorm=True).train(training)
    replace_all_batch_norm_modules_(layer)
    with pytest.raises(ValueError, match=r"renorm=True.*configure\(renorm=False\)"):
        layer(torch.randn(6, 3))


def test_renormalization_switched_off_can_lose_its_statistics():
    layer = BatchNorm1d(3, renorm=True)
    layer.configure(renorm=False)
    replace_all_batch_norm_modules_(layer)
    x = torch.randn(4, 6, 3)
    torch.testing.assert_close(vmap(layer)(x).mean(1), torch.zeros(4, 3), atol=1e-6, rtol=0)
