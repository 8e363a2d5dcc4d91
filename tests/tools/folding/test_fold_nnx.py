"""Folding the batch norms of nnx models."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import batchnorm.jax
from batchnorm.tools import fold

pytestmark = pytest.mark.sample(2)


def trained(model: Any) -> Any:
    """The model with random weights and statistics everywhere."""
    random = np.random.default_rng(0)
    for _, layer in nnx.iter_modules(model):
        if isinstance(layer, (nnx.BatchNorm, batchnorm.jax.BatchNorm)):
            for name in ("mean", "var", "scale", "bias"):
                variable = getattr(layer, name)
                variable[...] = jnp.asarray(random.uniform(0.5, 2.0, variable.shape), jnp.float32)
    return model


def rngs() -> nnx.Rngs:
    return nnx.Rngs(0)


MAPS = {
    "linear": (lambda: nnx.Linear(3, 4, use_bias=False, rngs=rngs()), (5, 3)),
    "conv": (lambda: nnx.Conv(3, 4, (3, 3), rngs=rngs()), (2, 6, 6, 3)),
    "grouped": (lambda: nnx.Conv(4, 4, 3, feature_group_count=2, rngs=rngs()), (2, 6, 4)),
    "transposed": (lambda: nnx.ConvTranspose(3, 4, (3,), rngs=rngs()), (2, 6, 3)),
    "transposed_kernel": (
        lambda: nnx.ConvTranspose(3, 4, (3,), transpose_kernel=True, rngs=rngs()),
        (2, 6, 3),
    ),
}


@pytest.mark.parametrize("name", MAPS)
def test_neighbours_in_a_sequential_model(name: str) -> None:
    make, shape = MAPS[name]
    linear = make()
    norm = batchnorm.jax.BatchNorm(4, rngs=rngs())
    model = trained(nnx.Sequential(linear, nnx.Dropout(0.5, rngs=rngs()), norm, nnx.relu))
    kernel = np.array(linear.kernel[...])
    new, report = fold(model, jax.random.normal(jax.random.key(0), shape))
    assert [(layer.name, layer.into) for layer in report.folded] == [("layers.2", "layers.0")]
    assert 0 < report.difference <= report.tolerance
    assert np.array_equal(kernel, linear.kernel[...])
    assert model.layers[2] is norm
    assert norm.training
    assert not any(isinstance(m, batchnorm.jax.BatchNorm) for _, m in nnx.iter_modules(new))


class Block(nnx.Module):
    """A residual block, whose attributes do not tell the order of its layers."""

    def __init__(self, padding: Any = "VALID") -> None:
        self.conv1 = nnx.Conv(3, 4, (3, 3), use_bias=False, rngs=rngs())
        self.norm1 = nnx.BatchNorm(4, rngs=rngs())
        self.norm2 = nnx.BatchNorm(4, rngs=rngs())
        self.conv2 = nnx.Conv(4, 5, (3, 3), padding=padding, rngs=rngs())
        self.inner = nnx.List([nnx.BatchNorm(5, rngs=rngs())])

    def __call__(self, x: Any) -> Any:
        y = nnx.relu(self.norm1(self.conv1(x)))
        return self.inner[0](self.conv2(self.norm2(y + 1.0)))


def test_named_pairs_in_either_order() -> None:
    model = trained(Block())
    pairs = [("conv1", "norm1"), ("norm2", "conv2"), ("conv2", "inner.0")]
    new, report = fold(model, pairs=pairs)
    assert [layer.name for layer in report.folded] == ["norm1", "norm2", "inner.0"]
    assert report.kept == ()
    assert new.conv1.bias is not None
    assert model.conv1.bias is None


def test_padding_keeps_the_batch_norm_in_front() -> None:
    model = trained(Block(padding="SAME"))
    pairs = [("norm2", "conv2"), ("conv1", "inner.0")]
    _, report = fold(model, jnp.ones((1, 6, 6, 3)), pairs=pairs)
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert "pads with zeros" in reasons["norm2"]
    assert "it has 5 channels, and the map 4" in reasons["inner.0"]
    assert "no pair names it" in reasons["norm1"]


@pytest.mark.parametrize(
    ("pairs", "text"),
    [
        ([("conv1", "norm3")], "got 'norm3'. There are conv1"),
        ([("conv1", "conv2")], "a Conv and a Conv"),
        ([("conv1", "norm2")], "must agree with the original"),
    ],
)
def test_pairs_that_are_none(pairs: Any, text: str) -> None:
    model = trained(Block())
    before = nnx.to_flat_state(nnx.state(model))
    with pytest.raises(ValueError, match=text):
        fold(model, jnp.ones((1, 6, 6, 3)), pairs=pairs)
    after = nnx.to_flat_state(nnx.state(model))
    assert all(
        jnp.array_equal(a[...], b[...]) for (_, a), (_, b) in zip(before, after, strict=True)
    )
