"""Folders that orbax writes, read through tensorstore, in a process of its own (`isolated.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Entry, Source

__all__ = ["find_folder", "read"]

_METADATA = "_METADATA"
_WRAPPED = "value"  # an nnx.State saved as such has its arrays one level deeper


def find_folder(path: Path) -> Path | None:
    """The folder with the arrays: `path`, or the one item inside a step of a CheckpointManager."""
    if (path / _METADATA).is_file():
        return path
    inner = [p.parent for p in sorted(path.glob(f"*/{_METADATA}"))] if path.is_dir() else []
    return inner[0] if len(inner) == 1 else None


def read(folder: Path, budget: Budget) -> Source:
    """The arrays of a folder; names are paths, joined by slashes."""
    metadata = _read_metadata(folder, budget)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise budget.error(f"{_METADATA} has no tree_metadata.")
    driver = "zarr3" if metadata.get("use_zarr3") is True else "zarr"
    together = metadata.get("use_ocdbt") is not False  # arrays in one database
    entries, stores = {}, {}
    for leaf in tree.values():
        keys = _keys(leaf, budget)
        if keys is None:
            continue
        store = _open(folder, driver, ".".join(keys), together, budget)
        dtype = store.dtype.name
        if dtype not in ITEM_SIZES:
            continue
        if keys[-1] == _WRAPPED:
            keys = keys[:-1]
        name = "/".join(keys)
        entries[name] = Entry(budget.check_shape([int(n) for n in store.shape], repr(name)), dtype)
        stores[name] = store

    def load(name: str) -> NDArray[Any]:
        chunk = stores[name].chunk_layout.read_chunk.shape or ()
        budget.check_shape([int(n) for n in chunk], repr(name))
        item = ITEM_SIZES[entries[name].dtype]
        budget.spend(entries[name].size + item * int(np.prod(chunk, dtype=object)), repr(name))
        array = np.asarray(stores[name].read().result())
        return array.astype(np.float32) if entries[name].dtype == "bfloat16" else array

    return Source("orbax", entries, load)


def _read_metadata(folder: Path, budget: Budget) -> dict[str, Any]:
    file = folder / _METADATA
    budget.check_header(file.stat().st_size, _METADATA)
    try:
        metadata = json.loads(file.read_bytes())
    except (ValueError, RecursionError) as error:
        raise budget.error(f"{_METADATA} is no valid JSON: {error!s:.100}") from error
    if not isinstance(metadata, dict):
        raise budget.error(f"{_METADATA} is not a JSON object.")
    return metadata


def _keys(leaf: Any, budget: Budget) -> list[str] | None:
    """A leaf's path; None for a leaf that is no array."""
    try:
        keys = [str(key["key"]) for key in leaf["key_metadata"]]
        kind = str(leaf["value_metadata"]["value_type"])
    except (KeyError, TypeError) as error:
        raise budget.error(f"{_METADATA} has a leaf without a path or type.") from error
    if any("/" in key or key in ("", ".", "..") for key in keys):
        raise budget.error(f"{_METADATA} has a path with an unusable part: {keys!r:.80}.")
    is_array = keys and kind in ("jax.Array", "np.ndarray", "scalar")
    return keys if is_array else None


def _open(folder: Path, driver: str, path: str, together: bool, budget: Budget) -> Any:
    import tensorstore

    base = folder.resolve().as_uri()
    kvstore: Any = (
        {"driver": "ocdbt", "base": f"{base}/", "path": f"{path}/"}
        if together
        else f"{base}/{path}/"
    )
    try:
        spec = {"driver": driver, "kvstore": kvstore, "recheck_cached_data": False}
        return tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise budget.error(f"array {path!r:.80} cannot be opened: {error!s:.160}") from error
