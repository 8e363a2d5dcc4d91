"""The kernels inside XLA: threads, types, and calls that were not made by this library."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import batchnorm
from batchnorm.core.layout import make_layout
from batchnorm.jax import BatchNorm, batch_norm, custom_calls
from batchnorm.kernels.kept import STATISTICS
from batchnorm.verification import tolerances

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


LAYOUT = {"outer": 8, "channels": 3, "inner": 1, "groups": 1, "run": 1}
VIEW = {"repeat": 1, "outer": 0, "inner": 0}
NUMBERS = {"eps": 1e-5}
FLAGS = ("batch", "renorm", "update", "zero_padding")


def attributes(**changes: Any) -> dict[str, Any]:
    """The attributes of a forward step of shape (8, 3)."""

    def named(sizes: dict[str, int]) -> dict[str, np.int64]:
        return {name: np.int64(n) for name, n in sizes.items()}

    numbers = {name: np.float64(n) for name, n in NUMBERS.items()}
    flags = {name: np.bool_(name == "batch") for name in FLAGS}
    return {"layout": named(LAYOUT), "view": named(VIEW), **numbers, **flags, **changes}


NONE = np.zeros((0,), np.float32)
CHANNELS = np.ones((3,), np.float32)


def outputs(moved: int = 0) -> tuple[jax.ShapeDtypeStruct, ...]:
    shapes = ((8, 3), (len(STATISTICS), 3), (1,), (moved,), (moved,))
    return tuple(jax.ShapeDtypeStruct(shape, np.float32) for shape in shapes)


def call_forward(x: jax.Array, absent: int = 9, **given: Any) -> Any:
    return jax.ffi.ffi_call("batchnorm_forward", outputs())(x, *[NONE] * absent, **given)


def without(sizes: dict[str, int], name: str) -> dict[str, np.int64]:
    return {n: np.int64(size) for n, size in sizes.items() if n != name}


REFUSED = {
    "rows that x does not have": (
        {"layout": without(LAYOUT, "outer") | {"outer": np.int64(9)}},
        "layout must have the elements of x, 24",
    ),
    "a layout without a size": (
        {"layout": without(LAYOUT, "run")},
        "attribute run must be an int64",
    ),
    "a layout of other integers": (
        {"layout": without(LAYOUT, "inner") | {"inner": np.int32(1)}},
        "attribute inner must be an int64",
    ),
    "no dictionary": ({"layout": np.int64(8)}, "attribute layout must be a dictionary"),
    "half a number": ({"eps": np.float32(1e-5)}, "attribute eps must be a float64"),
    "renormalization without limits": ({"renorm": np.bool_(True)}, "limits must have 3 elements"),
    "a flag as a number": ({"batch": np.int64(1)}, "attribute batch must be a bool"),
}


@pytest.fixture
def registered() -> None:
    jax.clear_caches()  # equal numbers of other types would share a program
    assert custom_calls.refuse(make_layout((8, 3), -1), "float32", None) is None


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED)
def test_a_call_is_refused_with(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call_forward(jnp.zeros((8, 3)), **attributes(**changes)))


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("name", attributes())
def test_a_call_is_refused_without(name: str) -> None:
    given = attributes()
    del given[name]
    with pytest.raises(Exception, match=f"attribute {name} must be"):
        jax.block_until_ready(call_forward(jnp.zeros((8, 3)), **given))


@pytest.mark.usefixtures("registered")
def test_a_call_is_refused_with_other_operands() -> None:
    with pytest.raises(Exception, match="must have 10 operands and 5 results"):
        jax.block_until_ready(call_forward(jnp.zeros((8, 3)), absent=5, **attributes()))


@pytest.mark.usefixtures("registered")
def test_a_mask_of_floats_is_refused() -> None:
    call = jax.ffi.ffi_call("batchnorm_forward", outputs())
    with pytest.raises(Exception, match="a mask must be of booleans or integers"):
        jax.block_until_ready(call(jnp.zeros((8, 3)), jnp.ones(8), *[NONE] * 8, **attributes()))


@pytest.mark.usefixtures("registered")
def test_a_call_by_names_normalizes() -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    y, _, count, _, _ = call_forward(x, **attributes())
    np.testing.assert_array_equal(y, batch_norm(x, fused=True)[0])
    np.testing.assert_array_equal(count, [8])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(
    ("running", "decay", "moved", "message"),
    [
        ((CHANNELS, CHANNELS), NONE, 3, "decay must have 1 element"),
        ((NONE, CHANNELS), CHANNELS[:1], 3, "a value for each channel"),
        ((CHANNELS, CHANNELS[:2]), CHANNELS[:1], 3, "a value for each channel"),
        ((CHANNELS, CHANNELS), CHANNELS[:1], 0, "a value for each channel"),
        ((CHANNELS.astype(np.float16), CHANNELS), CHANNELS[:1], 3, "keep their type"),
    ],
)
def test_an_update_is_refused_with(running: Any, decay: Any, moved: int, message: str) -> None:
    call = jax.ffi.ffi_call("batchnorm_forward", outputs(moved))
    given = (jnp.zeros((8, 3)), *[NONE] * 3, *running, *[NONE] * 3, decay)
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(call(*given, **attributes(update=np.bool_(True))))


@pytest.mark.parametrize("mask", [None, np.arange(8) != 3], ids=["no mask", "mask"])
def test_a_step_of_a_layer_is_two_calls_and_nothing_else(mask: Any) -> None:
    layer = BatchNorm(3, rngs=nnx.Rngs(0))
    graph, parameters, rest = nnx.split(layer, nnx.Param, ...)

    def step(parameters: Any, rest: Any, x: Any, dy: Any) -> Any:
        def forward(parameters: Any, x: Any) -> Any:
            module = nnx.merge(graph, parameters, rest, copy=True)
            y = module(x, mask=mask)
            return y, nnx.state(module, nnx.BatchStat)

        y, transpose, moved = jax.vjp(forward, parameters, x, has_aux=True)
        return y, transpose(dy), moved

    x = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)
    text = jax.jit(step).lower(parameters, rest, x, x).compile().as_text()
    names = {"parameter", "constant", "custom-call", "get-tuple-element", "tuple"}
    body = text[text.index("ENTRY") :]
    found = re.findall(r"^  (?:ROOT )?%\S+ = .*? ([a-z-]+)\(", body, re.MULTILINE)
    assert set(found) == names
    assert found.count("custom-call") == 2
