"""`batchnorm.explain` on JAX: the way that a call takes, and why each faster way refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from batchnorm import explain
from batchnorm.jax import BatchNorm
from batchnorm.kernels import extension
from batchnorm.kernels.explanation import ARRAY_CODE, KERNELS

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)

SHAPE = (8, 5, 3)


def make(features=3, **options):
    return BatchNorm(features, rngs=nnx.Rngs(0), **options)


def test_training_takes_kernels_and_moves_nothing():
    layer = make()
    before = layer.mean[...]
    found = explain(layer, jnp.ones(SHAPE))
    assert (found.layer, found.way, found.refused) == ("BatchNorm", KERNELS, ())
    assert "one CPU device" in found.note
    assert jnp.array_equal(layer.mean[...], before)


REFUSED = {
    "fused": ({"fused": False}, {}, "fused=False asks for array code"),
    "evaluation": (
        {},
        {"use_running_average": True},
        "the compiler fuses evaluation with what surrounds it",
    ),
    "mask": (
        {},
        {"mask": jnp.ones(SHAPE, bool)},
        "none takes a mask that differs between channels",
    ),
    "axes": (
        {"features": (8, 3), "axis": (0, 2)},
        {},
        "channel axes (0, 2) are apart in memory",
    ),
}


@pytest.mark.parametrize(("options", "arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_array_code_has_a_reason(options, arguments, reason):
    found = explain(make(**options), jnp.ones(SHAPE), **arguments)
    assert (found.way, found.refused) == (ARRAY_CODE, ((KERNELS, reason),))


def test_named_axes_are_array_code():
    layer, found = make(axis_name="batch"), []

    def one(x):
        found.append(explain(layer, x))
        return x

    jax.vmap(one, axis_name="batch")(jnp.ones((2, *SHAPE)))
    assert found[0].refused == ((KERNELS, "none synchronizes over a named axis"),)


def test_a_layer_without_weights_has_no_way():
    with pytest.raises(ValueError, match="not initialized, and has no way yet"):
        explain(BatchNorm(), jnp.ones(SHAPE))


def test_the_log_tells_what_a_program_was_compiled_for():
    code = (
        "import jax, jax.numpy as jnp\n"
        "from batchnorm.jax import batch_norm\n"
        "f = lambda x: batch_norm(x)[0]\n"
        "for _ in range(2):\n    f(jnp.ones((8, 3)))\n"
        "jax.export.export(jax.jit(f))(jnp.ones((8, 3)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"BATCHNORM_EXPLAIN": "1", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = done.stderr.splitlines()
    assert lines.count("batch_norm: kernels") == 1
    assert "  not kernels: an exported program must not depend on this library" in lines
