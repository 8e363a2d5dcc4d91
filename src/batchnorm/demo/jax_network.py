"""The experiment's networks in flax nnx."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from batchnorm.demo.data import CLASSES, FEATURES, Batch
from batchnorm.demo.network import LEARNING_RATE, WIDTH, Framework
from batchnorm.jax import BatchNorm

MOMENTUM = 0.9  # of both, for so few steps


class CountsPadding(nnx.BatchNorm):
    """flax's layer without a mask: it normalizes over all points, padding included."""

    def __call__(self, x: Any, *args: Any, mask: Any = None, **kwargs: Any) -> Any:
        """Normalize x of shape (N, L, C); the mask is ignored."""
        return super().__call__(x, *args, **kwargs)


class PointNetwork(nnx.Module):
    """`Network`'s layers."""

    def __init__(self, norm: Callable[..., Any], rngs: nnx.Rngs) -> None:
        self.first = nnx.Linear(FEATURES, WIDTH, rngs=rngs)
        self.norm1 = norm(WIDTH, momentum=MOMENTUM, rngs=rngs)
        self.second = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.norm2 = norm(WIDTH, momentum=MOMENTUM, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, points: jax.Array, mask: jax.Array) -> jax.Array:
        """Logits (N, 10) of points (N, L, 3), real where mask (N, L) is True."""
        x = jax.nn.relu(self.norm1(self.first(points), mask=mask))
        x = jax.nn.relu(self.norm2(self.second(x), mask=mask))
        return self.head(jnp.where(mask[..., None], x, 0.0).max(axis=1))


class JaxNetwork:
    """A `Network`."""

    def __init__(self, model: PointNetwork) -> None:
        self.model = model
        self._optimizer = nnx.Optimizer(model, optax.adam(LEARNING_RATE), wrt=nnx.Param)

    def train(self, batch: Batch) -> None:
        """One step."""
        self.model.train()
        _step(self.model, self._optimizer, *map(jnp.asarray, batch))

    def logits(self, batch: Batch, *, training: bool) -> np.ndarray:
        """Logits, of a copy of the model."""
        self.model.set_attributes(use_running_average=not training)
        graph, state = nnx.split(self.model)
        found = _forward(graph, state, jnp.asarray(batch.points), jnp.asarray(batch.mask))
        return np.asarray(found)

    def first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias in front of the first norm."""
        first: Any = self.model.first
        return np.asarray(first.kernel[...]), np.asarray(first.bias[...])

    def batch_statistics(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """With momentum 0 the running statistics are those of the last batch."""
        points, mask = jnp.asarray(batch.points), jnp.asarray(batch.mask)
        kind = CountsPadding if isinstance(self.model.norm1, CountsPadding) else BatchNorm
        norm: Any = kind(WIDTH, momentum=0.0, rngs=nnx.Rngs(0))
        norm(self.model.first(points), mask=mask)
        return np.asarray(norm.mean[...]), np.asarray(norm.var[...])


@nnx.jit
def _step(model: Any, optimizer: Any, points: Any, mask: Any, labels: Any) -> None:
    def loss(model: Any) -> jax.Array:
        found = optax.softmax_cross_entropy_with_integer_labels(model(points, mask), labels)
        return found.mean()

    optimizer.update(model, nnx.grad(loss)(model))


@partial(jax.jit, static_argnums=0)
def _forward(graph: Any, state: Any, points: jax.Array, mask: jax.Array) -> jax.Array:
    return nnx.merge(graph, state)(points, mask)


def make_pair(seed: int) -> tuple[JaxNetwork, JaxNetwork]:
    """A network for each norm, with the same initial weights."""
    theirs, ours = (PointNetwork(norm, nnx.Rngs(seed)) for norm in (CountsPadding, BatchNorm))
    return JaxNetwork(theirs), JaxNetwork(ours)


FRAMEWORK = Framework(("flax.nnx", "batchnorm"), make_pair, multiple=32)
