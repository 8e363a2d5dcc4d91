"""The experiment's networks in Keras, on whichever backend it runs."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from batchnorm.demo.data import CLASSES, FEATURES, Batch
from batchnorm.demo.network import LEARNING_RATE, WIDTH, Framework
from batchnorm.keras import BatchNormalization

MOMENTUM = 0.9  # of both, for so few steps


class CountsPadding(keras.layers.BatchNormalization):
    """Keras's layer without a mask: it normalizes over all points, padding included."""

    def call(self, inputs: Any, training: Any = None, mask: Any = None) -> Any:
        """Normalize inputs; the mask is ignored."""
        return super().call(inputs, training=training)


class RealMaximum(keras.layers.Layer):
    """The maximum over the real points, and 0."""

    def call(self, x: Any, real: Any) -> Any:
        """(N, C) of x (N, L, C), real where (N, L) is True."""
        return keras.ops.max(keras.ops.where(real[..., None], x, 0.0), axis=1)


class KerasNetwork:
    """A `Network`."""

    def __init__(self, norm: Any) -> None:
        points, mask = keras.Input((None, FEATURES)), keras.Input((None,), dtype="bool")
        self._norm, self._first = norm, keras.layers.Dense(WIDTH)
        x = keras.ops.relu(norm(momentum=MOMENTUM)(self._first(points), mask=mask))
        x = keras.layers.Dense(WIDTH)(x)
        x = keras.ops.relu(norm(momentum=MOMENTUM)(x, mask=mask))
        found = keras.layers.Dense(CLASSES)(RealMaximum()(x, mask))
        self.model = keras.Model((points, mask), found)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.model.compile(keras.optimizers.Adam(LEARNING_RATE), loss)

    def train(self, batch: Batch) -> None:
        """One step."""
        self.model.train_on_batch((batch.points, batch.mask), batch.labels)

    def logits(self, batch: Batch, *, training: bool) -> np.ndarray:
        """Logits, by a call without side effects."""
        model = self.model
        trained = [w.value for w in model.trainable_variables]
        kept = [w.value for w in model.non_trainable_variables]
        inputs = [keras.ops.convert_to_tensor(a) for a in (batch.points, batch.mask)]
        found, _ = model.stateless_call(trained, kept, inputs, training=training)
        return np.asarray(keras.ops.convert_to_numpy(found))

    def first_layer(self) -> tuple[np.ndarray, np.ndarray]:
        """Weight and bias in front of the first norm."""
        kernel, bias = self._first.get_weights()
        return kernel, bias

    def batch_statistics(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        """With momentum 0 the moving statistics are those of the last batch."""
        norm = self._norm(momentum=0.0, scale=False, center=False)
        norm(self._first(batch.points), mask=keras.ops.convert_to_tensor(batch.mask), training=True)
        mean, var = norm.get_weights()
        return mean, var


def make_pair(seed: int) -> tuple[KerasNetwork, KerasNetwork]:
    """A network for each norm, with the same initial weights."""
    keras.utils.set_random_seed(seed)
    theirs, ours = KerasNetwork(CountsPadding), KerasNetwork(BatchNormalization)
    ours.model.set_weights(theirs.model.get_weights())
    return theirs, ours


FRAMEWORK = Framework(("keras", "batchnorm"), make_pair, multiple=32)
