"""Checkpoints as the libraries themselves write them, for the tests and the fuzzer."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

CHANNELS = (4, 5)


def random_states(seed: int = 0) -> dict[str, dict[str, np.ndarray]]:
    """gamma, beta, mean and var of two layers."""
    rng = np.random.default_rng(seed)
    return {
        name: {
            role: rng.uniform(0.5, 2.0, channels).astype(np.float32)
            for role in ("gamma", "beta", "mean", "var")
        }
        for name, channels in zip(("bn1", "bn2"), CHANNELS, strict=True)
    }


def torch_model() -> Any:
    """A convolution and two batch norms with `random_states`."""
    import torch

    model = torch.nn.Module()
    model.conv = torch.nn.Conv2d(3, 4, 3)
    for name, state in random_states().items():
        layer = torch.nn.BatchNorm2d(len(state["mean"]))
        for ours, theirs in _TORCH.items():
            getattr(layer, theirs).data.copy_(torch.from_numpy(state[ours]))
        layer.num_batches_tracked.fill_(7)
        setattr(model, name, layer)
    return model


_TORCH = {"gamma": "weight", "beta": "bias", "mean": "running_mean", "var": "running_var"}


def write_torch(path: Path) -> None:
    import torch

    torch.save({"epoch": 3, "state_dict": torch_model().state_dict()}, path)


def write_old_torch(path: Path) -> None:
    """Write a file in torch's format from before 1.6."""
    import torch

    torch.save(torch_model().state_dict(), path, _use_new_zipfile_serialization=False)


def write_safetensors(path: Path) -> None:
    """By the format's specification, with numpy alone."""
    arrays = {
        f"{name}.{_TORCH[role]}": a for name, s in random_states().items() for role, a in s.items()
    }
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        span = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": span}  # type: ignore[assignment]
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def linen_variables() -> dict[str, Any]:
    states = random_states()
    params = {n: {"scale": s["gamma"], "bias": s["beta"]} for n, s in states.items()}
    stats = {n: {"mean": s["mean"], "var": s["var"]} for n, s in states.items()}
    return {"params": params, "batch_stats": stats}


def write_msgpack(path: Path) -> None:
    from flax import serialization

    path.write_bytes(serialization.to_bytes(linen_variables()))


def nnx_model() -> Any:
    from flax import nnx

    class Model(nnx.Module):
        def __init__(self) -> None:
            for name, channels in zip(("bn1", "bn2"), CHANNELS, strict=True):
                setattr(self, name, nnx.BatchNorm(channels, rngs=nnx.Rngs(0)))

    model = Model()
    for name, state in random_states().items():
        layer = getattr(model, name)
        layer.scale[...], layer.bias[...] = state["gamma"], state["beta"]
        layer.mean[...], layer.var[...] = state["mean"], state["var"]
    return model


def write_orbax(path: Path) -> None:
    import orbax.checkpoint
    from flax import nnx

    with orbax.checkpoint.StandardCheckpointer() as checkpointer:
        checkpointer.save(path.resolve(), nnx.state(nnx_model()))


def write_hdf5(path: Path) -> None:
    """The layout of Keras 3's `.weights.h5`; real ones are read in the Keras tests."""
    import h5py

    with h5py.File(path, "w") as file:
        for i, (name, state) in enumerate(random_states().items()):
            kind = "batch_normalization" + (f"_{i}" if i else "")
            group = file.create_group(f"layers/{kind}/vars")
            group.attrs["name"] = name
            for j, role in enumerate(("gamma", "beta", "mean", "var")):
                group[str(j)] = state[role]


def write_keras(path: Path) -> None:
    """The layout of a `.keras` archive; real ones are read in the Keras tests."""
    import zipfile

    options = {"epsilon": 0.5, "momentum": 0.75}
    layers = [
        {"class_name": "BatchNormalization", "config": {"name": name, **options}}
        for name in ("bn1", "bn2")
    ]
    weights = path.with_suffix(".part")
    write_hdf5(weights)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("metadata.json", "{}")
        config = {"class_name": "Functional", "config": {"layers": layers}}
        archive.writestr("config.json", json.dumps(config))
        archive.write(weights, "model.weights.h5")
    weights.unlink()


WRITERS: Mapping[str, Callable[[Path], None]] = {
    "safetensors": write_safetensors,
    "pt": write_torch,
    "old.pt": write_old_torch,
    "msgpack": write_msgpack,
    "weights.h5": write_hdf5,
    "keras": write_keras,
    "orbax": write_orbax,
}
