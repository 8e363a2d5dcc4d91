"""All arrays of several checkpoints of one layout, merged."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.core.errors import ArgumentValueError
from batchnorm.tools.checkpoints import Checkpoint, Contents
from batchnorm.tools.checkpoints.rewriting import check_layout, rewrite, stored
from batchnorm.tools.merging.others import average_others
from batchnorm.tools.state import BatchNormState, FloatArray
from batchnorm.tools.text import list_names, printable

__all__ = ["check_files", "names_of", "write_merged"]


def check_files(paths: Sequence[str], found: Sequence[Checkpoint], target: Path) -> None:
    """Raise unless all files have the same arrays, in the target's format.

    Args:
        paths: of the files, for messages.
        found: the files with their `contents`.
        target: the file to write.

    Raises:
        CheckpointError: the target has another format.
        ArgumentValueError: a file has other arrays; names the first difference.
    """
    first = found[0]
    check_layout(first, target)
    for path, checkpoint in zip(paths, found, strict=True):
        for what, ours, theirs in _differences(first, checkpoint):
            if ours != theirs:
                raise ArgumentValueError(
                    "everything=True (--all) needs files with the same arrays; "
                    f"{printable(path)} has {what}{theirs}, {printable(paths[0])} {ours}."
                )


def _differences(first: Checkpoint, other: Checkpoint) -> Iterator[tuple[str, str, str]]:
    """Properties that two files must share, with their values in both."""
    yield "the format ", first.format, other.format
    names, others = names_of(first), names_of(other)
    for name in [*names, *others]:
        yield "", _presence(name, names), _presence(name, others)
        ours, theirs = first.entries[name], other.entries[name]
        yield f"{printable(name)!r} of shape ", str(ours.shape), str(theirs.shape)
        yield f"{printable(name)!r} of type ", ours.dtype, theirs.dtype


def _presence(name: str, names: Mapping[str, None]) -> str:
    return f"{'an' if name in names else 'no'} array {printable(name)!r}"


def names_of(checkpoint: Checkpoint) -> dict[str, None]:
    """Names of the arrays that are merged, in the order of the file."""
    contents = _contents(checkpoint)
    used = {name for roles in contents.roles for name in roles.values()}
    entries = checkpoint.entries
    return {name: None for name in entries if name in used or name in contents.others}


def write_merged(
    target: Path,
    paths: Sequence[str],
    found: Sequence[Checkpoint],
    states: Sequence[BatchNormState],
    weights: FloatArray,
) -> tuple[int, list[str]]:
    """Write merged batch norms and the averages of all other arrays.

    Args:
        target: a file that may be written.
        paths, found: the files, as `check_files` has found them.
        states: the merged layers, in the order of the first file.
        weights: of the files, float64.

    Returns:
        The number of other arrays, and notes on texts that differ.

    Raises:
        ArgumentValueError: as `average_others`; a value that overflows its type.
        CheckpointError: the target cannot be written.
    """
    first, contents = found[0], [_contents(checkpoint) for checkpoint in found]
    averaged = average_others([[*c.others.items()] for c in contents], weights, paths)
    arrays = dict(averaged)
    for roles, state in zip(contents[0].roles, states, strict=True):
        arrays |= {name: _array_of(state, role) for role, name in roles.items()}
    narrow = {name: _narrow(name, arrays[name], first) for name in names_of(first)}
    rewrite(target, first, narrow)
    return len(averaged), _notes_on_texts(paths[0], contents)


def _array_of(state: BatchNormState, role: str) -> NDArray[Any]:
    if role == "packed":
        return np.stack([getattr(state, name) for name in ("mean", "var")])
    owner = state if hasattr(state, role) else state.renorm
    return np.asarray(getattr(owner, role))


def _narrow(name: str, array: NDArray[Any], first: Checkpoint) -> NDArray[Any]:
    """An array in the first file's shape and type."""
    entry = first.entries[name]
    with np.errstate(over="ignore"):
        narrow = stored(array, entry.dtype).reshape(entry.shape)
    whole = narrow.dtype.kind in "iu"
    if (narrow.ravel() != array.ravel()).any() if whole else not _is_finite(narrow):
        raise ArgumentValueError(f"the merged {printable(name)!r} overflows {entry.dtype}.")
    return narrow


def _is_finite(array: NDArray[Any]) -> bool:
    return bool(np.isfinite(array.astype(np.float64)).all())


def _notes_on_texts(path: str, contents: Sequence[Contents]) -> list[str]:
    """A note on metadata and attributes that are not those of all files."""
    first = contents[0].texts
    keys = dict.fromkeys(key for c in contents for key in c.texts)
    differ = [key for key in keys if any(c.texts.get(key) != first.get(key) for c in contents)]
    if not differ:
        return []
    names = list_names(["@".join(filter(None, key)) for key in differ], 3)
    return [
        f"Metadata and attributes are those of {printable(path)}; {len(differ)} differ between "
        f"the files: {names}."
    ]


def _contents(checkpoint: Checkpoint) -> Contents:
    assert checkpoint.contents is not None  # they were asked for
    return checkpoint.contents
