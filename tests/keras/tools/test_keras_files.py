"""Files that Keras wrote, files for Keras to read, and transfers through all frameworks."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.keras import BatchNormalization, MaskedBatchNormalization
from batchnorm.tools import transfer
from batchnorm.tools.checkpoints import read_checkpoint
from batchnorm.tools.convert import convert_checkpoint
from batchnorm.tools.models import find_layers

CHANNELS = 3


def build_model() -> Any:
    """Layers of every kind, nested and with auxiliary weights, of random weights."""
    inner = keras.Sequential(
        [keras.Input((CHANNELS,)), MaskedBatchNormalization(name="masked")], name="inner"
    )
    inputs = keras.Input((CHANNELS,))
    x = keras.layers.BatchNormalization(momentum=0.75, epsilon=0.5, name="stem")(inputs)
    x = keras.layers.LayerNormalization()(keras.layers.Dense(CHANNELS)(x))
    x = inner(BatchNormalization(renorm=True, name="renormalized")(x))
    x = BatchNormalization(scale=False, name="unscaled")(x)
    model = keras.Model(inputs, keras.layers.BatchNormalization(center=False, name="head")(x))
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, w.shape).astype(w.dtype) for w in model.get_weights()])
    return model


def check(found: Any, wanted: Any) -> None:
    assert found.channels == wanted.channels
    for role in ("mean", "var", "gamma", "beta"):
        a, b = getattr(found, role), getattr(wanted, role)
        assert (a is None) == (b is None), (wanted.name, role)
        if a is not None:
            np.testing.assert_array_equal(a, b, err_msg=f"{wanted.name} {role}")


@pytest.mark.parametrize("suffix", ["keras", "h5"])
def test_saved_model_is_read_to_the_bit_with_its_options(suffix: str, tmp_path: Path) -> None:
    model, path = build_model(), tmp_path / f"model.{suffix}"
    model.save(path)
    found = {s.name.rpartition("/")[2]: s for s in read_checkpoint(path).layers}
    wanted = find_layers(model)
    assert [name.rpartition("/")[2] for name in found] == [
        w.name.rpartition("/")[2] for w in wanted
    ]
    for layer in wanted:
        state = found[layer.name.rpartition("/")[2]]
        check(state, layer.state)
        assert (state.eps, state.decay) == (layer.state.eps, layer.state.decay)
        assert (state.renorm is None) == (layer.state.renorm is None)


def test_weights_alone_are_read_where_they_can_be_told_apart(tmp_path: Path) -> None:
    model, path = build_model(), tmp_path / "model.weights.h5"
    model.save_weights(path)
    checkpoint = read_checkpoint(path)
    found = {s.name: s for s in checkpoint.layers}
    assert set(found) == {"stem", "renormalized", "inner/masked"}
    for layer in find_layers(model):
        if layer.name in found:
            check(found[layer.name], layer.state)
    assert len(checkpoint.notes) == 2
    assert any(note.startswith("unscaled: its weights have shapes") for note in checkpoint.notes)


def test_subclassed_model_of_weights_alone(tmp_path: Path) -> None:
    class Net(keras.Model):
        def __init__(self) -> None:
            super().__init__()
            self.bns = [keras.layers.BatchNormalization(name=f"n{i}") for i in range(11)]

        def call(self, x: Any) -> Any:
            for layer in self.bns:
                x = layer(x)
            return x

    model, path = Net(), tmp_path / "model.weights.h5"
    model(np.ones((2, CHANNELS), np.float32))
    model.save_weights(path)
    assert [s.name for s in read_checkpoint(path).layers] == [f"n{i}" for i in range(11)]


def test_converted_file_loads_into_a_whole_keras_model_by_name(tmp_path: Path) -> None:
    model = build_model()
    model.save(tmp_path / "model.keras")
    convert_checkpoint(tmp_path / "model.keras", tmp_path / "norms.h5")
    fresh = keras.models.clone_model(model)
    fresh.load_weights(tmp_path / "norms.h5", by_name=True)
    for old, new in zip(find_layers(model), find_layers(fresh), strict=True):
        if old.name in ("stem", "renormalized", "unscaled", "head"):
            check(new.state, old.state)


def test_converted_weights_load_into_a_model_of_batch_norms(tmp_path: Path) -> None:
    def make() -> Any:
        names = ("one", "two")
        layers = [keras.layers.BatchNormalization(name=name) for name in names]
        return keras.Sequential([keras.Input((CHANNELS,)), *layers])

    model = make()
    rng = np.random.default_rng(0)
    model.set_weights([rng.uniform(0.5, 2, w.shape).astype(w.dtype) for w in model.get_weights()])
    model.save(tmp_path / "model.keras")
    convert_checkpoint(tmp_path / "model.keras", tmp_path / "norms.weights.h5")
    fresh = make()
    fresh.load_weights(tmp_path / "norms.weights.h5")
    for a, b in zip(model.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow",
    reason="TensorFlow, torch and JAX do not share a process reliably",
)
@pytest.mark.parametrize("count", [None, 24])
def test_torch_to_nnx_to_keras_and_back(count: int | None) -> None:
    import torch

    nnx = pytest.importorskip("flax.nnx", reason="JAX needs NumPy 2")

    def of_torch() -> Any:
        return torch.nn.Sequential(*(torch.nn.BatchNorm1d(c) for c in (3, 4)))

    source, back = of_torch(), of_torch()
    for tensor in source.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(0)) + 0.5)
    source[0].momentum, source[1].eps = 0.3, 0.25
    in_nnx = nnx.List([nnx.BatchNorm(c, rngs=nnx.Rngs(0)) for c in (3, 4)])
    in_keras = keras.Sequential([keras.Input((3,)), keras.layers.BatchNormalization()])
    in_keras.add(keras.layers.Dense(4))
    in_keras.add(BatchNormalization())
    first = transfer(source, in_nnx, count=count)
    second = transfer(in_nnx, in_keras)
    assert second.notes == []
    transfer(in_keras, back, count=count)
    for name, tensor in back.state_dict().items():
        wanted = source.state_dict()[name]
        if "running_var" in name and count is not None:
            np.testing.assert_allclose(tensor, wanted, rtol=2.0**-22)  # two roundings
        else:
            assert torch.equal(tensor, wanted), name
    assert any("count= converts it" in note for note in first.notes) == (count is None)
    assert [(a.momentum, a.eps) for a in back] == [(a.momentum, a.eps) for a in source]


def test_states_of_another_kind_of_model_are_refused_by_name() -> None:
    states = [replace(found.state, name="x") for found in find_layers(build_model())][:1]
    with pytest.raises(ValueError, match="neither by name nor"):
        transfer(states, build_model())
