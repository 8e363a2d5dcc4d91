"""Writing batch norms as a checkpoint with the names of a library."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import CheckpointError, shown
from batchnorm.tools.state import BatchNormState

__all__ = [
    "FORMATS",
    "NAMES",
    "Names",
    "format_of",
    "nested",
    "replacing",
    "write_checkpoint",
    "write_msgpack",
]

Names = Literal["torch", "flax", "nnx", "keras"]
NAMES: tuple[Names, ...] = ("torch", "flax", "nnx", "keras")

_ROLES: Mapping[str, Mapping[str, str]] = {
    "torch": {
        "gamma": "weight",
        "beta": "bias",
        "mean": "running_mean",
        "var": "running_var",
        "moving_stddev": "running_stddev",
    },
    "flax": {
        "gamma": "scale",
        "beta": "bias",
        "mean": "mean",
        "var": "var",
        "moving_stddev": "stddev",
    },
    "keras": {
        "gamma": "gamma",
        "beta": "beta",
        "mean": "moving_mean",
        "var": "moving_variance",
        "moving_stddev": "moving_stddev",
    },
}
_PARAMETERS = ("gamma", "beta")
_FLAX_ARRAY = 1  # flax.serialization's number for its extension type

# Names that files of a suffix may have, the default first.
FORMATS: Mapping[str, tuple[Names, ...]] = {
    ".safetensors": NAMES,
    ".pt": NAMES,
    ".pth": NAMES,
    ".msgpack": ("flax", "nnx"),
    ".weights.h5": ("keras",),
    ".h5": ("keras",),
}

Path_ = tuple[str, ...]


def format_of(path: Path) -> str:
    """The suffix in `FORMATS` that a path has.

    Raises:
        CheckpointError: it has another one.
    """
    for suffix in FORMATS:
        if path.name.lower().endswith(suffix):
            return suffix
    got = path.suffix or "no suffix"
    raise CheckpointError(f"{path}: files to write must end in {', '.join(FORMATS)}; got {got}.")


def write_checkpoint(
    path: Path, states: Sequence[BatchNormState], names: Names, *, force: bool = False
) -> None:
    """Write the states to a file that appears complete or not at all.

    Args:
        path: its suffix, one of `FORMATS`, decides the format.
        states: with the kind of variance that `names` implies.
        names: the library whose names the arrays get.
        force: replace an existing file.

    Raises:
        CheckpointError: the file exists, or cannot be written; two layers have one name.
        ImportError: a `.pt` needs torch, a `.h5` h5py, `.safetensors` and `.msgpack` the package
            of that name.
    """
    suffix = format_of(path)
    if path.exists() and not force:
        raise CheckpointError(f"{path}: it exists; force=True (--force) replaces it.")
    mark = "/" if suffix == ".msgpack" else "."  # by which readers join names
    arrays: dict[Path_, NDArray[Any]] = {}
    names_taken: set[str] = set()
    for state in states:
        for key, array in _arrays(state, names):
            if mark.join(key) in names_taken:  # a layer's own name may have the mark
                layer = shown(mark.join(key[:-1]))
                raise CheckpointError(f"{path}: two layers would be named {layer}.")
            names_taken.add(mark.join(key))
            arrays[key] = array
    with replacing(path) as part:
        _WRITERS[suffix](part, arrays)


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path` to write, which takes its place at the end unless there is an error."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    except OSError as error:
        raise CheckpointError(f"{path}: it cannot be written: {error.strerror}.") from error
    os.close(handle)
    part = Path(name)
    try:
        yield part
        part.chmod(0o666 & ~_umask())
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _arrays(state: BatchNormState, names: Names) -> list[tuple[Path_, NDArray[Any]]]:
    found = {role: getattr(state, role) for role in (*_PARAMETERS, "mean", "var")}
    if state.renorm is not None:
        found |= vars(state.renorm)
    roles = _ROLES["flax" if names == "nnx" else names]
    layer = _layer_path(state, names)
    arrays: list[tuple[Path_, NDArray[Any]]] = []
    for role, array in found.items():
        if array is None:
            continue
        collection: Path_ = ()
        if names == "flax":
            collection = ("params",) if role in _PARAMETERS else ("batch_stats",)
        shaped = array if state.shape is None else array.reshape(state.shape)
        arrays.append(((*collection, *layer, roles.get(role, role)), shaped))
    if names == "torch" and state.mean is not None:
        arrays.append(((*layer, "num_batches_tracked"), np.array(state.steps or 0, np.int64)))
    return arrays


def _layer_path(state: BatchNormState, names: Names) -> Path_:
    mark = "." if state.kind.startswith("torch") else "/"  # the other may be in a layer's name
    parts = tuple(part for part in state.name.split(mark) if part)
    if names == "keras":  # a layer's name, which may not have slashes
        return (re.sub("[./]", "_", "_".join(parts)) or "batch_normalization",)
    return parts if parts or names == "torch" else ("BatchNorm_0",)


def _write_safetensors(path: Path, arrays: Mapping[Path_, NDArray[Any]]) -> None:
    from safetensors.numpy import save

    flat = {".".join(key): np.ascontiguousarray(array) for key, array in arrays.items()}
    path.write_bytes(save(flat, {"format": "np"}))


def _write_torch(path: Path, arrays: Mapping[Path_, NDArray[Any]]) -> None:
    import torch

    torch.save({".".join(k): torch.from_numpy(np.array(a)) for k, a in arrays.items()}, path)


def write_msgpack(path: Path, arrays: Mapping[Path_, NDArray[Any]]) -> None:
    """In the form that `flax.serialization.msgpack_restore` reads."""
    import msgpack

    def pack(array: NDArray[Any]) -> Any:
        data = array.astype(array.dtype.newbyteorder("<")).tobytes()
        return msgpack.ExtType(_FLAX_ARRAY, msgpack.packb((array.shape, array.dtype.name, data)))

    path.write_bytes(msgpack.packb(nested({key: pack(array) for key, array in arrays.items()})))


def nested(values: Mapping[Path_, Any]) -> dict[str, Any]:
    """Maps within maps, by the keys that lead to each value."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        node = tree
        for part in key[:-1]:
            node = node.setdefault(part, {})
        node[key[-1]] = value
    return tree


def _write_weights(path: Path, arrays: Mapping[Path_, NDArray[Any]]) -> None:
    """In Keras 3's form: weights have numbers for names, in the order of the layer."""
    import h5py

    with h5py.File(path, "w") as file:
        groups: dict[str, Any] = {}
        for (layer, _), array in arrays.items():
            if layer not in groups:
                i = len(groups)
                name = f"batch_normalization_{i}" if i else "batch_normalization"
                groups[layer] = file.create_group(f"layers/{name}/vars")
                groups[layer].attrs["name"] = layer
            groups[layer][str(len(groups[layer]))] = array


def _write_named_weights(path: Path, arrays: Mapping[Path_, NDArray[Any]]) -> None:
    """In Keras 2's form, for `load_weights(path, by_name=True)`."""
    import h5py

    layers: dict[str, dict[str, NDArray[Any]]] = {}
    for (layer, role), array in arrays.items():
        layers.setdefault(layer, {})[f"{layer}/{role}"] = array
    with h5py.File(path, "w") as file:
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["keras_version"] = b"2.15.0"
        for layer, weights in layers.items():
            group = file.create_group(layer)
            group.attrs["weight_names"] = [name.encode() for name in weights]
            for name, array in weights.items():
                group[name] = array


_WRITERS: Mapping[str, Callable[[Path, Mapping[Path_, NDArray[Any]]], None]] = {
    ".safetensors": _write_safetensors,
    ".pt": _write_torch,
    ".pth": _write_torch,
    ".msgpack": write_msgpack,
    ".weights.h5": _write_weights,
    ".h5": _write_named_weights,
}


def _umask() -> int:
    mask = os.umask(0)  # it cannot be read without being set
    os.umask(mask)
    return mask
