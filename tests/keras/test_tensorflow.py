"""Features of the TensorFlow backend alone: graphs, unknown sizes, XLA, saved models."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("needs the TensorFlow backend", allow_module_level=True)

import tensorflow as tf

from batchnorm import explain
from batchnorm.core.moments import centre
from batchnorm.keras import BatchNormalization, MaskedBatchNormalization
from batchnorm.keras.backends.tensorflow import passes
from batchnorm.keras.backends.tensorflow.arrays import XP
from batchnorm.keras.backends.tensorflow.sums import sum_axes
from batchnorm.kernels.explanation import ARRAY_CODE, KERNELS

EPS = 1e-3


def draw(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(2.0, 3.0, shape).astype("float32")


def normalized(x: np.ndarray, real: np.ndarray) -> np.ndarray:
    wide = x.astype("float64")
    return (wide - wide[real].mean(0)) / np.sqrt(wide[real].var(0) + EPS)


def step(layer: Any, signature: list[Any], **options: Any) -> Any:
    """y and dx of a training step as a graph of this signature."""

    def run(x: tf.Tensor, mask: tf.Tensor, dy: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer((x, mask), training=True)
        return y, tape.gradient(y, x, dy)

    return tf.function(run, input_signature=signature, **options)


def spec(*shape: int | None, dtype: tf.DType = tf.float32) -> tf.TensorSpec:
    return tf.TensorSpec(shape, dtype)


@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("rows", [(None, None), (None, 6), (4, None)])
@pytest.mark.parametrize("mask_rows", [(None, None), (None,), (None, None, 1)])
def test_unknown_sizes(rows: Any, mask_rows: Any, fused: bool | None) -> None:
    x, dy = draw(4, 6, 3), draw(4, 6, 3, seed=1)
    mask = np.random.default_rng(2).random((4, 6)) < 0.6
    if len(mask_rows) == 1:
        mask = np.broadcast_to(np.array([True, False, True, True])[:, None], (4, 6))
    given = mask[:, 0] if len(mask_rows) == 1 else mask.reshape(4, 6, *mask_rows[2:])
    layer = BatchNormalization(momentum=0.0, fused=fused)
    layer.build((None, None, 3))
    run = step(layer, [spec(*rows, 3), spec(*mask_rows, dtype=tf.bool), spec(None, None, 3)])
    y, dx = run(x, given, dy)
    np.testing.assert_allclose(y, normalized(x, mask), atol=1e-5)
    np.testing.assert_array_equal(dx.numpy()[~mask], 0.0)
    np.testing.assert_allclose(dx.numpy()[mask].sum(0), 0.0, atol=1e-4)
    np.testing.assert_allclose(layer.moving_mean, x[mask].mean(0), rtol=1e-5)
    assert run(np.concatenate([x] * 2)[:4], given, dy)[0].shape == (4, 6, 3)


@pytest.mark.parametrize("fused", [None, False])
def test_unknown_batch_size_without_mask(fused: bool | None) -> None:
    layer = BatchNormalization(momentum=0.0, fused=fused)
    layer.build((None, 3))
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec(None, 3)])
    for n in (7, 1, 0, 16):
        x = draw(n, 3, seed=n)
        y = call(x)
        assert y.shape == (n, 3)
        if n:
            np.testing.assert_allclose(y, normalized(x, np.ones(n, bool)), atol=1e-5)
    np.testing.assert_allclose(layer.moving_mean, draw(16, 3, seed=16).mean(0), rtol=1e-5)


@pytest.mark.parametrize("fused", [None, False])
def test_unknown_batch_size_with_ghost_batches(fused: bool | None) -> None:
    layer = BatchNormalization(momentum=0.0, virtual_batch_size=4, fused=fused)
    layer.build((None, 3))
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec(None, 3)])
    x = draw(12, 3)
    y = call(x).numpy()
    for group in range(3):
        rows = np.arange(12) % 3 == group
        np.testing.assert_allclose(y[rows], normalized(x, rows)[rows], atol=1e-5)
    with pytest.raises(
        tf.errors.InvalidArgumentError, match=r"virtual_batch_size=4 must divide[^$]*10"
    ):
        call(draw(10, 3))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("options", [{}, {"fused": False}, {"renorm": True, "fused": False}])
def test_a_constant_without_channels_in_a_graph(options: Any, training: bool) -> None:
    layer = BatchNormalization(**options)
    layer.build((4, 0))

    @tf.function
    def run() -> Any:
        with tf.GradientTape() as tape:
            y = layer(tf.ones((4, 0)), training=training)
        return y, tape.gradient(y, [layer.gamma.value, layer.beta.value])

    y, gradients = run()
    assert y.shape == (4, 0)
    assert [a.shape for a in gradients] == [(0,), (0,)]


def test_adjustment_gets_a_tensor_where_sizes_are_unknown() -> None:
    layer = BatchNormalization(adjustment=lambda shape: (tf.fill((shape[0], 1), 2.0), None))
    layer.build((None, 3))
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec(None, 3)])
    x = draw(8, 3)
    np.testing.assert_allclose(call(x), 2 * normalized(x, np.ones(8, bool)), atol=1e-5)


def test_unknown_rank_is_refused() -> None:
    call = tf.function(lambda x: BatchNormalization()(x), input_signature=[tf.TensorSpec(None)])
    with pytest.raises(ValueError, match="inputs must have a known rank"):
        call.get_concrete_function()


@pytest.mark.parametrize("compiled", [False, True])
def test_mask_values_and_batches_do_not_retrace(compiled: bool) -> None:
    layer = MaskedBatchNormalization()
    layer.build((32, 3))
    signature = [spec(32, 3), spec(32, dtype=tf.bool), spec(32, 3)]
    run = step(layer, signature, jit_compile=compiled)
    for seed in range(3):
        x, mask = draw(32, 3, seed=seed), np.random.default_rng(seed).random(32) < 0.5
        np.testing.assert_allclose(run(x, mask, x)[0], normalized(x, mask), atol=1e-5)
    assert run.experimental_get_tracing_count() == 1


def test_models_fit_under_xla_and_eagerly() -> None:
    x, found = draw(32, 4), []
    for options in ({"jit_compile": True}, {"run_eagerly": True}, {"jit_compile": False}):
        layer = BatchNormalization(momentum=0.0)
        model = keras.Sequential([keras.Input((4,)), layer])
        model.compile("sgd", "mse", **options)
        model.fit(x, x, batch_size=16, shuffle=False, epochs=2, verbose=0)
        found.append(np.concatenate([np.asarray(w) for w in layer.weights]))
    np.testing.assert_allclose(found[0], found[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(found[0], found[2], rtol=1e-4, atol=1e-5)


def test_kernel_demanded_under_xla_says_why_there_is_none() -> None:
    layer = BatchNormalization(fused=True)
    layer.build((None, 3))
    call = tf.function(lambda x: layer(x, training=True), jit_compile=True)
    with pytest.raises(ValueError, match="fused=True demands a kernel, but XLA cannot call it"):
        call(draw(8, 3))
    np.testing.assert_allclose(  # without XLA there is one
        layer(draw(8, 3), training=True), normalized(draw(8, 3), np.ones(8, bool)), atol=1e-5
    )


@pytest.mark.parametrize(
    ("sizes", "fused", "python"),
    [
        ((8, 3), None, False),
        ((8, 3), True, True),
        ((8, 3), False, False),
        ((None, 3), None, True),
        ((20_000, 3), None, True),
    ],
)
def test_graphs_call_python_where_x_may_be_large(sizes: Any, fused: Any, python: bool) -> None:
    layer = BatchNormalization(fused=fused)
    layer.build(sizes)
    call = tf.function(lambda x: layer(x, training=True), input_signature=[spec(*sizes)])
    kinds = {operation.type for operation in call.get_concrete_function().graph.get_operations()}
    assert ("PyFuncStateless" in kinds) == python
    x = draw(*(20 if n is None else n for n in sizes))
    np.testing.assert_allclose(call(x), normalized(x, np.ones(len(x), bool)), atol=1e-5)


def test_a_graph_says_that_x_is_small() -> None:
    layer, found = BatchNormalization(), []
    layer.build((8, 3))
    tf.function(lambda x: found.append(explain(layer, x, training=True)))(draw(8, 3))
    reason = "a graph runs array code faster on up to 32768 elements than it calls Python"
    assert (found[0].way, found[0].refused) == (ARRAY_CODE, ((KERNELS, reason),))


DTYPES = ["float16", "bfloat16", "float32", "float64"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_eager_steps_copy_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken, made, forward = [], [], passes.forward

    def watched(known: Any, *arrays: Any) -> Any:
        found = forward(known, *arrays)
        taken.append(arrays[0].ctypes.data)
        made.append(found[0].ctypes.data)
        return found

    monkeypatch.setattr(passes, "forward", watched)
    layer = BatchNormalization(dtype=keras.DTypePolicy(dtype))
    layer.build((8, 3))
    x = tf.cast(draw(8, 3), dtype)
    y = layer(x, training=True)
    assert taken == [np.asarray(x).ctypes.data]
    assert made == [np.asarray(y).ctypes.data]
    assert y.dtype == x.dtype
    held = y.numpy()
    del layer
    gc.collect()
    np.testing.assert_array_equal(y.numpy(), held)


@pytest.mark.parametrize("jit_compile", [False, True])
@pytest.mark.parametrize("sizes", [(200_003, 2), (None, 2), (2, None, 2), (100_001, 2, 2)])
def test_many_rows_at_an_offset(sizes: Any, jit_compile: bool) -> None:
    # An offset whose multiples need all digits: sums of them one after another lose most.
    shape = {200_003: sizes, None: (200_003, 2), 2: (2, 100_001, 2)}.get(sizes[0], sizes)
    x = (np.random.default_rng(0).normal(size=shape) + 1.234567e6).astype("float32")
    layer = BatchNormalization(epsilon=EPS, fused=False)
    layer.build((*sizes[:-1], 2))
    call = tf.function(
        lambda x: layer(x, training=True), input_signature=[spec(*sizes)], jit_compile=jit_compile
    )
    y = call(x).numpy().reshape(-1, 2)
    expected = normalized(x.reshape(-1, 2), np.ones(y.shape[0], bool))
    assert (np.abs(y - expected) <= 5e-6 * (1 + np.abs(expected))).all()


@pytest.mark.parametrize("sizes", [(300, 2), (None, 2), (3, 50, 2), (0, 2)])
def test_sums_in_blocks_and_their_gradient(sizes: Any) -> None:
    shape = (300, 2) if None in sizes else sizes
    x = np.random.default_rng(0).integers(-100, 100, shape).astype("float32")
    axes = list(range(len(shape) - 1))

    @tf.function(input_signature=[spec(*sizes)])
    def run(x: tf.Tensor) -> Any:
        with tf.GradientTape() as second:
            second.watch(x)
            with tf.GradientTape() as first:
                first.watch(x)
                total = sum_axes(x, axes)
                squared = tf.reduce_sum(total**2)
            dx = first.gradient(squared, x)
        return total, dx, second.gradient(dx, x, x)

    total, dx, ddx = run(x)
    exact = x.sum(tuple(axes), keepdims=True)  # of integers
    np.testing.assert_array_equal(total, exact)
    np.testing.assert_array_equal(dx, np.broadcast_to(2 * exact, shape))
    np.testing.assert_array_equal(ddx, np.broadcast_to(2 * exact, shape))


def test_third_derivatives_are_right() -> None:
    x = tf.constant(draw(9, 2) / 10, tf.float64)
    weight = tf.constant(np.random.default_rng(1).normal(size=(9, 2)))
    found = []
    for fused in (None, False):
        layer = BatchNormalization(dtype="float64", fused=fused)
        layer.build((9, 2))
        with tf.GradientTape() as third:
            third.watch(x)
            with tf.GradientTape() as second:
                second.watch(x)
                with tf.GradientTape() as first:
                    first.watch(x)
                    y = tf.reduce_sum(weight * layer(x, training=True) ** 2)
                dx = tf.reduce_sum(weight * first.gradient(y, x) ** 2)
            ddx = tf.reduce_sum(weight * second.gradient(dx, x))
        found.append(third.gradient(ddx, x).numpy())
    assert np.abs(found[0]).max() > 0.1
    np.testing.assert_allclose(found[0], found[1], rtol=1e-9)


@pytest.mark.parametrize("masked", [False, True])
def test_exported_model_gives_the_same_numbers(masked: bool, tmp_path: Path) -> None:
    x, mask = draw(8, 4, 3), np.random.default_rng(3).random((8, 4)) < 0.5
    inputs = keras.Input((4, 3), name="x"), keras.Input((4,), dtype="bool", name="mask")
    layer = BatchNormalization(momentum=0.5)
    model = keras.Model(inputs, layer(inputs if masked else inputs[0]))
    if not masked:
        model = keras.Model(inputs[0], layer(inputs[0]))
    given = [x, mask] if masked else x
    model(given, training=True)
    model.export(tmp_path / "saved", verbose=False)
    loaded = tf.saved_model.load(str(tmp_path / "saved"))
    found = loaded.serve(tuple(given) if masked else given)
    np.testing.assert_allclose(found, model(given), rtol=1e-6, atol=1e-6)


@pytest.mark.exhaustive
@pytest.mark.parametrize("way", ["eager", "graph", "xla", "unknown sizes"])
def test_counts_beyond_float32_are_rounded_once(way: str) -> None:
    rows = 2**24 + 4099  # float32 counts no further than 2^24 one by one
    x = np.ones((rows + 5, 2), "float32")
    x[1::2] += 2
    x[:, 1] += 1
    mask = np.ones(x.shape, bool)
    mask[:5] = False  # three of 1 and two of 3

    def find(x: tf.Tensor, mask: tf.Tensor) -> tuple[tf.Tensor, ...]:
        return tuple(centre(x, mask, (0,), eps=EPS, xp=XP).moments)

    signature = None
    if way == "unknown sizes":
        signature = [tf.TensorSpec((None, 2)), tf.TensorSpec((None, 2), tf.bool)]
    if way != "eager":
        find = tf.function(find, input_signature=signature, jit_compile=way == "xla")
    count, mean, var = (np.ravel(a) for a in find(tf.constant(x), tf.constant(mask)))
    np.testing.assert_allclose(count, rows, rtol=2**-24)
    np.testing.assert_allclose(mean, [2 + 1 / rows, 3 + 1 / rows], rtol=2e-7)
    np.testing.assert_allclose(var, 1, rtol=2e-6)
