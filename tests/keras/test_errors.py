"""Errors about arguments begin with the layer's class or the function's name, whatever raises."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import keras
import numpy as np
import pytest

from batchnorm import explain
from batchnorm.core.errors import ArgumentError
from batchnorm.keras import (
    BatchNormalization,
    MaskedBatchNormalization,
    SyncBatchNormalization,
    load_weights,
    sequence_mask,
)

X = np.ones((12, 3), "float32")
SHORT = np.ones(5, bool)
LAYERS = (BatchNormalization, SyncBatchNormalization, MaskedBatchNormalization)


def build(cls: Any, **options: Any) -> Any:
    layer = cls(**options)
    layer.build((None, 3))
    return layer


EDGES: dict[str, Callable[[Any], Any]] = {
    "constructor": lambda cls: cls(momentum=2.0),
    "config": lambda cls: cls.from_config({"epsilon": -1.0}),
    "build": lambda cls: cls().build((4, None)),
    "output's shape": lambda cls: cls(axis=3).compute_output_shape((4, 3)),
    "output": lambda cls: cls(axis=3).compute_output_spec(keras.KerasTensor((4, 3))),
    "call": lambda cls: cls()(X, mask=SHORT, training=True),
    "evaluation": lambda cls: cls()(X, mask=SHORT),
    "inputs": lambda cls: cls()([X, X, X]),
    "inputs, behind Keras": lambda cls: build(cls).call([X, X, X]),
    "symbolic call": lambda cls: cls()([keras.Input((3,))] * 3),
    "mask behind": lambda cls: cls().compute_mask([X, X, X]),
    "adjustment": lambda cls: cls(adjustment=lambda shape: 3)(X, training=True),
    "explanation": lambda cls: explain(cls(), X),
    "explained call": lambda cls: explain(build(cls), X, mask=SHORT, training=True),
    "weights": lambda cls: build(cls).set_weights([np.ones(3)]),
    "weights' shape": lambda cls: build(cls, center=False, scale=False).set_weights([X, X]),
    "file's weights": lambda cls: build(cls).load_own_variables({}),
}


@contextmanager
def named(owner: str) -> Iterator[None]:
    with pytest.raises((ValueError, TypeError), match=f"{owner}: ") as caught:
        yield
    assert not isinstance(caught.value, ArgumentError)


@pytest.mark.parametrize("cls", LAYERS)
@pytest.mark.parametrize("edge", EDGES)
def test_layers_name_errors(edge: str, cls: Any) -> None:
    with named(cls.__name__):
        EDGES[edge](cls)


@pytest.mark.parametrize(("lengths", "size"), [([1.5], 3), ([5], 3), ([1], -1), ([1], "3")])
def test_sequence_mask_names_errors(lengths: Any, size: Any) -> None:
    with named("sequence_mask"):
        sequence_mask(lengths, size)


def test_load_weights_names_errors(tmp_path: Path) -> None:
    names = ["gamma:0", "beta:0", "moving_mean:0", "moving_variance:0"]
    with h5py.File(tmp_path / "old.h5", "w") as file:
        file.attrs["layer_names"] = ["bn"]
        group = file.create_group("bn")
        group.attrs["weight_names"] = names
        for name in names:
            group[name] = np.ones(4)
    model = keras.Sequential([keras.Input((3,)), MaskedBatchNormalization()])
    with named("MaskedBatchNormalization"):
        load_weights(model, tmp_path / "old.h5")
    model.save_weights(tmp_path / "new.weights.h5")
    other = keras.Sequential([keras.Input((3,)), BatchNormalization(), SyncBatchNormalization()])
    with named("load_weights"):
        load_weights(other, tmp_path / "new.weights.h5")


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="graphs of TensorFlow")
@pytest.mark.parametrize("cls", LAYERS)
class TestGraphs:
    def run(self, layer: Any, mask: Any, rows: int | None, marked: Any, **settings: Any) -> None:
        import tensorflow as tf

        signature = [tf.TensorSpec((rows, 3)), tf.TensorSpec(marked, tf.bool)]
        call = tf.function(
            lambda x, mask: layer(x, training=True, mask=mask), signature, **settings
        )
        call(X, mask)

    @pytest.mark.parametrize("compiled", [False, True])
    def test_traced_errors_are_named(self, cls: Any, compiled: bool) -> None:
        with named(cls.__name__):
            self.run(build(cls), SHORT, 12, (5,), jit_compile=compiled)

    def test_errors_of_kernels_are_named_when_the_graph_runs(self, cls: Any) -> None:
        if cls is SyncBatchNormalization:
            pytest.skip("no kernel runs in its graph")
        with pytest.raises(Exception, match=f"ValueError: {cls.__name__}: mask must have") as e:
            self.run(build(cls), SHORT, None, (None,))
        assert "Argument" not in str(e.value).replace("INVALID_ARGUMENT", "")

    def test_batches_that_ghosts_do_not_divide_are_named_when_the_graph_runs(
        self, cls: Any
    ) -> None:
        if cls is MaskedBatchNormalization:
            pytest.skip("it takes no ghost batches")
        layer = build(cls, virtual_batch_size=5)
        with pytest.raises(Exception, match=f"{cls.__name__}: virtual_batch_size=5 must divide"):
            self.run(layer, np.ones(12, bool), None, (None,))

    def test_the_layer_is_traced_without_a_warning(
        self, cls: Any, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
    ) -> None:
        self.run(build(cls), np.ones(12, bool), None, (None,))
        assert "AutoGraph" not in caplog.text + "".join(capfd.readouterr())
