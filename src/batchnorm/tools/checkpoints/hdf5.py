"""HDF5 files of Keras 2 and 3, and `.keras` archives around one.

The HDF5 library is a large parser in C that damaged files can crash: `isolated.py` runs this
module in a process of its own.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.archives import open_archive, read_member
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.naming import natural
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Entry, LayerConfig, Source

__all__ = ["read", "read_keras"]

_MOST_OBJECTS = 1_000_000
_DEEPEST = 64
_WEIGHTS_GROUP = "model_weights"
_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"


def read(file: Any, budget: Budget, config: bytes | None = None) -> Source:
    """The datasets of an open HDF5 file, and what its Keras config says about batch norms.

    Args:
        file: open, or its bytes in memory.
        budget: of the file.
        config: the model's config as JSON; None for the one in the file's attributes, if any.
    """
    import h5py

    root = h5py.File(file, "r")
    datasets: dict[str, Any] = {}
    labels: dict[str, str] = {}
    for path, item in _walk(root, budget):
        if isinstance(item, h5py.Dataset):
            entry = _check_dataset(path, item, budget)
            if entry is not None:
                datasets[path] = (item, entry)
        elif path.rpartition("/")[2] == "vars":
            label = _text_attribute(item, "name", budget)
            if label is not None:
                labels[path] = label
    datasets = _in_order(datasets, _layer_names(root, budget))
    if config is None:
        text = _text_attribute(root, "model_config", budget)
        config = None if text is None else text.encode()
    configs = () if config is None else tuple(_find_configs(config, budget))

    def load(name: str) -> NDArray[Any]:
        dataset, entry = datasets[name]
        budget.spend(entry.size, repr(name))
        if dataset.id.get_storage_size() == 0 and entry.size:
            raise budget.error(f"{name!r:.80} was never written; the file is incomplete.")
        return np.asarray(dataset[...])

    return Source("hdf5", {n: e for n, (_, e) in datasets.items()}, load, configs, labels)


def read_keras(file: BinaryIO, budget: Budget) -> Source:
    """A `.keras` archive: its weights and config; both are read in memory."""
    archive = open_archive(file, budget)
    names = archive.namelist()
    if _CONFIG not in names or _WEIGHTS not in names:
        sharded = any(n.endswith(".weights.json") for n in names)
        raise budget.error(
            "its weights are sharded over several files; save it as one."
            if sharded
            else f"the archive lacks {_CONFIG} or {_WEIGHTS}; it is no .keras file."
        )
    config = read_member(archive, _CONFIG, budget, header=True)
    return read(io.BytesIO(read_member(archive, _WEIGHTS, budget)), budget, config)


def _walk(root: Any, budget: Budget) -> Iterator[tuple[str, Any]]:
    """Groups and datasets; links that lead out of the file, and symbolic ones, are left alone."""
    import h5py

    pending, seen, visited = [("", root, 0)], 0, set()
    while pending:
        path, group, depth = pending.pop()
        for name in group:
            seen += 1
            if seen > _MOST_OBJECTS or depth > _DEEPEST:
                raise budget.error("it has more, or more deeply nested, objects than weights need.")
            if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                continue
            item, child = group[name], f"{path}/{name}" if path else name
            if isinstance(item, h5py.Dataset):
                yield child, item
            elif isinstance(item, h5py.Group):
                where = h5py.h5o.get_info(item.id).addr
                if where not in visited:  # hard links may form circles
                    visited.add(where)
                    yield child, item
                    pending.append((child, item, depth + 1))


def _check_dataset(path: str, dataset: Any, budget: Budget) -> Entry | None:
    """Its shape and type; None where no batch norm has such."""
    if dataset.shape is None or dataset.dtype.name not in ITEM_SIZES:
        return None
    plist = dataset.id.get_create_plist()
    if dataset.is_virtual or plist.get_external_count():
        return None  # they would read other files
    shape = budget.check_shape([int(n) for n in dataset.shape], repr(path))
    return Entry(shape, dataset.dtype.name)


def _text_attribute(item: Any, name: str, budget: Budget) -> str | None:
    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    budget.check_header(attribute.get_storage_size(), f"attribute {name!r}")
    value = item.attrs[name]
    if isinstance(value, np.ndarray):
        return None
    text = value.decode() if isinstance(value, bytes) else str(value)
    budget.check_header(len(text), f"attribute {name!r}")
    return text


def _layer_names(root: Any, budget: Budget) -> list[str]:
    """Names of a Keras 2 model's layers in the order of the model; HDF5 itself sorts them."""
    group = root if "layer_names" in root.attrs else root.get(_WEIGHTS_GROUP)
    if group is None or "layer_names" not in group.attrs:
        return []
    budget.check_header(group.attrs.get_id("layer_names").get_storage_size(), "layer_names")
    names = np.asarray(group.attrs["layer_names"]).reshape(-1)
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _in_order(datasets: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """Sorted as `names` are, and numbers in other names as numbers."""
    order = {name: i for i, name in enumerate(names)}

    def key(path: str) -> Any:
        parts = path.removeprefix(f"{_WEIGHTS_GROUP}/").split("/")
        return order.get(parts[0], len(order)), natural(parts)

    return {path: datasets[path] for path in sorted(datasets, key=key)}


def _find_configs(config: bytes, budget: Budget) -> Iterator[LayerConfig]:
    """The batch norms of a model's config, in the order of the model."""
    try:
        root = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise budget.error(f"its config is no valid JSON: {error!s:.100}") from error
    pending = [root]
    while pending:
        node = pending.pop()
        if isinstance(node, list):
            pending += reversed(node)
        elif isinstance(node, dict):
            inner = node.get("config")
            if "BatchNormalization" in str(node.get("class_name")) and isinstance(inner, dict):
                yield _layer_config(inner)
            else:
                pending += reversed(list(node.values()))


def _layer_config(config: Mapping[str, Any]) -> LayerConfig:
    eps, decay = (
        float(value) if isinstance(value, (int, float)) and 0 <= value < float("inf") else None
        for value in (config.get("epsilon"), config.get("momentum"))
    )
    return LayerConfig(
        str(config.get("name")),
        eps,
        decay,
        bool(config.get("scale", True)),
        bool(config.get("center", True)),
    )
