"""HDF5 files of Keras 2 and 3, and `.keras` archives around one.

The HDF5 library is a large parser in C that damaged files can crash: `child.py` runs this module in
a process of its own.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import h5py
import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.archives import Archive, Bytes
from batchnorm.tools.checkpoints.groups import natural
from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.checkpoints.source import (
    ITEM_SIZES,
    Catalog,
    Details,
    Entry,
    LayerConfig,
    Omitted,
    Source,
    Texts,
)

__all__ = ["read", "read_keras"]

_WEIGHTS_GROUP = "model_weights"
_TRAINING = "training_config"  # names an optimizer, whose arrays are left out
_WEIGHTS, _CONFIG = "model.weights.h5", "config.json"


def read(file: Any, budget: Budget, config: Bytes | None = None) -> Source:
    """The datasets of an open HDF5 file, and the batch norms in its Keras config.

    Args:
        file: open, or its bytes in memory.
        budget: of the file.
        config: the model's config as JSON; None for the one in the file's attributes, if any.
    """
    root = h5py.File(file, "r")
    catalog: Catalog[Any] = Catalog(budget)
    labels: dict[str, str] = {}
    walk = _Walk(budget)
    for path, item in walk.items(root):
        if isinstance(item, h5py.Dataset):
            _add_dataset(path, item, catalog, budget)
        elif path.rpartition("/")[2] == "vars":
            label = _text_attribute(item, "name", budget)
            if label is not None:
                labels[path] = budget.take_name(label)
    entries = _in_order(catalog.entries, _layer_names(root, budget))
    if config is None:
        text = _text_attribute(root, "model_config", budget)
        config = None if text is None else text.encode()
    configs = () if config is None else tuple(_find_configs(config, budget))

    def load(name: str) -> NDArray[Any]:
        dataset, entry = catalog.places[name], entries[name]
        # Reading any value of a chunk unpacks all of it.
        padded = [-(-n // c) * c for n, c in zip(entry.shape, dataset.chunks or (), strict=False)]
        budget.check_shape(padded, shown(name))
        size = math.prod(padded) * ITEM_SIZES[entry.dtype] if padded else 0
        budget.spend(entry.size + size, shown(name))
        if dataset.id.get_storage_size() == 0 and entry.size:
            raise budget.error(f"{shown(name)} was never written; the file is incomplete.")
        return np.asarray(dataset[...])

    return Source(
        "hdf5",
        entries,
        load,
        configs,
        labels,
        catalog.skipped,
        walk.notes(),
        details=lambda: _read_details(root, budget),
    )


def read_keras(file: BinaryIO, budget: Budget) -> Source:
    """A `.keras` archive: its weights and config; both are read in memory."""
    archive = Archive(file, budget)
    names = archive.names
    if _CONFIG not in names or _WEIGHTS not in names:
        sharded = any(n.endswith(".weights.json") for n in names)
        raise budget.error(
            "its weights are sharded over several files; save it as one."
            if sharded
            else f"the archive lacks {_CONFIG} or {_WEIGHTS}; it is no .keras file."
        )
    config = archive.read(_CONFIG, header=True)
    return read(io.BytesIO(archive.read(_WEIGHTS)), budget, config)


class _Walk:
    """A walk over groups and datasets that follows neither external nor symbolic links."""

    def __init__(self, budget: Budget) -> None:
        self._budget = budget
        self._links: list[str] = []

    def items(self, root: Any) -> Iterator[tuple[str, Any]]:
        """Paths and objects, each group once."""
        pending, seen, visited = [("", root, 0)], 0, set()
        while pending:
            path, group, depth = pending.pop()
            for name in group:
                seen += 1
                self._budget.check_values(seen, depth)
                child = self._budget.check_name(f"{path}/{name}" if path else name)
                if not isinstance(group.get(name, getlink=True), h5py.HardLink):
                    self._links.append(child)
                    continue
                item = group[name]
                if isinstance(item, h5py.Dataset):
                    yield child, item
                elif isinstance(item, h5py.Group):
                    where = h5py.h5o.get_info(item.id).addr
                    if where in visited:  # hard links may form circles
                        self._links.append(child)
                    else:
                        visited.add(where)
                        yield child, item
                        pending.append((child, item, depth + 1))

    def notes(self) -> list[str]:
        """A note on links that were not followed."""
        if not self._links:
            return []
        some = ", ".join(map(shown, self._links[:3]))
        return [f"{len(self._links)} links, to other files or to groups, are not followed: {some}."]


def _add_dataset(path: str, dataset: Any, catalog: Catalog[Any], budget: Budget) -> None:
    plist = dataset.id.get_create_plist()
    if dataset.shape is None or dataset.dtype.name not in ITEM_SIZES:
        catalog.skip(path, f"of type {dataset.dtype.name}")
    elif dataset.is_virtual or plist.get_external_count():
        catalog.skip(path, "an array in other files")
    else:
        shape = budget.check_shape([int(n) for n in dataset.shape], shown(path))
        catalog.add(path, Entry(shape, dataset.dtype.name), dataset)


def _text_attribute(item: Any, name: str, budget: Budget) -> str | None:
    if name not in item.attrs:
        return None
    attribute = item.attrs.get_id(name)
    if attribute.shape != () or attribute.dtype.kind not in "OS":
        return None
    budget.check_header(attribute.get_storage_size(), f"attribute {shown(name)}")
    value = item.attrs[name]
    if not isinstance(value, (bytes, str)):
        return None
    text = value.decode() if isinstance(value, bytes) else str(value)
    budget.check_header(len(text), f"attribute {shown(name)}")
    return text


def _read_details(root: Any, budget: Budget) -> Details:
    """The attributes of all groups and datasets that are texts or lists of texts."""
    texts: Texts = {}
    omitted, size, seen = Omitted(), 0, 0
    for path, item in [("", root), *_Walk(budget).items(root)]:
        for name in item.attrs:
            seen += 1
            budget.check_values(seen)
            text: str | list[str] | None = _text_attribute(item, name, budget)
            if text is None:
                text = _texts_attribute(item, name, budget)
            if text is None or name == _TRAINING:
                omitted.add(f"{path}@{name}")
                continue
            size += sum(map(len, (path, name, *([text] if isinstance(text, str) else text))))
            budget.check_header(size, "the texts of all attributes")
            texts[path, name] = text
    return Details(texts, omitted)


def _texts_attribute(item: Any, name: str, budget: Budget) -> list[str] | None:
    """A list of texts; None for anything else."""
    attribute = item.attrs.get_id(name)
    if attribute.shape == (0,):  # Keras writes an empty list as numbers
        return []
    if attribute.shape is None or len(attribute.shape) != 1:
        return None
    if h5py.check_string_dtype(attribute.dtype) is None:
        return None
    budget.check_header(attribute.get_storage_size(), f"attribute {shown(name)}")
    texts = np.asarray(item.attrs[name]).tolist()
    return [text.decode() if isinstance(text, bytes) else str(text) for text in texts]


def _layer_names(root: Any, budget: Budget) -> list[str]:
    """Names of a Keras 2 model's layers in the order of the model; HDF5 itself sorts them."""
    group = root
    if "layer_names" not in root.attrs:
        link = root.get(_WEIGHTS_GROUP, getlink=True)  # an external link would open another file
        group = root[_WEIGHTS_GROUP] if isinstance(link, h5py.HardLink) else None
    if group is None or "layer_names" not in group.attrs:
        return []
    budget.check_header(group.attrs.get_id("layer_names").get_storage_size(), "layer_names")
    names = np.asarray(group.attrs["layer_names"]).reshape(-1)
    return [n.decode() if isinstance(n, bytes) else str(n) for n in names]


def _in_order(entries: Mapping[str, Entry], names: list[str]) -> dict[str, Entry]:
    """Entries sorted as `names` are, and by numbers within other names."""
    order = {name: i for i, name in enumerate(names)}

    def key(path: str) -> Any:
        parts = path.removeprefix(f"{_WEIGHTS_GROUP}/").split("/")
        return order.get(parts[0], len(order)), natural(parts)

    return {path: entries[path] for path in sorted(entries, key=key)}


def _find_configs(config: Bytes, budget: Budget) -> Iterator[LayerConfig]:
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
            kind = node.get("class_name")
            if isinstance(kind, str) and "BatchNormalization" in kind and isinstance(inner, dict):
                yield _layer_config(inner)
            else:
                pending += reversed(list(node.values()))


def _layer_config(config: Mapping[str, Any]) -> LayerConfig:
    eps, decay = (
        float(value) if isinstance(value, (int, float)) and 0 <= value < 1e300 else None
        for value in (config.get("epsilon"), config.get("momentum"))
    )
    name = config.get("name")
    return LayerConfig(
        name if isinstance(name, str) else "",
        eps,
        decay,
        bool(config.get("scale", True)),
        bool(config.get("center", True)),
    )
