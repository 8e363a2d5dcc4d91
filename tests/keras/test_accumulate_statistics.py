"""`accumulate_statistics`: several passes that are one step of the statistics (S21)."""

from __future__ import annotations

import gc
import threading
import weakref
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    accumulate_statistics,
    keep_statistics,
)

TENSORFLOW, JAX = (name == keras_backend.NAME for name in ("tensorflow", "jax"))
accumulates = pytest.mark.skipif(JAX, reason="JAX has no place for moments")
X = np.random.default_rng(0).normal(5.0, 2.0, (24, 3)).astype("float32")
MASK = np.random.default_rng(1).random(24) < 0.6


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def layer_of(cls: type = BatchNormalization, **options: Any) -> Any:
    layer = cls(**({"momentum": 0.5} | options))
    layer.build((None, X.shape[1]))
    return layer


def state(layer: Any) -> list[np.ndarray]:
    return [array(w).copy() for w in layer.non_trainable_weights]


def check(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(found, expected, strict=True))


def fail(layer: Any, call: Any) -> None:
    """A block that raises after a pass."""

    def run() -> None:
        with accumulate_statistics(layer):
            call(X + 50.0)
            raise KeyError

    with pytest.raises(KeyError):
        run()


@pytest.mark.skipif(not JAX, reason="others accumulate")
def test_jax_names_its_own_functions() -> None:
    layer = layer_of()
    with (
        pytest.raises(ValueError, match=r"accumulate_statistics: .*batchnorm\.jax.*merge_moments"),
        accumulate_statistics(layer),
    ):
        layer(X, training=True)
    assert same(state(layer), state(layer_of()))


OPTIONS: list[tuple[type, dict[str, Any]]] = [
    (BatchNormalization, {}),
    (BatchNormalization, {"fused": False}),
    (BatchNormalization, {"renorm": True, "debias": True}),
    (BatchNormalization, {"dtype": "mixed_bfloat16"}),
    (MaskedBatchNormalization, {"debias": True}),
]


@accumulates
@pytest.mark.sample(3)
@pytest.mark.parametrize(("cls", "options"), OPTIONS)
@pytest.mark.parametrize("cuts", [(24,), (1, 24), (5, 5, 13, 24), tuple(range(1, 25))])
def test_any_split_equals_the_whole_batch(
    cls: type, options: dict[str, Any], cuts: tuple[int, ...]
) -> None:
    found, whole = layer_of(cls, **options), layer_of(cls, **options)
    for step in range(2):
        begin = 0
        with accumulate_statistics(found):
            for end in cuts:
                found(X[begin:end] + step, mask=MASK[begin:end], training=True)
                begin = end
        whole(X + step, mask=MASK, training=True)
    check(state(found), state(whole))


@accumulates
def test_offsets_lose_no_digits() -> None:
    x = (X - 5.0) / 2.0 + np.float32(1e6)
    layer = layer_of(momentum=0.0)
    with accumulate_statistics(layer):
        for part in np.split(x, 6):
            layer(part, training=True)
    np.testing.assert_allclose(array(layer.moving_variance), x.astype("float64").var(0), rtol=1e-5)


@accumulates
def test_groups_that_are_not_empty_are_averaged() -> None:
    layer = layer_of(momentum=0.0, virtual_batch_size=4)
    mask = np.ones(24, bool)
    mask[:8] = False  # the first part has no real rows
    with accumulate_statistics(layer):
        for x, real in zip(np.split(X, 3), np.split(mask, 3), strict=True):
            layer(x, mask=real, training=True)
    groups = [X[begin + i : begin + 8 : 2] for begin in (8, 16) for i in range(2)]
    expected = np.mean([g.var(0) for g in groups], axis=0)
    np.testing.assert_allclose(array(layer.moving_variance).reshape(-1), expected, rtol=1e-5)


@accumulates
def test_passes_are_normalized_by_their_own_moments_and_statistics_of_before() -> None:
    found, plain = layer_of(renorm=True), layer_of(renorm=True)
    with accumulate_statistics(found):
        for part in np.split(X, 3):
            with keep_statistics():
                expected = array(plain(part, training=True))
            np.testing.assert_array_equal(array(found(part, training=True)), expected)


@accumulates
@pytest.mark.parametrize("passes", [0, 2])
def test_without_real_rows_nothing_moves(passes: int) -> None:
    layer = layer_of(debias=True)
    before = state(layer)
    with accumulate_statistics(layer):
        for _ in range(passes):
            layer(X, mask=np.zeros(24, bool), training=True)
    assert same(state(layer), before)


@accumulates
def test_evaluation_and_kept_passes_contribute_nothing() -> None:
    layer, whole = layer_of(), layer_of()
    with accumulate_statistics(layer):
        layer(X, training=True)
        layer(X + 50.0, training=False)
        with keep_statistics():
            layer(X + 90.0, training=True)
    whole(X, training=True)
    check(state(layer), state(whole))
    before = state(layer)
    with keep_statistics(), accumulate_statistics(layer):
        layer(X + 1.0, training=True)
    assert same(state(layer), before)


@accumulates
def test_an_exception_moves_nothing_and_ends_the_block() -> None:
    layer, whole = layer_of(), layer_of()
    before = state(layer)
    fail(layer, lambda x: layer(x, training=True))
    assert same(state(layer), before)
    with accumulate_statistics(layer):
        layer(X, training=True)
    whole(X, training=True)
    check(state(layer), state(whole))


@accumulates
def test_a_channel_that_is_not_finite_stays() -> None:
    x = X.copy()
    x[3, 1] = np.nan
    layer, whole = layer_of(), layer_of()
    with accumulate_statistics(layer):
        for part in np.split(x, 3):
            layer(part, training=True)
    whole(x, training=True)
    check(state(layer), state(whole))
    assert (array(layer.moving_mean)[1], array(layer.moving_variance)[1]) == (0.0, 1.0)


@accumulates
def test_layers_of_other_models_move_as_always() -> None:
    inside, outside, whole = layer_of(), layer_of(), layer_of()
    with accumulate_statistics(inside):
        inside(X, training=True)
        outside(X, training=True)
        outside(X + 1.0, training=True)
    whole(X, training=True)
    whole(X + 1.0, training=True)
    check(state(outside), state(whole))


@accumulates
def test_blocks_of_the_same_layer_are_refused() -> None:
    layer, errors = layer_of(), []
    model = keras.Sequential([keras.Input((3,)), layer])

    def run() -> None:
        try:
            with accumulate_statistics(layer):
                pass
        except ValueError as error:
            errors.append(str(error))

    with accumulate_statistics(model):
        run()
        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        with accumulate_statistics(layer_of()):
            layer(X, training=True)
    run()
    assert len(errors) == 2
    assert all("is inside another accumulate_statistics block" in text for text in errors)
    assert array(layer.moving_mean).min() > 1.0


@accumulates
def test_what_is_no_model_of_this_library_is_refused() -> None:
    stock = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization(name="theirs")])
    with pytest.raises(ValueError, match=r"must hold layers of batchnorm\.keras"):
        accumulate_statistics(stock).__enter__()
    with pytest.raises(TypeError, match="must be a Keras model or layer; got 3"):
        accumulate_statistics(3).__enter__()
    mixed = keras.Sequential([*stock.layers, layer_of()])
    with (
        pytest.warns(UserWarning, match=r"1 of Keras's own layers \(theirs\) move in"),
        accumulate_statistics(mixed),
    ):
        pass


@accumulates
def test_keras_steps_accumulate() -> None:
    def model_of() -> Any:
        model = keras.Sequential([keras.Input((3,)), layer_of(debias=True)])
        model.compile("sgd", "mse")
        return model

    model, whole = model_of(), model_of()
    model.train_on_batch(X, X)  # compiled before the first block
    whole.train_on_batch(X, X)
    for step in range(2):
        with accumulate_statistics(model):
            for part in np.split(X + 10.0 * step, 3):
                model.train_on_batch(part, part)
        layer = whole.layers[0]
        layer(X + 10.0 * step, training=True)
        check(state(model.layers[0]), state(layer))
    model.train_on_batch(X, X)
    layer(X, training=True)
    check(state(model.layers[0]), state(layer))


@pytest.mark.skipif(not TENSORFLOW, reason="graphs of TensorFlow")
class TestGraphs:
    def test_functions_that_are_traced_inside_serve_outside_too(self) -> None:
        import tensorflow as tf

        layer, whole, traces = layer_of(debias=True), layer_of(debias=True), []

        def forward(x: Any) -> Any:
            traces.append(x)
            return layer(x, training=True)

        for compiled in (tf.function(forward), tf.function(forward, jit_compile=True)):
            for step in range(2):
                with accumulate_statistics(layer):
                    for part in np.split(X + step, 3):
                        compiled(tf.constant(part))
                    with keep_statistics():
                        compiled(tf.constant(part + 90.0))
                    layer(X[:8], training=True)  # and eager ones
                whole(np.concatenate([X + step, X[:8]]), training=True)
                check(state(layer), state(whole))
                compiled(tf.constant(X[:8] + 3.0))
                whole(X[:8] + 3.0, training=True)
                check(state(layer), state(whole))
        assert len(traces) == 2

    def test_after_an_exception_the_next_block_starts_anew(self) -> None:
        import tensorflow as tf

        layer, whole = layer_of(), layer_of()
        compiled = tf.function(lambda x: layer(x, training=True))
        fail(layer, lambda x: compiled(tf.constant(x)))
        with accumulate_statistics(layer):
            compiled(tf.constant(X))
        whole(X, training=True)
        check(state(layer), state(whole))

    def test_a_block_inside_a_function(self) -> None:
        import tensorflow as tf

        layer, whole = layer_of(debias=True), layer_of(debias=True)

        @tf.function
        def step(x: Any) -> None:
            with accumulate_statistics(layer):
                for part in tf.split(x, 3):
                    layer(part, training=True)

        for shift in range(2):
            step(tf.constant(X + shift))
            whole(X + shift, training=True)
            check(state(layer), state(whole))
        before = state(layer)
        with keep_statistics():
            step(tf.constant(X))
        assert same(state(layer), before)
        assert step.experimental_get_tracing_count() == 1
        with (
            pytest.raises(RuntimeError, match="compiled without a collection"),
            accumulate_statistics(layer),
        ):
            step(tf.constant(X))
        assert same(state(layer), before)

    def test_a_function_of_before_the_first_block_is_refused(self) -> None:
        import tensorflow as tf

        layer = layer_of()
        compiled = tf.function(lambda x: layer(x, training=True))
        compiled(tf.constant(X))
        before = state(layer)
        with (
            pytest.raises(RuntimeError, match=r"accumulate_statistics: .*make a new tf\.function"),
            accumulate_statistics(layer),
        ):
            compiled(tf.constant(X))
        assert same(state(layer), before)

    def test_a_loop_of_the_graph_inside_its_block_is_refused(self) -> None:
        import tensorflow as tf

        layer = layer_of()

        @tf.function
        def step(x: Any) -> None:
            with accumulate_statistics(layer):
                for part in tf.reshape(x, (3, 8, 3)):
                    layer(part, training=True)

        with pytest.raises(RuntimeError, match="outside of the loop or branch"):
            step(tf.constant(X))

    def test_a_function_inside_the_block_of_another_is_refused(self) -> None:
        import tensorflow as tf

        layer, other = layer_of(), layer_of()
        inner = tf.function(lambda x: layer(x, training=True))
        free = tf.function(lambda x: other(x, training=True))
        inner(tf.constant(X))

        @tf.function
        def step(x: Any) -> None:
            with accumulate_statistics(layer):
                free(x)
                inner(x)

        with pytest.raises(RuntimeError, match=r"accumulate_statistics: a tf\.function cannot"):
            step(tf.constant(X))

    def test_training_that_is_known_late_contributes_when_it_trains(self) -> None:
        import tensorflow as tf

        layer, whole = layer_of(), layer_of()
        compiled = tf.function(lambda x, training: layer(x, training=training))
        with accumulate_statistics(layer):
            compiled(tf.constant(X), tf.constant(True))
            compiled(tf.constant(X + 50.0), tf.constant(False))
        whole(X, training=True)
        check(state(layer), state(whole))

    def test_unknown_sizes(self) -> None:
        import tensorflow as tf

        layer, whole = layer_of(), layer_of()
        compiled = tf.function(
            lambda x: layer(x, training=True), [tf.TensorSpec((None, 3), tf.float32)]
        )
        with accumulate_statistics(layer):
            for part in (X[:5], X[5:]):
                compiled(tf.constant(part))
        whole(X, training=True)
        check(state(layer), state(whole))

    def test_graphs_and_blocks_keep_no_layer_alive(self) -> None:
        import tensorflow as tf

        def train() -> Any:
            layer = layer_of(renorm=True)
            with accumulate_statistics(layer):
                tf.function(lambda x: layer(x, training=True))(tf.constant(X))
            return weakref.ref(layer)

        known = train()
        gc.collect()
        assert known() is None
