"""The kernels inside XLA: threads, types, and calls that were not made by this library."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import batchnorm
import tolerances
from batchnorm.core.layout import make_layout
from batchnorm.jax import batch_norm, custom_calls
from batchnorm.kernels import cpu

# Many calls at once, from Python threads and as independent parts of one program.
CONCURRENT = """
import hashlib, os, sys
if sys.argv[1] != "all":
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from concurrent.futures import ThreadPoolExecutor
import jax, jax.numpy as jnp, numpy as np
from batchnorm.jax import batch_norm

rng = np.random.default_rng(0)
xs = rng.normal(size=(6, 16411, 8)).astype(np.float32)
mask = rng.random(16411) < 0.5  # large enough for several threads

@jax.jit
def step(xs):
    found = []
    for i in range(xs.shape[0]):  # independent of each other: XLA may run them together
        x = xs[i]
        y, transpose = jax.vjp(lambda a: batch_norm(a, mask=mask, fused=True)[0], x)
        found.append((y, transpose(jnp.cos(x))[0]))
    return found

with ThreadPoolExecutor(8) as pool:
    results = list(pool.map(lambda _: jax.tree.map(np.asarray, step(xs)), range(24)))
parts = [[a.tobytes() for a in jax.tree.leaves(r)] for r in results]
digests = {hashlib.sha256(b"".join(p)).hexdigest() for p in parts}
assert len(digests) == 1, digests
print(digests.pop())
"""


def run_concurrently(affinity: str, flags: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", CONCURRENT, affinity],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_concurrent_calls_end_and_bits_do_not_depend_on_threads() -> None:
    one_thread = run_concurrently("one", "--xla_cpu_multi_thread_eigen=false")
    assert len(one_thread) == 64
    assert run_concurrently("one", "") == one_thread
    assert run_concurrently("all", "") == one_thread


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
def test_every_floating_type(dtype: str) -> None:
    with jax.enable_x64(dtype == "float64"):
        rng = np.random.default_rng(0)
        x, dy = (jnp.asarray(rng.normal(size=(67, 5)), dtype) for _ in range(2))
        mask = rng.random(67) < 0.6

        @jax.jit
        def step(x: Any, dy: Any) -> Any:
            y, transpose = jax.vjp(lambda a: batch_norm(a, mask=mask, fused=True)[0], x)
            return y, transpose(dy)[0]

        y, dx = step(x, dy)
        assert y.dtype == dx.dtype == x.dtype
        exact = [np.asarray(a, np.float64) for a in (x, dy)]
        expected, _ = batchnorm.batch_norm(exact[0], mask=mask)
        gradient, *_ = batchnorm.batch_norm_gradient(exact[1], exact[0], mask=mask)
        tol = tolerances.FLOAT64 if dtype == "float64" else tolerances.FLOAT32
        for found, true in ((y, expected), (dx, gradient)):
            bound = 10 * tol * (1 + np.abs(true)) + tolerances.output_rounding(dtype, true)
            assert (np.abs(np.asarray(found, np.float64) - true) <= bound).all()


@pytest.mark.parametrize("shape", [(6,), (6, 7), (6, 7, 1), (1, 7, 1), (6, 1, 1)])
@pytest.mark.parametrize(
    "dtype", ["bool", "int8", "uint8", "int16", "uint16", "int32", "uint32", "int64", "uint64"]
)
def test_masks_of_every_type_are_read_in_place(dtype: str, shape: Any) -> None:
    with jax.enable_x64(dtype.endswith("64")):
        x = jnp.asarray(np.random.default_rng(0).normal(size=(6, 7, 5)), jnp.float32)
        mask = jnp.asarray((np.random.default_rng(1).random(shape) < 0.6) * 2).astype(dtype)
        lowered = jax.jit(lambda x, m: batch_norm(x, mask=m, fused=True)[0]).lower(x, mask)
        assert f"convert({dtype}" not in lowered.as_text()
        compiled = lowered.compile()
        assert "convert" not in compiled.as_text()
        expected, _ = batchnorm.batch_norm(np.asarray(x), mask=np.asarray(mask) != 0)
        np.testing.assert_allclose(compiled(x, mask), expected, rtol=1e-5, atol=1e-5)


def test_wide_integers_count_as_real_whichever_bits_are_set() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    mask = jnp.asarray([1 << 30, 0, 256, -1], jnp.int32)
    found = jax.jit(lambda mask: batch_norm(x, mask=mask, fused=True)[0])(mask)
    np.testing.assert_array_equal(found, batch_norm(x, mask=mask != 0, fused=True)[0])


def call_forward(x: jax.Array, geometry: Any, numbers: Any) -> Any:
    none = jnp.zeros((0,), jnp.float32)
    outputs = (
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        jax.ShapeDtypeStruct((len(cpu.STATISTICS), 3), x.dtype),
        jax.ShapeDtypeStruct((1,), x.dtype),
    )
    call = jax.ffi.ffi_call("batchnorm_forward", outputs)
    settings = {"batch": np.bool_(True), "renorm": np.bool_(False)}
    return call(x, *[none] * 7, geometry=geometry, numbers=numbers, **settings)


@pytest.mark.parametrize(
    ("geometry", "numbers", "message"),
    [
        ([9, 3, 1, 1, 1, 1, 0, 0], [1e-5, 0, 0, 0], "geometry must have the elements of x"),
        ([8, 3, 1], [1e-5, 0, 0, 0], "geometry must have 8 entries"),
        ([8, 3, 1, 1, 1, 1, 0, 0], [1e-5], "numbers must have 4 entries"),
    ],
)
def test_a_geometry_that_does_not_fit_is_refused(geometry: Any, numbers: Any, message: str) -> None:
    assert custom_calls.refuse(make_layout("test", (8, 3), -1), "float32", None) is None
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(
            call_forward(
                jnp.zeros((8, 3)), np.array(geometry, np.int64), np.array(numbers, np.float64)
            )
        )
