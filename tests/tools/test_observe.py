"""A batch norm's inputs and their moments, observed from outside of the model."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import batchnorm.jax
from batchnorm.core.layout import Layout
from batchnorm.tools.measure import _by_array_code, measure
from batchnorm.tools.models import find_layers
from batchnorm.tools.observe import Observation, observe
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, padding_mask

pytestmark = pytest.mark.sample(2)

# Sums of at most a few hundred float64 numbers, in another order.
CLOSE = {"rtol": 1e-11, "atol": 1e-11}


def moments_seen(model: Any, run: Any, *, padded: bool = False) -> list[Any]:
    seen: list[Any] = []

    def see(observation: Observation) -> None:
        seen.append((observation.layer.name, observation.moments(padded=padded)))

    with observe(find_layers(model), see):
        run()
    return seen


def assert_moments(found: Any, rows: Any) -> None:
    """`found` are the moments of rows of shape (count, C)."""
    rows = np.asarray(rows, np.float64)
    np.testing.assert_array_equal(found.count, np.full(rows.shape[1], len(rows)))
    np.testing.assert_allclose(found.mean, rows.mean(0), **CLOSE)
    np.testing.assert_allclose(found.var, rows.var(0), **CLOSE)


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    ("shape", "axes"),
    [
        ((6, 3), (1,)),
        ((4, 3, 5, 2), (1,)),
        ((4, 5, 3), (2,)),
        ((2, 3, 4, 5), (1, 3)),
        ((3, 4), (0,)),
        ((0, 3), (1,)),
        ((7, 1), (1,)),
    ],
)
def test_kernel_and_array_code_agree(shape: Any, axes: Any, masked: bool, dtype: Any) -> None:
    random = np.random.default_rng(0)
    x = (random.normal(size=shape) + 3).astype(dtype)
    sizes = [1 if a in axes else n for a, n in enumerate(shape)]
    mask = random.random(sizes) > 0.5 if masked else None
    found = measure(x, mask, axes)
    plain = _by_array_code(x, mask, Layout(shape, axes))
    for a, b in zip(found, plain, strict=True):
        assert a.dtype == np.float64
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, **CLOSE)


def test_array_code_in_blocks_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).normal(size=(50, 3)).astype(np.float32)
    mask = np.arange(50)[:, None] % 3 != 0
    monkeypatch.setattr("batchnorm.tools.measure._BLOCK", 30)
    assert_moments(_by_array_code(x, mask, Layout((50, 3), (1,))), x[mask[:, 0]])
    x[7] = np.nan
    assert np.isnan(_by_array_code(x, mask, Layout((50, 3), (1,))).mean).all()


def test_digits_at_an_offset() -> None:
    x = (np.random.default_rng(0).normal(size=(1000, 2)) + 1e6).astype(np.float32)
    assert_moments(measure(x, None, (1,)), x)


def test_mask_as_an_argument_and_layer_used_twice() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = BatchNorm1d(3)

        def forward(self, x: Any, mask: Any) -> Any:
            return self.norm(2 * self.norm(x, mask))

    x, mask = torch.randn(4, 3, 5), torch.arange(5) < torch.tensor([[1], [2], [5], [0]])
    model = Model().eval()
    first, second = moments_seen(model, lambda: model(x, mask))
    assert first[0] == second[0] == "norm"
    assert_moments(first[1], x.movedim(1, -1)[mask])
    assert_moments(second[1], (2 * model.norm(x)).detach().movedim(1, -1).reshape(-1, 3))


@pytest.mark.parametrize("follow", [False, True])
def test_padding_mask_reaches_the_observer_in_evaluation_too(follow: bool) -> None:
    model = nn.Sequential(nn.AvgPool2d(2), BatchNorm2d(3)).eval()
    x, mask = torch.randn(2, 3, 4, 4), torch.zeros(2, 4, 4, dtype=torch.bool)
    mask[0, :2] = mask[1, 2:] = True

    def run() -> None:
        with padding_mask(mask, follow=model if follow else None):
            model(x)

    rows = nn.functional.avg_pool2d(x, 2).movedim(1, -1)
    [(_, found)] = moments_seen(model, run)
    assert_moments(found, rows[mask[:, ::2, ::2]])
    [(_, found)] = moments_seen(model, run, padded=True)
    assert_moments(found, rows.reshape(-1, 3))


def test_jagged_input() -> None:
    x = torch.nested.nested_tensor([torch.randn(2, 3), torch.randn(4, 3)], layout=torch.jagged)
    layer = BatchNorm(3, axis=-1).eval()
    [(_, found)] = moments_seen(layer, lambda: layer(x, torch.tensor([True, False])))
    assert_moments(found, x[0])


def test_padding_of_nan_is_not_seen() -> None:
    layer = BatchNorm1d(2).eval()
    x, mask = torch.randn(4, 2), torch.tensor([1, 0, 1, 1])
    x[1] = torch.nan
    [(_, found)] = moments_seen(layer, lambda: layer(x, mask))
    assert_moments(found, x[mask != 0])


def test_torchs_own_layer_in_a_compiled_model() -> None:
    model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).eval()
    compiled = torch.compile(model, backend="eager")
    x = torch.randn(6, 2)
    compiled(x)
    [(name, found)] = moments_seen(model, lambda: compiled(x))
    assert name == "1"
    assert_moments(found, model[0](x).detach())


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    with pytest.raises(RuntimeError), observe(find_layers(model), lambda seen: None):
        model(torch.randn(6, 4))
    assert not model[0]._forward_pre_hooks


@pytest.mark.parametrize("layer", [nnx.BatchNorm, batchnorm.jax.BatchNorm])
def test_nnx_layers(layer: Any) -> None:
    norm = layer(3, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (4, 5, 3))
    mask = jnp.arange(5)[None, :, None] < jnp.arange(1, 5)[:, None, None]
    original = layer.__call__
    [(_, found)] = moments_seen(norm, lambda: norm(x, mask=mask))
    rows = np.asarray(x)[np.asarray(mask)[..., 0]]
    assert_moments(found, rows)
    assert layer.__call__ is original


def test_nnx_subclass_that_calls_its_parent_is_seen_once() -> None:
    class Louder(nnx.BatchNorm):
        def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().__call__(x, *args, **kwargs)

    class Quiet(nnx.BatchNorm):
        pass

    model = nnx.Sequential(
        Louder(3, rngs=nnx.Rngs(0)), Quiet(3, rngs=nnx.Rngs(0)), nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    )
    seen = moments_seen(model, lambda: model(jnp.ones((4, 3))))
    assert [name for name, _ in seen] == [found.name for found in find_layers(model)]
    assert "__call__" not in vars(Quiet)


TRANSFORMATIONS: dict[str, Any] = {
    "jit": nnx.jit(lambda layer, x, mask: layer(x, mask=mask)),
    "remat": nnx.remat(lambda layer, x, mask: layer(x, mask=mask)),
    "jit of jit": nnx.jit(nnx.jit(lambda layer, x, mask: layer(x, mask=mask))),
    "cond": lambda layer, x, mask: nnx.cond(
        True, lambda m: m(x, mask=mask), lambda m: m(x + 1, mask=mask), layer
    ),
}


@pytest.mark.parametrize("transformation", TRANSFORMATIONS)
@pytest.mark.parametrize("layer", [nnx.BatchNorm, batchnorm.jax.BatchNorm])
def test_nnx_under_a_transformation_is_seen_each_time(layer: Any, transformation: str) -> None:
    norm, run = layer(3, rngs=nnx.Rngs(0)), TRANSFORMATIONS[transformation]
    structure = jax.tree.structure(nnx.state(norm))
    mask = jnp.arange(5)[:, None] < 4
    for seed in range(3):  # the second time the code is compiled already
        x = jax.random.normal(jax.random.key(seed), (5, 3))
        [(name, found)] = moments_seen(norm, lambda x=x: run(norm, x, mask))
        assert name == ""
        assert_moments(found, x[:4])
        run(norm, x, mask)
    assert jax.tree.structure(nnx.state(norm)) == structure


def test_failure_to_see_under_a_transformation_is_raised() -> None:
    def fail(observation: Observation) -> None:
        raise ZeroDivisionError(observation.layer.name)

    norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    with pytest.raises(ZeroDivisionError), observe(find_layers(norm), fail):
        nnx.jit(lambda layer, x: layer(x))(norm, jnp.ones((4, 3)))
    assert len(moments_seen(norm, lambda: norm(jnp.ones((4, 3))))) == 1
