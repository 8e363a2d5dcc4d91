"""The runs of a case on the JAX front end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from batchnorm.core.config import Options, Renorm
from batchnorm.core.running import Running
from batchnorm.jax.call import Arrays, Settings
from batchnorm.jax.moments import merge_moments
from batchnorm.jax.running import move_statistics
from batchnorm.jax.steps import normalize_batch, normalize_running
from batchnorm.verification.cases import Case, Data, Result, State, refuse_kernels, split_arrays
from batchnorm.verification.comparison import check_type


def refuse(case: Case) -> str | None:
    """The reason why the front end does not have the case, or None."""
    if case.activation is not None or case.residual:
        return "activation and residual are torch's: XLA fuses what follows a layer"
    if case.single_value != "raise":
        return "single_value is torch's; JAX always gives beta"
    return None


def refuse_kernel(case: Case) -> str | None:
    """The reason why no kernel serves the case, as the documentation says, or None."""
    return refuse_kernels(case) or refuse(case)


Call = Callable[[Callable[..., Any], Any, Any], Any]


def jit(step: Callable[..., Any], rows: Any, others: Any) -> Any:
    """Call a step on one device."""
    return jax.jit(step)(rows, others)


def run(
    case: Case, data: Data, *, fused: bool | None, axis_name: str | None = None, call: Call = jit
) -> Result:
    """Run a case through the functions that the layer calls.

    `call(step, rows, others)` calls the step: `rows` are arrays that may be spread over devices,
    `others` those that every device has. Results are y, dx, and values equal on every device.
    """
    strict = jax.numpy_dtype_promotion("strict")
    with strict, jax.enable_x64(case.dtype == "float64"):
        return _run(case, data, fused, axis_name, call)


def _run(case: Case, data: Data, fused: bool | None, axis_name: str | None, call: Call) -> Result:
    dtype = jnp.dtype(case.dtype)
    wide = jnp.float64 if case.dtype == "float64" else jnp.float32
    training = case.mode == "train"
    options = Options(
        eps=case.eps,
        decay=case.decay,
        virtual_batch_size=case.ghost if training else None,
        padded_output=case.padded_output,
        debias=case.debias,
    )
    kept = {f: a for f, a in zip(State._fields, data.state, strict=True) if a is not None}
    running = Running(
        **{f: _array(a, jnp.int32 if f == "batches" else wide) for f, a in kept.items()}
    )
    rows = {
        "x": _array(data.x, dtype),
        "dy": _array(data.dy, dtype),
        "mask": None if data.mask is None else jnp.asarray(data.mask),
        "s": _array(data.s, wide) if case.adjusted else None,
        "t": _array(data.t, wide) if case.adjusted else None,
    }
    limits = case.renorm
    if case.late_limits:  # data of the compiled step
        limits = {name: _array(limit, wide) for name, limit in (case.renorm or {}).items()}

    def step(rows: dict[str, Any], others: Any) -> Any:
        *parameters, running, late = others
        renorm = None
        if limits is not None and training:
            renorm = Renorm(0.99, **(late if case.late_limits else limits))
        settings = Settings("case", case.axis, replace(options, renorm=renorm), fused, axis_name)

        def forward(x: Any, gamma: Any, beta: Any) -> Any:
            found = []
            for part in _passes(case, {**rows, "x": x}):
                arrays = Arrays(part["x"], part["mask"], gamma, beta, running, part["s"], part["t"])
                if not training:
                    return normalize_running(arrays, settings), running
                found.append(normalize_batch(arrays, settings, update=_moves_at_once(case)))
            after = found[0].running
            if case.passes > 1 and case.update:
                moments = merge_moments([step.moments for step in found])
                after = move_statistics(running, moments, settings.options)
            return jnp.concatenate([step.y for step in found]), after

        y, transpose, state = jax.vjp(forward, rows["x"], *parameters, has_aux=True)
        dx, *gradients = transpose(rows["dy"])
        return y, dx, (gradients, state)

    late = limits if case.late_limits else None
    others = (_array(data.gamma, wide), _array(data.beta, wide), running, late)
    y, dx, ((dgamma, dbeta), state) = call(step, rows, others)
    for found, expected in [
        *((a.dtype, dtype) for a in (y, dx)),
        *zip(_types(state), _types(running), strict=True),
    ]:
        check_type(found, expected)
    y, dx, dgamma, dbeta = map(_numpy, (y, dx, dgamma, dbeta))
    return Result(y, dx, dgamma, dbeta, State(*map(_numpy, state)))


def _types(tree: Any) -> list[Any]:
    return [a.dtype for a in jax.tree.leaves(tree)]


def _moves_at_once(case: Case) -> bool:
    return case.update and case.passes == 1


def _passes(case: Case, rows: dict[str, Any]) -> list[dict[str, Any]]:
    """The arrays of each forward pass of the step."""
    return split_arrays(case, rows) if case.mode == "train" else [rows]


def _array(a: Any, dtype: Any) -> Any:
    return None if a is None else jnp.asarray(np.asarray(a).astype(dtype))


def _numpy(a: Any) -> Any:
    return None if a is None else np.asarray(a).astype(np.float64)
