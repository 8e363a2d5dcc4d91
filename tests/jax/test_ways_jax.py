"""The record of a call, and the ways through it."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from batchnorm.core.config import Options
from batchnorm.core.running import Running
from batchnorm.jax.call import Arrays, Call, Settings, make_call
from batchnorm.jax.ways import ARRAY_CODE, KERNELS, WAYS, choose, refuse
from batchnorm.kernels import explanation, extension

needs_kernels = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 5, 3)), jnp.float32)
RUNNING = Running(jnp.full(3, 0.1), jnp.full(3, 2.0))
EVERY: Any = pytest.mark.parametrize("fused", [None, True, False])
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32, sums of a few dozen terms


def record(fused: bool | None = None, training: bool = True, **given: Any) -> Call:
    settings = Settings("test", given.pop("axis", -1), given.pop("options", Options()), fused)
    return make_call(Arrays(X, running=RUNNING, **given), settings, training, update=training)


def test_the_fastest_way_comes_first() -> None:
    assert [way.name for way in WAYS] == [explanation.KERNELS, explanation.ARRAY_CODE]


@needs_kernels
@pytest.mark.parametrize("training", [True, False])
def test_fused_decides_between_ways_that_would_do(training: bool) -> None:
    assert choose(record(True, training)) is KERNELS
    assert choose(record(False, training)) is ARRAY_CODE
    assert choose(record(None, training)) is (KERNELS if training else ARRAY_CODE)
    assert refuse(KERNELS, record(False, training)) == explanation.UNFUSED
    assert refuse(ARRAY_CODE, record(True, training)) == "fused=True demands a kernel"


REASONS: Any = {
    "adjustment": ({"s": jnp.ones(3)}, "none takes an adjustment"),
    "mask": ({"mask": X > 0}, "none takes a mask that differs between channels"),
    "axes": ({"axis": (0, 2), "running": None}, "channel axes (0, 2) are apart in memory"),
}


@needs_kernels
@pytest.mark.parametrize(("given", "reason"), REASONS.values(), ids=REASONS)
def test_kernels_say_what_they_do_not_take(given: Any, reason: str) -> None:
    arrays = Arrays(X, **{"running": RUNNING} | {n: a for n, a in given.items() if n != "axis"})
    for fused in (None, True):
        settings = Settings("test", given.get("axis", -1), Options(), fused)
        call = make_call(arrays, settings, training=True, update=False)
        assert refuse(KERNELS, call) == reason
    with pytest.raises(ValueError, match=r"fused=True demands a kernel, but .*"):
        choose(call)


@needs_kernels
def test_ways_agree() -> None:
    found = [way.train(record()) for way in WAYS]
    for a, b in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_allclose(a, b, **CLOSE)
    y, expected = (way.evaluate(record(training=False)) for way in WAYS)
    np.testing.assert_allclose(y, expected, **CLOSE)


@EVERY
def test_one_row_comes_back_as_it_came(fused: bool | None) -> None:
    settings = Settings("test", -1, Options(), fused)
    call = make_call(Arrays(X[0, 0], running=RUNNING), settings, training=True, update=False)
    assert call.operands.x.shape == (1, 3)
    if fused is not True or extension.missing_reason() is None:
        assert choose(call).train(call).y.shape == (3,)


def test_the_record_answers_questions() -> None:
    call = record(True, s=jnp.ones(3))
    assert call.demanded
    assert call.adjusted
    assert (call.owner, call.options, call.working_type) == ("test", Options(), jnp.float32)
    assert not record().demanded
    assert not record().adjusted


def test_an_adjustment_is_of_training_alone() -> None:
    call = record(training=False, s=jnp.ones(3) * 2)
    assert not call.adjusted
    np.testing.assert_array_equal(
        choose(call).evaluate(call), ARRAY_CODE.evaluate(record(training=False))
    )
    if extension.missing_reason() is None:
        assert choose(record(True, training=False, s=jnp.ones(3))) is KERNELS


def test_ghost_batches_are_of_training_alone() -> None:
    options = Options(virtual_batch_size=2)
    assert record(options=options).layout.groups == 4
    assert record(options=options, training=False).layout.groups is None
