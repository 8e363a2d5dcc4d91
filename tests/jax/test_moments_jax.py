"""Moments of passes: a named tuple with a low part, and their merging as one step (S21)."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.core import moments as core
from batchnorm.jax import Moments, batch_norm, init_running, merge_moments, update_running

TOL = 5e-6  # S3, of kernels and of eager array code
ROWS, PASSES, CHANNELS = 24, 4, 3
moments_of = jax.jit(lambda x, mask: batch_norm(x, mask=mask)[1])
merge = jax.jit(merge_moments)
merge_two = jax.jit(lambda a, b: merge_moments([a, b]))
update = jax.jit(update_running)


def normal(*shape: int, offset: float = 0.0, seed: int = 0) -> jax.Array:
    values = np.random.default_rng(seed).normal(size=shape) + offset
    return jnp.asarray(values.astype(np.float32))


def stack(parts: list[Moments]) -> Moments:
    return jax.tree.map(lambda *a: jnp.stack(a), *parts)


def assert_exact(found: Moments, x: jax.Array) -> None:
    """The moments of x as S3 demands them of one batch."""
    rows = np.asarray(x, np.float64)
    std = rows.std(0)
    np.testing.assert_array_equal(found.count, np.full(CHANNELS, len(rows)))
    np.testing.assert_allclose(found.var, rows.var(0), rtol=TOL)
    rounding = np.abs(rows.mean(0)) * 2.0**-24
    assert (np.abs(np.asarray(found.mean, np.float64) - rows.mean(0)) <= TOL * std + rounding).all()
    mean = np.asarray(found.mean, np.float64) + np.asarray(found.low, np.float64)
    assert (np.abs(mean - rows.mean(0)) <= TOL * std).all()


def test_moments_are_still_a_named_tuple_of_three() -> None:
    x = normal(ROWS, CHANNELS, offset=1e6)
    moments = batch_norm(x)[1]
    count, mean, var = moments
    assert (len(moments), Moments._fields) == (3, ("count", "mean", "var"))
    assert moments[1] is mean is moments.mean
    assert isinstance(moments, core.Moments)
    for other in (
        copy.copy(moments),
        pickle.loads(pickle.dumps(moments)),
        moments.map(lambda a: a),
    ):
        np.testing.assert_array_equal(other.low, moments.low)
    assert moments._replace(count=count + 1).low is moments.low
    assert not moments._replace(mean=mean).low.any(), "the low part was another mean's"
    assert not Moments(count, mean, var).low.any()
    assert Moments._make([count, mean, var]).var is var
    with pytest.raises(ValueError, match="unexpected field names: \\['variance'\\]"):
        moments._replace(variance=var)
    np.testing.assert_array_equal(
        update_running(init_running(3), Moments(*moments)).mean, 0.01 * mean
    )


def test_moments_are_a_tree_of_four_arrays() -> None:
    x = normal(PASSES, ROWS, CHANNELS)
    axes = Moments(0, 0, 0)
    every: Any = jax.jit(jax.vmap(lambda x: batch_norm(x)[1], out_axes=axes))(x)
    assert [a.shape for a in jax.tree.leaves(every)] == [(PASSES, CHANNELS)] * 4
    first = jax.tree.map(lambda a: a[0], every)
    assert isinstance(first, Moments)
    moved = jax.vmap(lambda m: update_running(init_running(3), m), in_axes=(axes,))(every)
    np.testing.assert_allclose(moved.mean[0], update_running(init_running(3), first).mean)
    assert {str(path[-1]) for path, _ in jax.tree.leaves_with_path(first)} == {
        ".count",
        ".mean",
        ".var",
        ".low",
    }


@pytest.mark.sample(3)
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("offset", [1.0, 1e6])
def test_passes_are_one_batch_to_the_last_digits(offset: float, fused: bool | None) -> None:
    x = normal(PASSES * 64, CHANNELS, offset=offset)
    bounds = [0, 5, 100, 101, len(x)]
    step = jax.jit(lambda x: batch_norm(x, fused=fused)[1])
    parts = [step(x[a:b]) for a, b in pairwise(bounds)]
    assert_exact(merge_moments(parts), x)
    if offset == 1e6:
        plain = merge_moments([Moments(*part) for part in parts])
        assert (np.abs(plain.var / x.var(0) - 1) > 1e-4).any(), "float32 means alone are too coarse"


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, PASSES), min_size=ROWS, max_size=ROWS), st.permutations(range(4)))
def test_any_split_in_any_order_is_the_whole_batch(owners: list[int], order: list[int]) -> None:
    """Rows of owner `PASSES` are padding in all passes."""
    x, owner = normal(ROWS, CHANNELS, offset=1e5), jnp.asarray(owners)
    parts = [moments_of(x, owner == i) for i in order]
    whole, found = moments_of(x, owner < PASSES), merge(stack(parts))
    nested = merge_two(merge_two(parts[0], parts[1]), merge_two(parts[2], parts[3]))
    for merged in (found, nested):
        np.testing.assert_array_equal(merged.count, whole.count)
        np.testing.assert_allclose(merged.var, whole.var, rtol=TOL, atol=1e-12)
        centre, std = whole.mean + whole.low, jnp.sqrt(whole.var)
        off = jnp.abs((merged.mean - whole.mean) + (merged.low - whole.low))
        assert bool((off <= TOL * std + 1e-12 * jnp.abs(centre)).all())
    moved, expected = (update(init_running(CHANNELS), m) for m in (found, whole))
    np.testing.assert_allclose(moved.var, expected.var, rtol=TOL)


def test_a_scan_carries_moments_or_stacks_them() -> None:
    x = normal(PASSES, ROWS, CHANNELS, offset=1e6)
    zeros = jnp.zeros(CHANNELS)

    def step(sofar: Moments, x: Any) -> Any:
        moments = batch_norm(x)[1]
        return merge_moments([sofar, moments]), moments

    carried, stacked = jax.jit(partial(jax.lax.scan, step))(Moments(zeros, zeros, zeros), x)
    for found in (carried, merge_moments(stacked)):
        assert_exact(found, x.reshape(-1, CHANNELS))


def test_passes_without_real_rows_contribute_nothing() -> None:
    x, running = normal(ROWS, CHANNELS), init_running(CHANNELS, debias=True)
    some, none = moments_of(x, jnp.arange(ROWS) < 9), moments_of(x, jnp.zeros(ROWS, bool))
    for field, (a, b) in enumerate(zip(merge_two(some, none), some, strict=True)):
        np.testing.assert_allclose(a, b, rtol=1e-6, err_msg=str(field))
    after = update(running, merge_two(none, none))
    jax.tree.map(np.testing.assert_array_equal, after, running)


def test_a_channel_that_is_not_finite_in_one_pass_does_not_move() -> None:
    x, mask = normal(ROWS, CHANNELS), jnp.ones(ROWS, bool)
    bad = moments_of(x.at[3, 1].set(jnp.nan), mask)
    after = update(init_running(CHANNELS), merge_two(moments_of(x, mask), bad))
    assert [float(v) for v in after.mean != 0] == [1, 0, 1]
    assert float(after.var[1]) == 1


class TestGhostBatches:
    """Averages of the groups that are not empty, whatever pass they are from (S12)."""

    STEP = staticmethod(jax.jit(lambda x, mask: batch_norm(x, mask=mask, virtual_batch_size=6)[1]))

    def test_groups_of_all_passes_are_averaged(self) -> None:
        x = normal(2, ROWS, CHANNELS, offset=3.0)
        masks = jnp.stack([jnp.ones(ROWS, bool), jnp.arange(ROWS) % 4 < 1])  # 4 groups, and 1
        parts = [self.STEP(a, mask) for a, mask in zip(x, masks, strict=True)]
        assert [part.groups for part in parts] == ["apart"] * 2
        found = merge_moments(parts)
        assert (found.groups, found.mean.shape) == ("averaged", (CHANNELS,))
        np.testing.assert_array_equal(found.count, np.full(CHANNELS, 5))
        for field in ("mean", "var"):
            every = np.concatenate([getattr(parts[0], field), getattr(parts[1], field)[:1]])
            np.testing.assert_allclose(getattr(found, field), every.mean(0), rtol=1e-6)
        again = merge_moments([merge_moments(parts[:1]), parts[1]])
        np.testing.assert_allclose(again.var, found.var, rtol=1e-6)
        np.testing.assert_allclose(merge_moments(stack(parts)).mean, found.mean, rtol=1e-6)
        after = update(init_running(CHANNELS), found)
        np.testing.assert_allclose(after.mean, 0.01 * found.mean, rtol=1e-6)

    def test_a_scan_carries_averages(self) -> None:
        x, zeros, mask = normal(PASSES, ROWS, CHANNELS), jnp.zeros(CHANNELS), jnp.ones(ROWS, bool)

        def step(sofar: Moments, x: Any) -> Any:
            return merge_moments([sofar, self.STEP(x, mask)]), None

        start = Moments(zeros, zeros, zeros, groups="averaged")
        found, _ = jax.lax.scan(step, start, x)
        expected = merge_moments([self.STEP(a, mask) for a in x])
        np.testing.assert_allclose(found.var, expected.var, rtol=1e-6)

    def test_other_moments_do_not_mix_with_them(self) -> None:
        x, mask = normal(ROWS, CHANNELS), jnp.ones(ROWS, bool)
        with pytest.raises(ValueError, match="merge_moments: parts must all be of ghost batches"):
            merge_moments([moments_of(x, mask), self.STEP(x, mask)])


def test_one_merge_at_the_end_is_one_for_each_pass() -> None:
    x = normal(2, PASSES, ROWS, CHANNELS)  # devices, passes

    @jax.jit
    @partial(jax.vmap, axis_name="device")
    def each(x: Any) -> Any:
        return merge_moments([batch_norm(part, axis_name="device")[1] for part in x])

    @jax.jit
    @partial(jax.vmap, axis_name="device")
    def once(x: Any) -> Any:
        own = merge_moments([batch_norm(part)[1] for part in x])
        return merge_moments(jax.lax.all_gather(own, "device"))

    for found in (each(x), once(x)):
        assert_exact(jax.tree.map(lambda a: a[1], found), x.reshape(-1, CHANNELS))


@pytest.mark.sample(2)
@pytest.mark.parametrize("fused", [None, False])
def test_gradients_are_those_of_the_whole_batch(fused: bool | None) -> None:
    x, (a, b) = normal(ROWS, CHANNELS), normal(2, CHANNELS, seed=1)

    def loss(x: Any, parts: int) -> Any:
        halves = [batch_norm(part, fused=fused)[1] for part in jnp.split(x, parts)]
        found = merge_moments(halves)
        return jnp.sum(a * found.mean + b * found.var)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    np.testing.assert_allclose(gradient(x, 3), gradient(x, 1), rtol=1e-4, atol=1e-6)


def test_exported_programs_take_and_return_them() -> None:
    x = normal(ROWS, CHANNELS, offset=1e6)
    moments = batch_norm(x, virtual_batch_size=12)[1]
    exported = jax.export.export(jax.jit(lambda a: merge_moments([a, a])))(moments)
    loaded = jax.export.deserialize(exported.serialize())
    found = loaded.call(moments)
    assert (type(found), found.groups) == (Moments, "averaged")
    np.testing.assert_array_equal(found.low, merge_moments([moments, moments]).low)
    # Programs exported by older versions return the core's.
    old = core.Moments(*moments_of(x, jnp.ones(ROWS, bool)))
    exported = jax.export.export(jax.jit(lambda a: a))(old)
    again = jax.export.deserialize(exported.serialize()).call(old)
    np.testing.assert_array_equal(merge_moments([again]).mean, old.mean)


X = jnp.ones((4, 3))
WRONG: dict[str, tuple[type[Exception], str, Callable[[], Any]]] = {
    "arrays": (TypeError, "parts must be Moments, .* got ArrayImpl", lambda: merge_moments(X)),
    "a tuple": (TypeError, "got float", lambda: merge_moments((1.0, 2.0, 3.0))),
    "a number": (TypeError, "got int", lambda: merge_moments(3)),
    "nothing": (ValueError, "must hold at least one; got none", lambda: merge_moments([])),
    "one": (ValueError, "Put it into a list", lambda: merge_moments(batch_norm(X)[1])),
    "none stacked": (
        ValueError,
        r"at least one; got a mean of shape \(0, 3\)",
        lambda: merge_moments(Moments(*(jnp.zeros((0, 3)),) * 3)),
    ),
    "channels": (
        ValueError,
        r"must have the same channels; got shapes \(2,\), \(3,\)",
        lambda: merge_moments([batch_norm(X)[1], batch_norm(X[:, :2])[1]]),
    ),
}


@pytest.mark.parametrize(("kind", "message", "call"), WRONG.values(), ids=WRONG)
def test_bad_parts_are_refused(
    kind: type[Exception], message: str, call: Callable[[], Any]
) -> None:
    with pytest.raises(kind, match=f"^merge_moments: .*{message}"):
        call()
