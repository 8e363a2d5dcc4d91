"""Errors that users see begin with the layer or function that was called, at every edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import batchnorm
from batchnorm.core.errors import ArgumentError
from batchnorm.jax import (
    BatchNorm,
    batch_norm,
    batch_norm_inference,
    init_running,
    sequence_mask,
    update_running,
)
from batchnorm.kernels import extension

X, MASK = jnp.ones((8, 3)), jnp.ones(7, bool)


class Mine(BatchNorm):
    """Errors take the name of the layer's own class."""


def make(**options: Any) -> Mine:
    return Mine(3, rngs=nnx.Rngs(0), **options)


def updated(**options: Any) -> Any:
    return update_running(init_running(3, renorm=True), batch_norm(X)[1], **options)


EDGES: dict[str, tuple[str, Callable[[], Any]]] = {
    "function": ("batch_norm", lambda: batch_norm(X, mask=MASK)),
    "function, option": ("batch_norm", lambda: batch_norm(X, epsilon=-1.0)),
    "function, groups": ("batch_norm", lambda: batch_norm(X, virtual_batch_size=3)),
    "function, running": ("batch_norm", lambda: batch_norm(X, running_mean=jnp.ones(2))),
    "function, axis": ("batch_norm", lambda: batch_norm(X, axis_name="nowhere")),
    "jitted": ("batch_norm", lambda: jax.jit(lambda x: batch_norm(x, mask=MASK))(X)),
    "inference": ("batch_norm_inference", lambda: batch_norm_inference(X, X, X)),
    "inference, axis": ("batch_norm_inference", lambda: batch_norm_inference(X, X, X, axis=4)),
    "update": ("update_running", lambda: updated(momentum=2.0)),
    "update, epsilon": ("update_running", lambda: updated(epsilon="small")),
    "update, renorm": ("update_running", lambda: updated(renorm_momentum=2.0)),
    "lengths": ("sequence_mask", lambda: sequence_mask(jnp.ones(3), 4)),
    "constructor": ("Mine", lambda: make(momentum=2.0)),
    "features": ("Mine", lambda: make(features_in=3)),
    "init": ("Mine", lambda: Mine().init(0)),
    "init, input": ("Mine", lambda: Mine(axis=3).init(0, X)),
    "init, step": ("Mine", lambda: Mine(virtual_batch_size=3).init(0, X, False)),
    "call": ("Mine", lambda: make()(X, mask=MASK)),
    "call, uninitialized": ("Mine", lambda: Mine()(X, True)),
    "call, channels": ("Mine", lambda: make()(jnp.ones((8, 4)))),
    "call, type": ("Mine", lambda: make()(np.ones((8, 3), int))),
    "evaluation": ("Mine", lambda: make()(X, True, mask=MASK)),
    "nnx.jit": ("Mine", lambda: nnx.jit(lambda layer, x: layer(x, mask=MASK))(make(), X)),
    "explain": ("Mine", lambda: batchnorm.explain(Mine(), X)),
    "explain, call": ("Mine", lambda: batchnorm.explain(make(), X, mask=MASK)),
    "fused": ("Mine", lambda: make(fused=True, axis_name="a")(X)),
}
LATE: dict[str, tuple[str, Callable[[], Any]]] = {
    "vmap": ("batch_norm", lambda: jax.vmap(lambda x: batch_norm(x, fused=True))(X[None])),
    "forward mode": ("Mine", lambda: jax.jvp(make(fused=True), (X,), (X,))),
    "export": ("Mine", lambda: jax.export.export(jax.jit(evaluate))(X)),
}


def evaluate(x: Any) -> Any:
    return make(fused=True)(x, True)


def assert_named(owner: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError, NameError)) as found:
        call()
    assert not isinstance(found.value, ArgumentError)
    assert str(found.value).startswith(f"{owner}: ")


@pytest.mark.parametrize(("owner", "call"), EDGES.values(), ids=EDGES)
def test_errors_have_the_name_of_the_edge(owner: str, call: Callable[[], Any]) -> None:
    assert_named(owner, call)


@pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)
@pytest.mark.parametrize(("owner", "call"), LATE.values(), ids=LATE)
def test_errors_of_a_later_stage_have_it_too(owner: str, call: Callable[[], Any]) -> None:
    assert_named(owner, call)
