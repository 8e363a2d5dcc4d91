"""The number of times that array code must read whole arrays: it bounds the speed on a GPU.

XLA fuses independent sums and elementwise operations into one pass over their inputs; a sum that
needs the result of another sum is a pass of its own.
"""

from __future__ import annotations

import math
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import Literal

from batchnorm.jax import batch_norm, primitives

SHAPE = (64, 8)
PLAIN = {
    "batchnorm_step": primitives._step_arrays,
    "batchnorm_tangent": primitives._tangent_arrays,
    "batchnorm_gradient": primitives._gradient_arrays,
}
FUSED = pytest.mark.parametrize("fused", [None, False])
OPTIONS = pytest.mark.parametrize(
    "options",
    [{}, {"mask": jnp.arange(SHAPE[0]) < 50}, {"virtual_batch_size": 16}],
    ids=["plain", "mask", "ghost"],
)


def rounds(function: Any, *arguments: Any) -> list[int]:
    """For each result of `function`, the longest chain of sums over whole arrays."""
    closed = jax.make_jaxpr(function)(*arguments)
    return _rounds(closed.jaxpr, [0] * len(closed.jaxpr.invars))


def _rounds(jaxpr: Any, given: list[int]) -> list[int]:
    found = dict.fromkeys(jaxpr.constvars, 0) | dict(zip(jaxpr.invars, given, strict=True))

    def of(a: Any) -> int:
        return 0 if isinstance(a, Literal) else found[a]

    for equation in jaxpr.eqns:
        before = [of(a) for a in equation.invars]
        name, inner = equation.primitive.name, _inner(equation)
        if inner is not None:
            after = _rounds(inner, before)
        else:
            whole = any(a.aval.size == math.prod(SHAPE) for a in equation.invars)
            sums = name.startswith("reduce_") and whole
            after = [max(before, default=0) + sums] * len(equation.outvars)
        found.update(zip(equation.outvars, after, strict=True))
    return [of(a) for a in jaxpr.outvars]


def _inner(equation: Any) -> Any:
    if equation.primitive.name in PLAIN:
        function = partial(PLAIN[equation.primitive.name], **equation.params)
        return jax.make_jaxpr(function)(*(a.aval for a in equation.invars)).jaxpr
    inner = equation.params.get("jaxpr", equation.params.get("call_jaxpr"))
    return getattr(inner, "jaxpr", inner)


def transpose_of(fused: bool | None, options: dict[str, Any]) -> Any:
    def forward(x: Any, scale: Any, bias: Any) -> Any:
        return batch_norm(x, scale, bias, fused=fused, **options)[0]

    x, scale = jnp.ones(SHAPE), jnp.ones(SHAPE[1])
    return jax.vjp(forward, x, scale, scale)[1]


@FUSED
@OPTIONS
def test_forward_sums_twice(fused: bool | None, options: dict[str, Any]) -> None:
    step = partial(batch_norm, fused=fused, **options)
    assert max(rounds(step, jnp.ones(SHAPE), jnp.ones(8), jnp.ones(8))) == 2


@pytest.mark.sample(3)
@FUSED
@OPTIONS
def test_backward_sums_once(fused: bool | None, options: dict[str, Any]) -> None:
    transpose = transpose_of(fused, options)
    assert rounds(lambda transpose, dy: transpose(dy), transpose, jnp.ones(SHAPE)) == [1, 1, 1]


@OPTIONS
def test_one_whole_array_is_saved(options: dict[str, Any]) -> None:
    saved = jax.tree.leaves(transpose_of(None, options))
    assert [a.size for a in saved if a.size >= math.prod(SHAPE)] == [math.prod(SHAPE)]


def test_a_sum_that_needs_another_counts() -> None:
    assert rounds(lambda x: x - x.mean(0), jnp.ones(SHAPE)) == [1]
    assert rounds(lambda x: x.var(0), jnp.ones(SHAPE)) == [2]


def sweeps(function: Any, *arguments: Any) -> int:
    """Sweeps over whole arrays: one for each round of sums, and one that writes what needs them."""
    closed = jax.make_jaxpr(function)(*arguments)
    found = _rounds(closed.jaxpr, [0] * len(closed.jaxpr.invars))
    whole = [a.aval.size == math.prod(SHAPE) for a in closed.jaxpr.outvars]
    return max(n + written for n, written in zip(found, whole, strict=True))


@FUSED
@OPTIONS
def test_jitted_array_code_reads_x_three_times(fused: bool | None, options: dict[str, Any]) -> None:
    """And x and dy twice in the backward pass; docs/gpu.md says what XLA makes of that."""
    step = jax.jit(partial(batch_norm, fused=fused, **options))
    assert sweeps(step, jnp.ones(SHAPE), jnp.ones(8), jnp.ones(8)) == 3
    transpose = jax.jit(lambda transpose, dy: transpose(dy))
    assert sweeps(transpose, transpose_of(fused, options), jnp.ones(SHAPE)) == 2


@pytest.mark.skipif(
    find_spec("jax_cuda12_plugin") is None,
    reason="needs jax-cuda12-plugin and jax-cuda12-pjrt, which compile for a card without one",
)
def test_programs_for_an_h100_read_x_three_times() -> None:
    """In a process of its own, since importing the script hides GPUs from JAX."""
    script = Path(__file__).parents[2] / "benchmarks" / "count_passes.py"
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if "whole arrays" in line]
    assert len(lines) == 16
    for line in lines:
        wanted = "3 read, 1 written" if " forward " in line else "4 read, 1 written"
        assert line.endswith(wanted), line
