"""`convert_batchnorm`: flax's batch norms become ours, wherever they are held."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from batchnorm.jax import BatchNorm, Conversion, convert_batchnorm


class Model(nnx.Module):
    """Norms as an attribute, in a list, in a dict, in a Sequential, and one twice."""

    def __init__(self, rngs: nnx.Rngs) -> None:
        self.norm = nnx.BatchNorm(4, momentum=0.9, epsilon=1e-4, rngs=rngs)
        self.again = self.norm
        self.many = nnx.List([nnx.BatchNorm(4, use_bias=False, rngs=rngs)])
        self.named = nnx.Dict(a=nnx.BatchNorm(4, use_scale=False, rngs=rngs))
        self.chain = nnx.Sequential(nnx.Linear(4, 4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs))

    def __call__(self, x: Any) -> Any:
        return self.chain(self.named["a"](self.many[0](self.again(x))))


def rows(shape: tuple[int, ...] = (16, 4)) -> Any:
    return jax.random.normal(jax.random.key(0), shape) * 2 + 3


def test_norms_are_converted_wherever_they_are_held() -> None:
    model, theirs, report = Model(nnx.Rngs(0)), Model(nnx.Rngs(0)), []
    norm, scale, mean = model.norm, model.norm.scale, model.norm.mean
    assert convert_batchnorm(model, report=report) is model
    assert len(report) == 4
    assert all(one.after is BatchNorm for one in report)
    assert model.norm is model.again is norm
    assert norm.scale is scale
    assert norm.mean is mean
    assert float(norm.momentum[...]) == pytest.approx(0.9)
    assert norm.epsilon == 1e-4
    assert model.many[0].bias is None
    assert model.named["a"].scale is None
    np.testing.assert_allclose(model(rows()), theirs(rows()), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(norm.var[...], theirs.norm.var[...], rtol=1e-4)
    model.eval(), theirs.eval()
    np.testing.assert_allclose(model(rows()), theirs(rows()), rtol=1e-4, atol=1e-4)


def test_an_optimizer_made_before_goes_on() -> None:
    model = Model(nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.sgd(0.1), wrt=nnx.Param)
    convert_batchnorm(model)
    before = model.norm.scale[...]

    @nnx.jit
    def step(model: Any, optimizer: Any) -> None:
        gradient = nnx.grad(lambda m: (m(rows()) ** 3).sum())(model)
        optimizer.update(model, gradient)

    step(model, optimizer)
    assert not bool(jnp.all(model.norm.scale[...] == before))


@pytest.mark.parametrize("options", [{}, {"renorm": True, "debias": True}])
def test_stacked_layers_are_converted_and_scanned(options: dict[str, Any]) -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(key: Any) -> Any:
        return nnx.BatchNorm(4, momentum=0.9, rngs=nnx.Rngs(key))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer: Any, x: Any) -> Any:
        return layer(x)

    keys = jax.random.split(jax.random.key(0), 3)
    ours, theirs = convert_batchnorm(make(keys), **options), make(keys)
    y = run(ours, rows())
    if not options:
        np.testing.assert_allclose(y, run(theirs, rows()), rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(ours.mean[...], theirs.mean[...], rtol=1e-4, atol=1e-5)
    else:
        np.testing.assert_array_equal(ours.steps[...], [1, 1, 1])
    assert ours.momentum[...].shape == (3,)
    assert bool(jnp.isfinite(y).all())


def test_evaluation_stays_evaluation() -> None:
    layer = convert_batchnorm(nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0)))
    assert not layer.training
    assert layer.train().training


def test_half_statistics_become_float32() -> None:
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    layer.mean.set_value(layer.mean[...].astype(jnp.bfloat16))
    assert convert_batchnorm(layer).mean[...].dtype == jnp.float32


def test_names_choose_layers() -> None:
    model, report = Model(nnx.Rngs(0)), []
    convert_batchnorm(model, only=["many.*", "chain.*"], skip="many.0", report=report)
    assert type(model.chain.layers[1]) is BatchNorm
    assert type(model.many[0]) is nnx.BatchNorm
    assert sorted(one.reason for one in report) == [
        "",
        *["only= does not name it"] * 2,
        "skip= names it",
    ]


def test_what_cannot_be_exchanged_is_listed() -> None:
    class Own(nnx.BatchNorm):
        pass

    asks = nnx.BatchNorm(4, use_running_average=None, rngs=nnx.Rngs(0))
    model = nnx.Sequential(Own(4, rngs=nnx.Rngs(0)), asks)
    report: list[Conversion] = []
    with pytest.warns(UserWarning, match="a subclass may .*demands use_running_average"):
        convert_batchnorm(model, report=report)
    assert [one.after for one in report] == [None, None]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"axis": 1}, "options must be among"),
        ({"skip": 3}, "skip must be a pattern"),
        ({"momentum": 2.0}, "momentum"),
    ],
)
def test_errors_leave_the_module_alone(options: dict[str, Any], message: str) -> None:
    layer = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    with pytest.raises((TypeError, ValueError), match=f"convert_batchnorm: .*{message}"):
        convert_batchnorm(layer, **options)
    assert type(layer) is nnx.BatchNorm
