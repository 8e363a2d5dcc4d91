"""How a case runs on the JAX front end."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchnorm.core.config import Options, Renorm
from batchnorm.core.running import Running
from batchnorm.jax.functional import normalize_batch, normalize_running
from cases import Case, Data, Result, State


def supports(case: Case) -> bool:
    """Activation and residual are torch's: XLA fuses what follows a layer."""
    return case.activation is None and not case.residual


def is_served(case: Case) -> bool:
    """Whether a kernel serves the case, as the documentation says."""
    apart = case.axes != tuple(range(case.axes[0], case.axes[0] + len(case.axes)))
    training = case.mode == "train"
    return not (
        (case.adjusted and training) or case.mask == "channelwise" or (apart and case.channels)
    )


def run(case: Case, data: Data, *, fused: bool | None) -> Result:
    """Run a case under jit, through what the layer calls."""
    strict = jax.numpy_dtype_promotion("strict")
    with strict, jax.enable_x64(case.dtype == "float64"):
        return _run(case, data, fused)


def _run(case: Case, data: Data, fused: bool | None) -> Result:
    dtype = jnp.dtype(case.dtype)
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32
    training = case.mode == "train"
    renorm = None if case.renorm is None else Renorm(0.99, **case.renorm)
    options = Options(
        eps=case.eps,
        decay=case.decay,
        virtual_batch_size=case.ghost if training else None,
        renorm=renorm if training else None,
    )
    kept = {f: a for f, a in zip(State._fields, data.state, strict=True) if a is not None}
    running = Running(
        **{f: _array(a, jnp.int32 if f == "batches" else wide) for f, a in kept.items()}
    )
    mask = None if data.mask is None else jnp.asarray(data.mask)
    settings: dict[str, Any] = {"axis": case.axis, "options": options, "owner": "case"}
    adjusted = {"s": _array(data.s, wide), "t": _array(data.t, wide)} if case.adjusted else {}

    def forward(x: Any, gamma: Any, beta: Any) -> Any:
        if not training:
            return normalize_running(
                x, mask, gamma, beta, running, fused=fused, **settings
            ), running
        step = normalize_batch(x, mask, gamma, beta, running, fused=fused, **adjusted, **settings)
        return step.y, step.running

    @jax.jit
    def step(x: Any, gamma: Any, beta: Any, dy: Any) -> Any:
        y, transpose, state = jax.vjp(forward, x, gamma, beta, has_aux=True)
        return y, transpose(dy), state

    x, dy = _array(data.x, dtype), _array(data.dy, dtype)
    gamma, beta = _array(data.gamma, wide), _array(data.beta, wide)
    y, (dx, dgamma, dbeta), state = step(x, gamma, beta, dy)
    assert y.dtype == dx.dtype == dtype
    assert all(
        a.dtype == b.dtype
        for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(running), strict=True)
    )
    return Result(*map(_numpy, (y, dx, dgamma, dbeta)), State(*map(_numpy, state)))


def _array(a: Any, dtype: Any) -> Any:
    return None if a is None else jnp.asarray(np.asarray(a).astype(dtype))


def _numpy(a: Any) -> Any:
    return None if a is None else np.asarray(a).astype(np.float64)
