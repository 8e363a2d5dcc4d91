"""Programs that `test_distribution.py` runs in a process of its own: distributed.py NAME ...

Each compares a synchronized layer on several devices with one layer on the whole batch.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import (
    BatchNormalization,
    SyncBatchNormalization,
    accumulate_statistics,
    keep_statistics,
)

SPLITS = [[10, 10], [15, 5], [1, 12], [0, 8], [7, 0]]


def draw(rows: int, seed: int, offset: float = 3.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    x = rng.normal(offset, 2.0, (rows, 4)).astype("float32")
    x[: rows // 2] += 5.0  # so that replicas differ
    return x, rng.random(rows) < 0.6, rng.normal(size=(rows, 4)).astype("float32")


def train(layer: Any, x: Any, mask: Any, dy: Any) -> Any:
    """y, dx, dgamma and dbeta of a training step."""
    import tensorflow as tf

    x = tf.convert_to_tensor(x)
    with tf.GradientTape() as tape:
        tape.watch(x)
        y = layer(x, mask=mask, training=True)
    return y, *tape.gradient(y, [x, layer.gamma.value, layer.beta.value], dy)


def alone(x: Any, mask: Any, dy: Any, **options: Any) -> tuple[list[np.ndarray], Any]:
    layer = BatchNormalization(momentum=0.5, **options)
    layer.build((None, 4))
    return [np.asarray(a) for a in train(layer, x, mask, dy)], layer


def near(found: Any, expected: Any, what: str) -> None:
    np.testing.assert_allclose(found, expected, rtol=2e-4, atol=2e-5, err_msg=what)


@functools.cache
def two_cpus() -> Any:
    import tensorflow as tf

    cpu = tf.config.list_physical_devices("CPU")[0]
    tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)
    return tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])


def mirrored() -> None:
    """Every split, with and without masks, in eager code and in a graph."""
    import tensorflow as tf

    strategy = two_cpus()
    for seed, split in enumerate(SPLITS):
        for masked in (True, False) if seed < 2 else (True,):
            x, mask, dy = draw(sum(split), seed, 3.0 if masked else 1e4)
            expected, single = alone(x, mask if masked else None, dy)
            with strategy.scope():
                layer = SyncBatchNormalization(momentum=0.5)
                layer.build((None, 4))
            ends = np.cumsum([0, *split])

            def piece(a: np.ndarray, context: Any, ends: Any = ends) -> tf.Tensor:
                at = context.replica_id_in_sync_group
                return tf.constant(a[ends[at] : ends[at + 1]])

            values = [strategy.experimental_distribute_values_from_function(
                lambda c, a=a: piece(a, c)) for a in (x, mask, dy)]  # fmt: skip

            @tf.function
            def step(x: Any, mask: Any, dy: Any, layer: Any = layer, masked: bool = masked) -> Any:
                return strategy.run(
                    lambda x, mask, dy: train(layer, x, mask if masked else None, dy),
                    (x, mask, dy),
                )

            found = [strategy.experimental_local_results(a) for a in step(*values)]
            near(np.concatenate(found[0]), expected[0], f"y {split}")
            near(np.concatenate(found[1]), expected[1], f"dx {split}")
            for a, b, name in zip(found[2:], expected[2:], ("dgamma", "dbeta"), strict=True):
                near(np.sum(a, axis=0), b, f"{name} {split}")
            near(layer.moving_mean.numpy(), single.moving_mean.numpy(), f"mean {split}")
            near(layer.moving_variance.numpy(), single.moving_variance.numpy(), f"var {split}")


def mirrored_fit() -> None:
    """`fit`, whose last batch of 1 leaves one replica without rows."""
    x, mask, _ = draw(9, 0)
    mask = mask.astype("int32")  # Keras cannot spread a short batch of booleans over replicas

    def make(cls: Any) -> keras.Model:
        inputs = keras.Input((4,)), keras.Input((), dtype="int32")
        model = keras.Model(inputs, cls(momentum=0.5, name="norm")(inputs))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        return model

    with two_cpus().scope():
        ours = make(SyncBatchNormalization)
    single = make(BatchNormalization)
    for model in (ours, single):
        model.fit([x, mask], x, batch_size=4, epochs=2, shuffle=False, verbose=0)
    # Without gamma and beta: Keras halves the loss of a batch that only one of two replicas sees.
    names = [w.name for w in ours.non_trainable_weights]
    assert names == ["moving_mean", "moving_variance"]
    for a, b in zip(ours.non_trainable_weights, single.non_trainable_weights, strict=True):
        near(a.numpy(), b.numpy(), a.name)


def unsynchronized() -> None:
    """Local statistics are averaged over the replicas when they are read."""
    import tensorflow as tf

    strategy = two_cpus()
    x, _, _ = draw(12, 0)
    with strategy.scope():
        layer = BatchNormalization(momentum=0.0)
        layer.build((None, 4))
    values = strategy.experimental_distribute_values_from_function(
        lambda c: tf.constant(x[:4] if c.replica_id_in_sync_group == 0 else x[4:])
    )
    strategy.run(tf.function(lambda x: layer(x, training=True)), (values,))
    near(layer.moving_mean.numpy(), (x[:4].mean(0) + x[4:].mean(0)) / 2, "mean")
    near(layer.moving_variance.numpy(), (x[:4].var(0) + x[4:].var(0)) / 2, "var")


def ghost() -> None:
    """Ghost groups are local; their average is not."""
    import tensorflow as tf

    strategy = two_cpus()
    x, _, _ = draw(12, 0)
    with strategy.scope():
        layer = SyncBatchNormalization(momentum=0.0, virtual_batch_size=3)
        layer.build((None, 4))
    values = strategy.experimental_distribute_values_from_function(
        lambda c: tf.constant(x[6 * c.replica_id_in_sync_group :][:6])
    )
    found = strategy.run(tf.function(lambda x: layer(x, training=True)), (values,))
    found = strategy.experimental_local_results(found)
    groups = [x[start : start + 6][which::2] for start in (0, 6) for which in (0, 1)]
    near(layer.moving_mean.numpy().ravel(), np.mean([g.mean(0) for g in groups], 0), "mean")
    near(layer.moving_variance.numpy().ravel(), np.mean([g.var(0) for g in groups], 0), "var")
    expected = (groups[2] - groups[2].mean(0)) / np.sqrt(groups[2].var(0) + 1e-3)
    near(found[1][::2], expected, "y")


def blocks() -> None:
    """Blocks about moving statistics, around functions of two replicas and inside."""
    import tensorflow as tf

    strategy = two_cpus()
    x, _, _ = draw(12, 0)
    with strategy.scope():
        layer = SyncBatchNormalization(momentum=0.9, debias=True)
        layer.build((None, 4))

    def run() -> None:
        strategy.run(lambda: layer(tf.constant(x), training=True))

    def run_kept() -> None:
        with keep_statistics():
            run()

    around = tf.function(run)
    tf.function(run_kept)()
    for kept in (False, True, False):
        before = layer.steps.numpy()
        with keep_statistics() if kept else contextlib.nullcontext():
            around()
        assert layer.steps.numpy() == before + (not kept)
    near(layer.moving_mean.numpy(), x.mean(0), "mean")
    with (
        pytest.raises(ValueError, match="one process and device"),
        accumulate_statistics(layer),
    ):
        tf.function(run)()
    with pytest.raises(RuntimeError, match=r"strategy\.run in a tf\.function"), keep_statistics():
        run()
    assert layer.steps.numpy() == 2


def data_parallel() -> None:
    """keras.distribution.DataParallel, in `fit`."""
    import jax

    jax.config.update("jax_num_cpu_devices", 2)
    x, mask, _ = draw(16, 0)
    found = []
    for parallel in (False, True):
        if parallel:
            keras.distribution.set_distribution(
                keras.distribution.DataParallel(devices=["cpu:0", "cpu:1"])
            )
        inputs = keras.Input((4,)), keras.Input((), dtype="bool")
        layer = SyncBatchNormalization(momentum=0.5)
        model = keras.Model(inputs, layer(inputs))
        model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit([x, mask], x, batch_size=8, epochs=2, shuffle=False, verbose=0)
        found.append([np.asarray(w) for w in layer.weights])
        assert len(layer.gamma.value.devices()) == 1 + parallel
    for a, b in zip(*found, strict=True):
        near(b, a, "weights")


def named_axis() -> None:
    """A named axis of jax.vmap, with unequal counts."""
    import jax

    x, mask, _ = draw(16, 0)
    layer = SyncBatchNormalization(momentum=0.5, axis_name="replicas")
    layer.build((None, 4))
    values = [[w.value for w in a] for a in (layer.trainable_weights, layer.non_trainable_weights)]

    def step(x: Any, mask: Any) -> Any:
        return layer.stateless_call(*values, x, mask=mask, training=True)

    halves = x.reshape(2, 8, 4), mask.reshape(2, 8)
    y, (mean, var) = jax.vmap(step, axis_name="replicas")(*halves)
    real = x[mask].astype("float64")
    expected = (x - real.mean(0)) / np.sqrt(real.var(0) + 1e-3)
    near(np.asarray(y).reshape(16, 4), expected, "y")
    near(mean[0], 0.5 * real.mean(0), "mean")
    near(var[1], 0.5 + 0.5 * real.var(0), "var")


if __name__ == "__main__":
    for name in sys.argv[1:]:
        globals()[name]()
