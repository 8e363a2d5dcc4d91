"""`keep_statistics`: training passes that leave all statistics as they are (S20)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import keras
import numpy as np
import pytest
from keras import ops

import keras_backend
from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    SyncBatchNormalization,
    keep_statistics,
)

TENSORFLOW, JAX = (name == keras_backend.NAME for name in ("tensorflow", "jax"))
X = np.random.default_rng(0).normal(5.0, 2.0, (8, 3)).astype("float32")


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def layer_of(cls: type = BatchNormalization, **options: Any) -> Any:
    layer = cls(momentum=0.0, **options)
    layer.build(X.shape)
    return layer


def state(layer: Any) -> list[np.ndarray]:
    return [array(w).copy() for w in layer.non_trainable_weights]


def same(found: list[np.ndarray], expected: list[np.ndarray]) -> bool:
    return all((a == b).all() for a, b in zip(found, expected, strict=True))


def moved(layer: Any, before: list[np.ndarray]) -> bool:
    """True if any of the statistics has moved."""
    return not same(state(layer), before)


OPTIONS: list[tuple[type, dict[str, Any]]] = [
    (BatchNormalization, {}),
    (BatchNormalization, {"fused": False}),
    (BatchNormalization, {"renorm": True, "debias": True}),
    (BatchNormalization, {"virtual_batch_size": 4}),
    (MaskedBatchNormalization, {"debias": True}),
    (SyncBatchNormalization, {}),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize(("cls", "options"), OPTIONS)
def test_everything_else_is_as_in_training(cls: type, options: dict[str, Any]) -> None:
    found = []
    for kept in (True, False):
        layer = layer_of(cls, **options)
        before = state(layer)

        def call(x: Any, layer: Any = layer, kept: bool = kept) -> Any:
            if not kept:
                return layer(x, training=True)
            with keep_statistics():
                return layer(x, training=True)

        dy = keras_backend.tensor(np.random.default_rng(1).normal(size=X.shape), "float32")
        x = keras_backend.tensor(X, "float32")
        found.append(keras_backend.differentiate(layer, call, x, dy, [layer.gamma, layer.beta]))
        assert same(state(layer), before) == kept
    pairs = zip(*map(keras.tree.flatten, found), strict=True)
    assert all((array(a) == array(b)).all() for a, b in pairs)


def test_evaluation_is_as_outside() -> None:
    layer = layer_of()
    layer(X, training=True)
    with keep_statistics():
        inside = array(layer(X, training=False))
    assert (inside == array(layer(X, training=False))).all()


def test_blocks_nest_and_end_with_an_exception() -> None:
    layer = layer_of()
    before = state(layer)
    with keep_statistics():
        with pytest.raises(KeyError), keep_statistics():
            raise KeyError
        layer(X, training=True)
    assert same(state(layer), before)
    with pytest.raises(KeyError), keep_statistics():
        raise KeyError
    layer(X, training=True)
    assert moved(layer, before)


def test_it_belongs_to_the_thread() -> None:
    layers = [layer_of() for _ in range(3)]
    before = state(layers[0])
    both = threading.Barrier(2, timeout=10)

    def run(layer: Any, kept: bool) -> None:
        if not kept:
            both.wait()
            layer(X, training=True)
            both.wait()
            return
        with keep_statistics():
            both.wait()
            layer(X, training=True)
            both.wait()

    threads = [
        threading.Thread(target=run, args=(layer, kept))
        for layer, kept in zip(layers, (True, False), strict=False)
    ]
    for thread in threads:
        thread.start()
    layers[2](X, training=True)
    for thread in threads:
        thread.join()
    assert [moved(layer, before) for layer in layers] == [False, True, True]


def test_a_task_that_outlives_the_block_moves_again() -> None:
    layer = layer_of()
    before = state(layer)

    async def later(ready: asyncio.Event) -> None:
        await ready.wait()
        layer(X, training=True)

    async def main() -> None:
        ready = asyncio.Event()
        with keep_statistics():
            task = asyncio.ensure_future(later(ready))
            await asyncio.sleep(0)
        ready.set()
        await task

    asyncio.run(main())
    assert moved(layer, before)


class Traced:
    """A compiled training call of a layer, and the number of its traces."""

    def __init__(self, layer: Any) -> None:
        self.layer, self.traces = layer, 0
        self.call = self._compile()

    def _compile(self) -> Any:
        if JAX:
            import jax

            def step(values: Any, kept: Any, x: Any) -> Any:
                self.traces += 1
                return self.layer.stateless_call(values, kept, x, training=True)

            step = jax.jit(step)

            def call(x: Any) -> Any:
                values = [v.value for v in self.layer.trainable_variables]
                kept = [v.value for v in self.layer.non_trainable_variables]
                y, new = step(values, kept, x)
                for variable, value in zip(self.layer.non_trainable_variables, new, strict=True):
                    variable.assign(value)
                return y

            return call

        def forward(x: Any) -> Any:
            self.traces += 1
            return self.layer(x, training=True)

        return keras_backend.trace(forward)

    def __call__(self, x: Any) -> None:
        self.call(ops.convert_to_tensor(x))


def check_compiled(traced: Traced, first: bool) -> None:
    """Calls inside of blocks and outside, the first one inside if `first`."""
    layer = traced.layer
    for step, kept in enumerate([first, not first, True, False, True, False]):
        before = state(layer)
        if kept:
            with keep_statistics():
                traced(X + step)
        else:
            traced(X + step)
        assert moved(layer, before) == (not kept), step


@pytest.mark.parametrize("first", [True, False])
def test_compiled_functions_follow_it_wherever_they_were_traced(first: bool) -> None:
    traced = Traced(layer_of())
    check_compiled(traced, first)
    if TENSORFLOW:
        assert traced.traces == 1
    elif JAX:
        assert traced.traces == 2


def test_a_compiled_function_may_open_it() -> None:
    layer = layer_of()
    before = state(layer)
    traced = Traced(layer)
    inner = layer.call

    def call(*args: Any, **kwargs: Any) -> Any:
        with keep_statistics():
            return inner(*args, **kwargs)

    layer.__dict__["call"] = call
    traced(X)
    traced(X)
    assert same(state(layer), before)
    assert traced.traces == (1 if TENSORFLOW or JAX else 2)


def model_of(**compile_options: Any) -> Any:
    model = keras.Sequential([keras.Input((3,)), layer_of(), keras.layers.Dense(1)])
    model.compile("sgd", "mse", **compile_options)
    return model


@pytest.mark.sample(2)
@pytest.mark.parametrize("eager", [False, True])
def test_keras_steps_follow_it(eager: bool) -> None:
    model = model_of(run_eagerly=eager)
    layer, y = model.layers[0], np.ones((8, 1), "float32")
    for step, kept in enumerate((False, True, False)):
        before, dense = state(layer), array(model.layers[1].kernel).copy()
        if kept:
            with keep_statistics():
                model.train_on_batch(X + step, y)
                model.fit(X + step, y, verbose=0)
        else:
            model.train_on_batch(X + step, y)
        assert moved(layer, before) == (not kept)
        assert (array(model.layers[1].kernel) != dense).any()  # it trains all the same


def test_a_train_step_may_open_it() -> None:
    class Sharpness(keras.Model):
        """Two passes over the same data, one of which counts."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.dense = layer_of(), keras.layers.Dense(1)

        def call(self, x: Any, training: Any = None) -> Any:
            y = self.dense(self.norm(x, training=training))
            with keep_statistics():
                return y + 0.0 * self.dense(self.norm(x + 100.0, training=training))

    model = Sharpness()
    model.compile("sgd", "mse")
    model.train_on_batch(X, np.ones((8, 1), "float32"))
    np.testing.assert_allclose(array(model.norm.moving_mean), X.mean(0), rtol=1e-5)


def test_recomputing_and_checkpoints_see_no_block() -> None:
    layer = layer_of()
    with keep_statistics():
        config, weights = layer.get_config(), layer.get_weights()
    assert config == layer_of(name=layer.name).get_config()
    assert len(weights) == 4


@pytest.mark.skipif(not TENSORFLOW, reason="graphs of TensorFlow")
class TestGraphs:
    def test_branches_loops_and_functions_inside_follow_the_call(self) -> None:
        import tensorflow as tf

        layer = layer_of()
        inner = tf.function(lambda x: layer(x, training=True))

        @tf.function
        def nested(x: Any) -> Any:
            return inner(x)

        @tf.function
        def branch(x: Any) -> Any:
            return tf.cond(x[0, 0] > -99.0, lambda: layer(x, training=True), lambda: x)

        @tf.function
        def loop(x: Any) -> Any:
            for _ in tf.range(2):
                x = x + layer(x, training=True)
            return x

        @tf.function(jit_compile=True)
        def by_xla(x: Any) -> Any:
            return layer(x, training=True)

        for step, function in enumerate((inner, nested, branch, loop, by_xla)):
            for call, kept in enumerate((False, True, False)):
                before = state(layer)
                x = tf.constant(X + 3 * step + call)
                if kept:
                    with keep_statistics():
                        function(x)
                else:
                    function(x)
                assert moved(layer, before) == (not kept), (step, kept)
            assert function.experimental_get_tracing_count() == 1

    def test_training_that_is_known_late_follows_the_call(self) -> None:
        import tensorflow as tf

        layer = layer_of(debias=True)
        function = tf.function(lambda x, training: layer(x, training=training))
        for training, kept in ((True, False), (True, True), (False, False)):
            before = state(layer)
            if kept:
                with keep_statistics():
                    function(tf.constant(X), tf.constant(training))
            else:
                function(tf.constant(X + 1.0), tf.constant(training))
            assert moved(layer, before) == (training and not kept)

    @pytest.mark.parametrize("before", [False, True])
    def test_a_function_inside_of_one_that_opened_it_raises(self, before: bool) -> None:
        import tensorflow as tf

        layer, other = layer_of(), layer_of()
        inner = tf.function(lambda x: layer(x, training=True))
        x = tf.constant(X)
        if before:
            inner(x)

        @tf.function
        def outer(x: Any) -> Any:
            with keep_statistics():
                y = other(x, training=True)
                return y + inner(x)

        with pytest.raises(RuntimeError, match=r"keep_statistics.*Open (the block|it) inside"):
            outer(x)

    def test_two_functions_around_one_follow_their_calls(self) -> None:
        import tensorflow as tf

        layer = layer_of()
        inner = tf.function(lambda x: layer(x, training=True))

        @tf.function
        def outer(x: Any) -> Any:
            with keep_statistics():
                x = x + 1.0  # runs no layer
            return inner(x) + inner(2.0 * x)

        before = state(layer)
        with keep_statistics():
            outer(tf.constant(X))
        assert same(state(layer), before)
        outer(tf.constant(X))
        assert moved(layer, before)

    def test_replicas_follow_a_block_in_the_function(self) -> None:
        import tensorflow as tf

        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            layer = layer_of()
        before = state(layer)

        @tf.function
        def step(x: Any) -> Any:
            with keep_statistics():
                return strategy.run(lambda x: layer(x, training=True), (x,))

        step(tf.constant(X))
        assert same(state(layer), before)

    def test_threads_call_one_graph(self) -> None:
        import tensorflow as tf

        layer = layer_of()
        function = tf.function(lambda x: layer(x, training=True))
        function(tf.constant(X))
        before = state(layer)

        def run() -> None:
            function(tf.constant(X + 1.0))

        with keep_statistics():
            thread = threading.Thread(target=run)
            thread.start()
            thread.join()
        assert moved(layer, before)

    def test_saved_training_functions_move_their_statistics(self, tmp_path: Any) -> None:
        import tensorflow as tf

        module = tf.Module()
        layer = module.layer = layer_of(fused=False, renorm=True)
        module.step = tf.function(
            lambda x: layer(x, training=True), [tf.TensorSpec(X.shape, tf.float32)]
        )
        module.step(tf.constant(X))
        tf.saved_model.save(module, str(tmp_path))
        loaded = tf.saved_model.load(str(tmp_path))
        loaded.step(tf.constant(X + 3.0))
        found = loaded.layer.moving_mean
        np.testing.assert_allclose(array(found.value()), X.mean(0) + 3.0, rtol=1e-5)
