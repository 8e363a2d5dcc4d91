"""Folders that orbax writes; tensorstore reads them, and sees nothing but their files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import numpy as np
import tensorstore
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.folders import Folder, Parts
from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.checkpoints.source import ITEM_SIZES, Catalog, Entry, Source

__all__ = ["read"]

_METADATA = "_METADATA"
_WRAPPED = "value"  # an nnx.State saved as such has its arrays one level deeper
_ARRAYS = ("jax.Array", "np.ndarray", "scalar")
_MANIFEST, _DATA = "manifest.ocdbt", "d"  # files of a database of arrays
_SHAPES = (".zarray", "zarr.json")  # files with an array's shape and type
# One thread each, so that memory does not depend on the machine.
_CONTEXT = {"data_copy_concurrency": {"limit": 1}, "file_io_concurrency": {"limit": 1}}

# Opens an array by its path in the metadata, with its values or for its shape alone.
Opener = Callable[[str, bool], AbstractContextManager[Any]]


def read(root: Folder, budget: Budget) -> Source:
    """The arrays of a folder; names are paths, joined by slashes."""
    top = _find(root, budget)
    metadata = _read_metadata(root, top, budget)
    tree = metadata.get("tree_metadata")
    if not isinstance(tree, dict):
        raise budget.error(f"{_METADATA} has no tree_metadata.")
    driver = "zarr3" if metadata.get("use_zarr3") is True else "zarr"
    together = metadata.get("use_ocdbt") is not False  # arrays in one database
    opened = (_open_database if together else _open_folders)(root, top, driver, budget)
    catalog: Catalog[str] = Catalog(budget)
    for leaf in tree.values():
        keys = _keys(leaf, budget)
        if keys is None:
            continue
        name = "/".join(keys[:-1] if keys[-1] == _WRAPPED else keys)
        with opened(".".join(keys), False) as store:
            dtype, shape = store.dtype.name, [int(n) for n in store.shape]
        if dtype in ITEM_SIZES:
            catalog.add(name, Entry(budget.check_shape(shape, shown(name)), dtype), ".".join(keys))
        else:
            catalog.skip(name, f"of type {dtype}")

    def load(name: str) -> NDArray[Any]:
        entry = catalog.entries[name]
        with opened(catalog.places[name], True) as store:
            chunk = [int(n) for n in store.chunk_layout.read_chunk.shape or entry.shape]
            whole = [-(-n // max(c, 1)) * c for n, c in zip(entry.shape, chunk, strict=True)]
            budget.check_shape(whole, shown(name))
            budget.spend(math.prod(whole) * ITEM_SIZES[entry.dtype] + entry.size, shown(name))
            array = np.asarray(store.read().result())
        return array.astype(np.float32) if entry.dtype == "bfloat16" else array

    return Source("orbax", catalog.entries, load, skipped=catalog.skipped, notes=catalog.notes())


def _find(root: Folder, budget: Budget) -> Parts:
    """The folder with the arrays: the given one, or the only item of a CheckpointManager's step."""
    names = root.names()
    if _METADATA in names:
        return ()
    inner = [name for name, folder in names.items() if folder and _METADATA in root.names((name,))]
    if len(inner) != 1:
        raise budget.error(
            f"the folder is no orbax checkpoint: it has no {_METADATA}. Of a CheckpointManager "
            "give the folder of one step."
        )
    return (inner[0],)


def _read_metadata(root: Folder, top: Parts, budget: Budget) -> dict[str, Any]:
    try:
        metadata = json.loads(root.read((*top, _METADATA)))
    except (ValueError, RecursionError) as error:
        if isinstance(error, type(budget.error(""))):
            raise
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
        raise budget.error(f"{_METADATA} has a path with an unusable part: {shown(str(keys))}.")
    return keys if keys and kind in _ARRAYS else None


def _open_database(root: Folder, top: Parts, driver: str, budget: Budget) -> Opener:
    """The opener of arrays in one database, whose files are in this folder and those below it."""
    files: list[Parts] = []
    bases = [(name,) for name in root.names(top) if root.is_folder((*top, name))]
    for base in [(), *bases]:
        inner = root.names((*top, *base))
        files += [(*base, _MANIFEST)] if _MANIFEST in inner else []
        if _DATA in inner:
            files += [(*base, _DATA, name) for name in root.names((*top, *base, _DATA))]
    place = root.lend([((*top, *file), file) for file in files])

    @contextmanager
    def opened(path: str, values: bool) -> Iterator[Any]:
        base = {"driver": "file", "path": f"{place}/"}
        yield _open({"driver": "ocdbt", "base": base, "path": f"{path}/"}, driver, path, budget)

    return opened


def _open_folders(root: Folder, top: Parts, driver: str, budget: Budget) -> Opener:
    """The opener of arrays that have a folder each."""

    @contextmanager
    def opened(path: str, values: bool) -> Iterator[Any]:
        files = _files(root, (*top, path), values)
        with root.lent([((*top, path, *file), file) for file in files]) as place:
            yield _open({"driver": "file", "path": f"{place}/"}, driver, path, budget)

    return opened


def _files(root: Folder, parts: Parts, deep: bool) -> list[Parts]:
    """Files of an array: all of them, or the one with its shape."""
    if not deep:
        return [(name,) for name in root.names(parts) if name in _SHAPES]
    found: list[Parts] = []
    pending: list[Parts] = [()]
    while pending:
        inner = pending.pop()
        for name, folder in root.names((*parts, *inner)).items():
            (pending if folder else found).append((*inner, name))
    return found


def _open(kvstore: Any, driver: str, path: str, budget: Budget) -> Any:
    spec = {"driver": driver, "kvstore": kvstore, "recheck_cached_data": False, "context": _CONTEXT}
    try:
        return tensorstore.open(spec, open=True, read=True).result()
    except ValueError as error:
        raise budget.error(f"array {shown(path)} cannot be opened: {error!s:.160}") from error
