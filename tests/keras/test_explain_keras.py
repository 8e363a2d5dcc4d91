"""`batchnorm.explain` on Keras: the way that a call takes, and why each faster way refuses."""

from __future__ import annotations

import keras
import numpy as np
import pytest

from batchnorm import explain
from batchnorm.keras import BatchNormalization
from batchnorm.kernels import extension
from batchnorm.kernels.explanation import ARRAY_CODE, KERNELS

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)

SHAPE = (8, 5, 3)
BACKEND = keras.backend.backend()
X = np.random.default_rng(0).standard_normal(SHAPE).astype("float32")


def make(**options):
    layer = BatchNormalization(**options)
    layer.build(SHAPE)
    return layer


def test_training_takes_kernels_and_moves_nothing():
    layer = make()
    before = [np.array(w) for w in layer.get_weights()]
    found = explain(layer, X, training=True)
    assert (found.layer, found.way, found.refused) == ("BatchNormalization", KERNELS, ())
    for a, b in zip(layer.get_weights(), before, strict=True):
        assert np.array_equal(a, b)


REFUSED = {
    "fused": ({"fused": False}, {}, "fused=False asks for array code"),
    "adjustment": ({"adjustment": lambda shape: (1.5, 0.5)}, {}, "none takes an adjustment"),
    "mask": (
        {},
        {"mask": np.ones(SHAPE, bool)},
        "none takes a mask that differs between channels",
    ),
    "axes": ({"axis": (0, 2)}, {}, "channel axes (0, 2) are apart in memory"),
}


@pytest.mark.parametrize(("options", "arguments", "reason"), REFUSED.values(), ids=REFUSED)
def test_array_code_has_a_reason(options, arguments, reason):
    found = explain(make(**options), X, training=True, **arguments)
    assert (found.way, found.refused) == (ARRAY_CODE, ((KERNELS, reason),))


def test_evaluation_has_a_way():
    found = explain(make(), X, training=False)
    way = {"tensorflow": "one operation of TensorFlow", "jax": ARRAY_CODE, "torch": KERNELS}
    assert found.way == way[BACKEND]
    if BACKEND == "jax":
        assert found.refused[0].reason == "the compiler fuses evaluation with what surrounds it"


ONE_PASS_REFUSES = {
    "fused": ({"fused": False}, SHAPE, "fused=False asks for array code"),
    "type": ({"dtype": "float64"}, SHAPE, "it does not take float64"),
    "axis": ({"axis": 1}, SHAPE, "it takes channels on the last axis"),
    "empty": ({}, (8, 0), "it takes no input without channels"),
}


@pytest.mark.skipif(BACKEND != "tensorflow", reason="TensorFlow's own operation")
@pytest.mark.parametrize(
    ("options", "shape", "reason"), ONE_PASS_REFUSES.values(), ids=ONE_PASS_REFUSES
)
def test_evaluation_in_array_code_has_a_reason(options, shape, reason):
    layer = BatchNormalization(**options)
    layer.build(shape)
    found = explain(layer, np.ones(shape, layer.compute_dtype), training=False)
    assert found.way == ARRAY_CODE
    assert found.refused == (("one operation of TensorFlow", reason),)


def test_a_layer_without_weights_has_no_way():
    with pytest.raises(ValueError, match="has no weights, and no way yet"):
        explain(BatchNormalization(), X)
