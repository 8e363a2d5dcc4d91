"""Leaks of Keras models, found on each backend."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization
from batchnorm.tools import find_leaks

LENGTHS = np.array([40, 30, 7])
MASK = np.arange(48) < LENGTHS[:, None]
X = (np.random.default_rng(0).normal(size=(3, 48, 8)) * MASK[..., None]).astype("float32")


class Model(keras.Model):
    """Convolution, batch norm, dropout, convolution.

    Args:
        norm: the batch norm's class.
        mend: put zeros at padding; without, the second convolution leaks.
        stride: of the second convolution.
    """

    def __init__(self, norm: Any, mend: bool, stride: int) -> None:
        super().__init__()
        self.supports_masking = True
        self.mend = mend
        self.one = keras.layers.Conv1D(8, 5, padding="same", name="one")
        self.norm = norm(beta_initializer="ones", name="norm")
        self.drop = keras.layers.Dropout(0.5, name="drop")
        self.two = keras.layers.Conv1D(8, 3, padding="same", strides=stride, name="two")

    def call(self, x: Any, mask: Any = None) -> Any:
        real = keras.ops.cast(mask, x.dtype)[..., None]
        x = self.drop(keras.ops.silu(self.norm(self.one(x * real), mask=mask)))
        return self.two(x * real if self.mend else x)


@pytest.mark.sample(3)
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("mend", [True, False])
@pytest.mark.parametrize("norm", [keras.layers.BatchNormalization, BatchNormalization])
def test_second_convolution_reads_padding(norm: type, mend: bool, stride: int) -> None:
    model = Model(norm, mend, stride)
    x = keras.ops.convert_to_tensor(X)
    model(x, mask=keras.ops.convert_to_tensor(MASK), training=True)
    before = [np.array(keras.ops.convert_to_numpy(w)) for w in model.weights]
    leaks = find_leaks(model, x, MASK)
    assert [leak.name for leak in leaks.leaks] == ([] if mend else ["two"])
    assert all(leak.norm == "norm" for leak in leaks.leaks)
    assert leaks.sensitive == ()
    assert leaks.modes == ("evaluation", "training")
    for weight, value in zip(model.weights, before, strict=True):
        np.testing.assert_array_equal(keras.ops.convert_to_numpy(weight), value)
    assert all("call" not in vars(layer) for layer in (model, *model.layers))


def test_masks_that_keras_propagates_reach_all_layers() -> None:
    tokens = keras.Input((None,), dtype="int32")
    x = keras.layers.Embedding(50, 8, mask_zero=True)(tokens)
    x = keras.layers.MultiHeadAttention(2, 4)(x, x)
    x = BatchNormalization()(x)
    pooled = keras.layers.GlobalAveragePooling1D()(x)
    batch = np.random.default_rng(0).integers(1, 50, MASK.shape) * MASK
    leaks = find_leaks(keras.Model(tokens, pooled), batch.astype("int32"), MASK)
    assert leaks.ok, str(leaks)
    assert leaks.sensitive == ()


def test_lost_mask_is_found_where_it_is_missed() -> None:
    inputs = keras.Input((None, 8))
    x = keras.layers.Dense(8, name="dense")(inputs)
    x = keras.layers.GlobalAveragePooling1D(name="pool")(x)
    [leak] = find_leaks(keras.Model(inputs, x), X, MASK).leaks
    assert leak.name == "pool"
    assert "real positions" in leak.remedy
