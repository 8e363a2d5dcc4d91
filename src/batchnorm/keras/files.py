"""Files of weights whose batch normalization layers were of another kind."""

from __future__ import annotations

import re
import shutil
import zipfile
from collections import deque
from collections.abc import Iterator
from itertools import count, islice, takewhile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import h5py
import keras
import numpy as np

from batchnorm.core.errors import ArgumentValueError, names_errors, naming
from batchnorm.keras.loading import fit_weights
from batchnorm.keras.state import WeightedNormalization
from batchnorm.keras.walking import walk_layers

# Names of the layers in a file of Keras 3, by their classes.
_KINDS = ("batch_normalization", "sync_batch_normalization", "masked_batch_normalization")
_WEIGHTS = "model.weights.h5"  # within a .keras file


@names_errors("load_weights")
def load_weights(model: keras.Model, path: str | Path, *, by_name: bool = False) -> None:
    """Load a model's weights from a file whose batch normalization layers may be of another kind.

    `model.load_weights(path)` needs layers of the same classes and, from an HDF5 file of Keras 2,
    weights of the same shapes. This function also loads weights of Keras 2's ghost batches, whose
    extra axis it drops; and it loads weights of `BatchNormalization`, `SyncBatchNormalization` and
    `MaskedBatchNormalization` into layers of another of these classes.

    Args:
        model: built; like the model that wrote the file, except for its batch normalization.
        path: `.h5` or `.hdf5`, of weights or models of Keras 2; `.weights.h5` or `.keras`.
        by_name: match the layers of a `.h5` file by name, not by position.

    Raises:
        ValueError: weights that do not fit; several kinds of batch normalization, where those of
            the file and of the model differ; and any error of `model.load_weights`, after which
            some layers may have their weights already.

    Source: S11 for renormalization's statistics where the file has none.
    """
    path = Path(path)
    current = path.suffix == ".keras" or path.name.endswith(".weights.h5")
    with TemporaryDirectory() as folder:
        # Keras loads a copy: its loaders compare names and shapes before they ask a layer.
        copy = Path(folder) / (_WEIGHTS if current else "weights.h5")
        if path.suffix == ".keras":
            with zipfile.ZipFile(path) as archive:
                archive.extract(_WEIGHTS, folder)
        else:
            shutil.copyfile(path, copy)
        with h5py.File(copy, "r+") as file:
            if current:
                _add_names(file, model)
            else:
                _fit_layers(file, model, by_name)
        model.load_weights(copy, **({"by_name": True} if by_name else {}))


def _norms(layer: Any) -> Iterator[Any]:
    """The batch normalization layers of a model, or the layer itself."""
    every = (a for _, a in walk_layers(layer))
    return (a for a in every if isinstance(a, keras.layers.BatchNormalization))


def _add_names(file: h5py.File, model: keras.Model) -> None:
    """Give the groups of one kind of layer the names of the model's kind as well."""
    wanted = {_file_name(type(layer)) for layer in _norms(model)}
    pattern = re.compile(f"({'|'.join(sorted(wanted.union(_KINDS)))})(_\\d+)?")
    found: dict[str, list[tuple[str, str]]] = {}

    def note(path: str, item: h5py.Group | h5py.Dataset) -> None:
        match = pattern.fullmatch(path.rsplit("/", 1)[-1])
        if match and isinstance(item, h5py.Group):
            found.setdefault(match[1], []).append((path, match[2] or ""))

    file.visititems(note)
    if not found or wanted <= set(found):
        return
    if len(wanted) > 1 or len(found) > 1:
        raise ArgumentValueError(
            "the file must have one kind of batch normalization, and the model one, "
            f"where they differ; got {sorted(found)} in the file and {sorted(wanted)} in the "
            "model. Load a model like the file's, and give its layers' get_weights() to "
            "set_weights() of these."
        )
    (name,), (groups,) = wanted, found.values()
    for old, number in groups:
        file[f"{file[old].parent.name}/{name}{number}"] = file[old]


def _file_name(cls: type) -> str:
    """Keras's name for a layer of this class in a file."""
    words = re.sub("(.)([A-Z][a-z]+)", r"\1_\2", cls.__name__)
    return re.sub("([a-z])([A-Z])", r"\1_\2", words).lower()


def _fit_layers(file: h5py.File, model: keras.Model, by_name: bool) -> None:
    """Rewrite weights, layer by layer, in the shapes that the model has."""
    root = file if "layer_names" in file.attrs else file.get("model_weights", file)
    groups = {name: root[name] for name in _read_names(root, "layer_names")}
    if by_name:
        known = {layer.name: layer for layer in model.layers}
        pairs = [(known[name], group) for name, group in groups.items() if name in known]
    else:
        layers = [layer for layer in model.layers if layer.weights]
        full = [group for group in groups.values() if _read_names(group, "weight_names")]
        if len(layers) != len(full):
            return  # Keras says so
        pairs = list(zip(layers, full, strict=True))
    for layer, group in pairs:
        if any(map(_is_ours, _norms(layer))):
            _fit_layer(layer, group)


def _fit_layer(layer: Any, group: h5py.Group) -> None:
    """Rewrite the weights of a layer, which may be a model, in its own order and shapes."""
    names = deque(_read_names(group, "weight_names"))
    wanted = layer.trainable_weights + layer.non_trainable_weights
    owners = {id(w): a for a in _norms(layer) if _is_ours(a) for w in a.weights}
    given: dict[Any, list[np.ndarray]] = {norm: [] for norm in owners.values()}
    values = {}
    for weight in wanted:
        norm = owners.get(id(weight))
        places = 1 if norm is None else _count_weights(norm, weight, names)
        if places > len(names):
            return  # Keras says so
        found = [group[names.popleft()][()] for _ in range(places)]
        if norm is None:
            (values[id(weight)],) = found
        else:
            given[norm] += found
    for norm, arrays in given.items():
        with naming(type(norm).__name__):
            values |= zip(map(id, norm.weights), fit_weights(norm, arrays), strict=True)
    rewritten = [f"fitted/{i}" for i in range(len(wanted))]
    for name, weight in zip(rewritten, wanted, strict=True):
        group[name] = values[id(weight)]
    group.attrs["weight_names"] = [name.encode() for name in (*rewritten, *names)]


def _is_ours(norm: Any) -> bool:
    return isinstance(norm, WeightedNormalization)


def _count_weights(norm: Any, weight: Any, names: deque[str]) -> int:
    """The number of arrays in the file in the place of one weight of the layer."""
    if weight is norm.gamma or weight is norm.beta:
        return 1
    if weight is not next(a for a in norm.weights if a is not norm.gamma and a is not norm.beta):
        return 0  # came with the first of the statistics
    kinds = [name.rsplit("/", 1)[-1].split(":")[0] for name in islice(names, 6)]
    places = 1 if kinds[0] == "moving_stats" else 5 if "moving_stddev" in kinds[2:3] else 2
    return places + (kinds[places : places + 1] == ["steps"])


def _read_names(group: h5py.Group, attribute: str) -> list[str]:
    """A list of names, which Keras splits where it would be too long for one attribute."""
    parts = [attribute] if attribute in group.attrs else _numbered(group, attribute)
    names = [name for part in parts for name in group.attrs[part]]
    return [name.decode() if isinstance(name, bytes) else name for name in names]


def _numbered(group: h5py.Group, attribute: str) -> list[str]:
    numbered = (f"{attribute}{i}" for i in count())
    return list(takewhile(group.attrs.__contains__, numbered))
