"""`padding_mask`: a mask for every layer that gets none."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import keras
import numpy as np
import pytest
from keras import layers, ops

import keras_backend
from batchnorm.keras import BatchNormalization, MaskedBatchNormalization, padding_mask

TORCH = keras_backend.NAME == "torch"
MASK = np.arange(8) < np.array([8, 5, 2, 0])[:, None]


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a))


def data(mask: np.ndarray = MASK, channels: int = 3) -> np.ndarray:
    x = np.random.default_rng(0).normal(5.0, 2.0, (*mask.shape, channels)).astype("float32")
    x[~mask] = 99.0
    return x


def layer_of(x: np.ndarray, **options: Any) -> Any:
    layer = BatchNormalization(momentum=0.0, **options)
    layer.build(x.shape)
    return layer


def mean_after(call: Callable[[Any], Any], layer: Any | None = None) -> np.ndarray:
    """The mean that a layer counts in a call."""
    layer = layer_of(data()) if layer is None else layer
    call(layer)
    return array(layer.moving_mean)


def means(mask: np.ndarray = MASK) -> np.ndarray:
    return data()[mask].mean(0)


def check(found: np.ndarray, mask: np.ndarray = MASK) -> None:
    np.testing.assert_allclose(found, means(mask), rtol=1e-4)


class Backbone(keras.Model):
    """Layers that know nothing of masks."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = layers.Dense(3, kernel_initializer="identity")
        self.norm = BatchNormalization(momentum=0.0)

    def call(self, x: Any, training: Any = None) -> Any:
        return self.norm(self.scale(x) + 0.0, training=training)


class Model(keras.Model):
    """A model that takes the mask as an input and opens the block."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = Backbone()

    @property
    def norm(self) -> Any:
        return self.backbone.norm

    def call(self, inputs: Any, training: Any = None) -> Any:
        x, mask = inputs
        with padding_mask(mask):
            return self.backbone(x, training=training)


@pytest.mark.parametrize("kind", [BatchNormalization, MaskedBatchNormalization])
def test_layers_inside_take_the_mask(kind: type) -> None:
    model = keras.Sequential([layers.ReLU(), kind(momentum=0.0), layers.ReLU(), kind(momentum=0.0)])
    with padding_mask(MASK):
        y = model(data(), training=True)
    check(array(model.layers[1].moving_mean))
    expected = kind(momentum=0.0)
    x = ops.relu(kind()(data(), mask=MASK, training=True))
    expected(x, mask=MASK, training=True)
    np.testing.assert_allclose(
        array(model.layers[3].moving_mean), array(expected.moving_mean), rtol=1e-5
    )
    assert y.shape == (4, 8, 3)


@pytest.mark.parametrize("dtype", ["bool", "int32", "float32"])
def test_any_number_but_0_is_real(dtype: str) -> None:
    with padding_mask((MASK * 2).astype(dtype)):
        check(mean_after(lambda layer: layer(data(), training=True)))


def test_a_mask_of_whole_samples() -> None:
    x, mask = data(), np.array([True, False, False, False])
    with padding_mask(mask):
        layer = layer_of(x)
        layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x[0].mean(0), rtol=1e-4)


def test_the_block_ends() -> None:
    x = data()
    with padding_mask(MASK):
        check(mean_after(lambda layer: layer(x, training=True)))
    np.testing.assert_allclose(
        mean_after(lambda layer: layer(x, training=True)), x.mean((0, 1)), rtol=1e-4
    )


def test_it_ends_with_an_exception() -> None:
    x = data()
    with pytest.raises(KeyError), padding_mask(MASK):
        raise KeyError
    np.testing.assert_allclose(
        mean_after(lambda layer: layer(x, training=True)), x.mean((0, 1)), rtol=1e-4
    )


def test_blocks_nest() -> None:
    x, other = data(), ~MASK
    with padding_mask(MASK):
        with padding_mask(other):
            check(mean_after(lambda layer: layer(x, training=True)), other)
        with padding_mask(None):
            found = mean_after(lambda layer: layer(x, training=True))
            np.testing.assert_allclose(found, x.mean((0, 1)), rtol=1e-4)
        check(mean_after(lambda layer: layer(x, training=True)))


def test_masks_of_the_layer_win() -> None:
    x, other = data(), ~MASK
    with padding_mask(MASK):
        check(mean_after(lambda layer: layer(x, mask=other, training=True)), other)
        check(mean_after(lambda layer: layer((x, other), training=True)), other)
        carried = layers.Masking(99.0)(ops.convert_to_tensor(x))
        full = np.ones_like(MASK)
        with padding_mask(full):
            check(mean_after(lambda layer: layer(carried, training=True)))


def test_it_belongs_to_the_thread() -> None:
    x, found = data(), {}

    def run(name: str, mask: Any) -> None:
        layer = layer_of(x)
        if mask is None:
            layer(x, training=True)
        else:
            with padding_mask(mask):
                gate.wait(10)
                layer(x, training=True)
                gate.wait(10)
        found[name] = array(layer.moving_mean)

    gate = threading.Barrier(2)
    with padding_mask(MASK):
        mean_after(lambda layer: layer(x, training=True))
        first = [
            threading.Thread(target=run, args=("other", ~MASK)),
            threading.Thread(target=run, args=("same", MASK)),
        ]
        for thread in first:
            thread.start()
        for thread in first:
            thread.join()
        third = threading.Thread(target=run, args=("none", None))
        third.start()
        third.join()
    check(found["other"], ~MASK)
    check(found["same"])
    np.testing.assert_allclose(found["none"], x.mean((0, 1)), rtol=1e-4)


def test_gradients_are_those_of_a_mask() -> None:
    x = data()
    dy = keras_backend.tensor(np.random.default_rng(1).normal(size=x.shape), "float32")
    found = []
    for inside in (True, False):
        layer = layer_of(x)

        def call(a: Any, layer: Any = layer, inside: bool = inside) -> Any:
            if not inside:
                return layer(a, mask=MASK, training=True)
            with padding_mask(MASK):
                return layer(a, training=True)

        found.append(
            keras_backend.differentiate(
                layer, call, keras_backend.tensor(x, "float32"), dy, [layer.gamma, layer.beta]
            )
        )
    for a, b in zip(keras.tree.flatten(found[0]), keras.tree.flatten(found[1]), strict=True):
        np.testing.assert_allclose(array(a), array(b), rtol=1e-5, atol=1e-6)
    assert (array(found[0][1])[~MASK] == 0).all()


# Resolutions.


@pytest.mark.parametrize(("rule", "reduce"), [("any", np.any), ("all", np.all)])
def test_blocks_merge_by_the_rule(rule: str, reduce: Any) -> None:
    x = data()[:, ::2]
    with padding_mask(MASK, rescale=rule):
        layer = layer_of(x)
        layer(x, training=True)
    mask = reduce(MASK.reshape(4, 4, 2), axis=2)
    np.testing.assert_allclose(array(layer.moving_mean), x[mask].mean(0), rtol=1e-4)


def test_whole_blocks_need_no_rule_and_others_do() -> None:
    whole = np.arange(8) < np.array([8, 4, 2, 0])[:, None]
    x = data()[:, ::2]
    with padding_mask(whole):
        layer = layer_of(x)
        layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x[whole[:, ::2]].mean(0), rtol=1e-4)
    with padding_mask(MASK), pytest.raises(ValueError, match="some blocks are partly padding"):
        layer(x, training=True)


def test_an_axis_that_is_gone_is_one_block() -> None:
    x = data()[:, 0]
    with padding_mask(MASK, rescale="any"):
        layer = layer_of(x)
        layer(x, training=True)
    np.testing.assert_allclose(array(layer.moving_mean), x[:3].mean(0), rtol=1e-4)


@pytest.mark.parametrize(
    ("shape", "text"),
    [
        ((4, 3, 3), "3 does not divide 8 on axis 1"),
        ((4, 16, 3), "16 is finer than 8 on axis 1"),
        ((5, 8, 3), "batch axis or the number of axes differs"),
        ((4, 2, 4, 3), "batch axis or the number of axes differs"),
    ],
)
def test_other_sizes_are_refused(shape: tuple[int, ...], text: str) -> None:
    layer = layer_of(np.ones(shape))
    with padding_mask(MASK, rescale="any"), pytest.raises(ValueError, match=text):
        layer(ops.ones(shape), training=True)


@pytest.mark.parametrize("rule", [None, "any", "all"])
def test_sizes_may_be_unknown_when_the_code_is_traced(rule: str | None) -> None:
    layer = layer_of(data())

    def step(x: Any, mask: Any) -> Any:
        with padding_mask(mask, rescale=rule), keras_backend.pure(layer.moving_mean) as read:
            layer(x, training=True)
            return read(layer.moving_mean)

    if keras_backend.NAME == "tensorflow":
        import tensorflow as tf

        traced = tf.function(
            step,
            input_signature=[
                tf.TensorSpec((None, None, 3), tf.float32),
                tf.TensorSpec((None, None), tf.bool),
            ],
        )
    else:
        traced = keras_backend.trace(step)
    for size in (8, 4):
        mask = np.arange(size) < np.array([8, 5, 2, 0])[:, None]
        x = data(mask)
        found = array(traced(ops.convert_to_tensor(x), ops.convert_to_tensor(mask)))
        np.testing.assert_allclose(found, x[mask].mean(0), rtol=1e-4)
        if rule is not None:
            fewer = {"any": np.any, "all": np.all}[rule](mask.reshape(4, -1, 2), axis=2)
            x = data(fewer)
            found = array(traced(ops.convert_to_tensor(x), ops.convert_to_tensor(mask)))
            np.testing.assert_allclose(found, x[fewer].mean(0), rtol=1e-4)


# Compiled code.


def test_a_model_opens_the_block_in_its_call() -> None:
    model, x = Model(), data()
    model.compile("sgd", "mse")
    model.optimizer.learning_rate = 0.0
    for mask in (MASK, ~MASK):  # of one trace
        model.fit((x, mask), np.zeros_like(x), batch_size=4, verbose=0)
        check(array(model.norm.moving_mean), mask)
    y = model.predict((x, MASK), batch_size=2, verbose=0)
    assert np.isfinite(y).all()
    assert model.evaluate((x, MASK), np.zeros_like(x), verbose=0) > 0


def test_changing_masks_do_not_retrace() -> None:
    layer, x, traces = layer_of(data()), data(), []

    def step(x: Any, mask: Any) -> Any:
        traces.append(1)
        with padding_mask(mask), keras_backend.pure(layer.moving_mean) as read:
            layer(x, training=True)
            return read(layer.moving_mean)

    traced = keras_backend.trace(step)
    for mask in (MASK, ~MASK, MASK):
        check(array(traced(ops.convert_to_tensor(x), ops.convert_to_tensor(mask))), mask)
    assert len(traces) == (3 if TORCH else 1)


@pytest.mark.skipif(TORCH, reason="torch runs Python every time")
@pytest.mark.parametrize("earlier", [False, True])
def test_a_block_outside_of_compiled_code_is_an_error(earlier: bool) -> None:
    model, x = Backbone(), data()
    expected = array(model(x))
    model.compile("sgd", "mse")
    if earlier:
        model.predict_on_batch(x)
    with pytest.raises(RuntimeError, match="padding_mask"), padding_mask(MASK):
        model.predict_on_batch(x)
    np.testing.assert_allclose(model.predict_on_batch(x), expected, rtol=1e-5)


@pytest.mark.skipif(not TORCH, reason="others compile")
def test_a_block_outside_serves_predict_on_torch() -> None:
    model, x = Backbone(), data()
    model.compile("sgd", "mse")
    with padding_mask(MASK):
        model.train_on_batch(x, np.zeros_like(x))
    check(array(model.norm.moving_mean))


@pytest.mark.exhaustive
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # by torch.compile itself
def test_steps_of_jit_compile_take_masks_inside_and_refuse_them_outside() -> None:
    model, x = Model(), data()
    model((x, MASK))
    model.compile("sgd", "mse", jit_compile=True)
    model.optimizer.learning_rate = 0.0
    for mask in (MASK, np.roll(MASK, 1, axis=0)):
        x = data(mask)
        model.train_on_batch((x, mask), np.zeros_like(x))
        np.testing.assert_allclose(array(model.norm.moving_mean), x[mask].mean(0), rtol=1e-4)
    alone = model.backbone
    alone.compile("sgd", "mse", jit_compile=True)
    alone.optimizer.learning_rate = 0.0
    alone.train_on_batch(x, np.zeros_like(x))
    with pytest.raises(RuntimeError, match="padding_mask"), padding_mask(MASK):
        alone.train_on_batch(x, np.zeros_like(x))
    alone.train_on_batch(x, np.zeros_like(x))
    np.testing.assert_allclose(array(alone.norm.moving_mean), x.mean((0, 1)), rtol=1e-4)


@pytest.mark.skipif(TORCH, reason="torch runs Python every time")
def test_inner_compiled_code_takes_each_mask_of_outer_compiled_code() -> None:
    layer, x = layer_of(data()), ops.convert_to_tensor(data())
    inner = keras_backend.trace(lambda x: layer(x, training=True) * 1.0)

    def step(x: Any, first: Any, second: Any) -> Any:
        found = []
        with keras_backend.pure(*layer.variables):
            for mask in (first, second):
                with padding_mask(mask):
                    found.append(inner(x))
        return found

    if keras_backend.NAME == "jax":  # an inner jit must not move statistics
        inner = keras_backend.trace(lambda x: training_output(layer, x))
    masks = [ops.convert_to_tensor(m) for m in (MASK, ~MASK)]
    if keras_backend.NAME == "tensorflow":
        with pytest.raises(RuntimeError, match="padding_mask was opened outside of the compiled"):
            keras_backend.trace(step)(x, *masks)
        return
    for found, mask in zip(keras_backend.trace(step)(x, *masks), masks, strict=True):
        expected = training_output(layer, x, mask)
        np.testing.assert_allclose(array(found), array(expected), rtol=1e-4, atol=1e-5)


def training_output(layer: Any, x: Any, mask: Any = None) -> Any:
    values = [w.value for w in layer.trainable_variables]
    rest = [w.value for w in layer.non_trainable_variables]
    return layer.stateless_call(values, rest, x, mask=mask, training=True)[0]


def test_eager_transformations_may_be_inside() -> None:
    if keras_backend.NAME != "jax":
        pytest.skip("JAX's own")
    import jax

    layer, x = layer_of(data()), ops.convert_to_tensor(data())
    with padding_mask(MASK):
        found = jax.grad(lambda a: (training_output(layer, a) ** 3).sum())(x)
    expected = jax.grad(lambda a: (training_output(layer, a, MASK) ** 3).sum())(x)
    np.testing.assert_allclose(array(found), array(expected), rtol=1e-5, atol=1e-5)


def test_models_may_be_built_inside() -> None:
    x = data()
    with padding_mask(MASK):
        model = keras.Sequential([Backbone(), layers.ReLU()])
        model(x, training=True)
    check(array(model.layers[0].norm.moving_mean))


class Recomputed(layers.Layer):
    """A layer of layers, whose call Keras recomputes in the backward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNormalization(momentum=0.0)

    def build(self, input_shape: Any) -> None:
        self.norm.build(input_shape)

    def call(self, x: Any) -> Any:
        return self.norm(x, training=True)


@pytest.mark.skipif(keras_backend.NAME == "jax", reason="JAX refuses it: variables would leak")
def test_a_recomputed_layer_does_not_lose_its_mask_unseen() -> None:
    with keras.RematScope(mode="full"):
        layer = Recomputed()
    layer.build((4, 8, 3))
    x = keras_backend.tensor(data(), "float32")

    def call(a: Any) -> Any:
        with padding_mask(MASK):
            return layer(a)

    with pytest.raises(RuntimeError, match="of a padding_mask block that has ended"):
        keras_backend.differentiate(
            layer.norm, call, x, x, [layer.norm.gamma], None if TORCH else "graph"
        )


# Arguments.


def open_block(*args: Any, **options: Any) -> AbstractContextManager[None]:
    return padding_mask(*args, **options)


def test_arguments_are_checked() -> None:
    with (
        pytest.raises(ValueError, match="padding_mask: rescale must be"),
        open_block(MASK, rescale="x"),
    ):
        pass
    with pytest.raises(ValueError, match="padding_mask: mask must have at least"), open_block(True):
        pass
    with pytest.raises(ValueError, match="padded_output"), open_block(MASK, padded_output="x"):
        pass
    with (
        pytest.raises(TypeError, match="padding_mask: mask must have values"),
        open_block(keras.Input((8,), dtype="bool")),
    ):
        pass
