"""The batch norms of several checkpoints, merged and written as one file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchnorm.core.errors import ArgumentValueError, names_errors
from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS
from batchnorm.tools.checkpoints.writing import Names
from batchnorm.tools.convert import Converted, check_target, read_layers, write_states
from batchnorm.tools.merging import Counts, MergedLayer, merge_layers

__all__ = ["MergedFile", "merge_checkpoints"]


@dataclass(frozen=True, eq=False)
class MergedFile:
    """The new file, and the layers in it.

    Args:
        written: the file, its states, and what it does not hold.
        layers: how far the sources were apart in each.
    """

    written: Converted
    layers: list[MergedLayer]


@names_errors("merge")
def merge_checkpoints(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    counts: Counts = None,
    names: Names | None = None,
    force: bool = False,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> MergedFile:
    """Merge the batch norms of checkpoints, and write them as a new one.

    Args:
        sources: two or more, each as in `convert_checkpoint`.
        target: another file, as in `convert_checkpoint`.
        counts: as in `merge`; with them the variance becomes of the kind that the names imply.
        names: as in `convert_checkpoint`.
        force: replace an existing file.
        limit, seconds: for each source, as in `read_checkpoint`.

    Returns:
        The new file and its contents; read the `notes`. Its `left_out` is that of the first source.

    Raises:
        ValueError: as `merge`.
        CheckpointError: as `convert_checkpoint`.
        ImportError: .pt needs torch, .h5 needs h5py.
    """
    paths = [os.fspath(source) for source in sources]
    if len(paths) < 2:
        raise ArgumentValueError(f"there must be two or more files; got {len(paths)}.")
    if paths.count("-") > 1:
        raise ArgumentValueError("only one of the files can be standard input, '-'.")
    target = Path(target)
    chosen = check_target(target, paths, names, force)
    found = [read_layers(path, limit, seconds) for path in paths]
    states, layers, rows = merge_layers([checkpoint.layers for checkpoint in found], counts)
    done = write_states(target, states, chosen, rows, force)
    notes = [f"{path}: {note}" for path, c in zip(paths, found, strict=True) for note in c.notes]
    done = replace(done, notes=[*notes, *done.notes], left_out=found[0].others)
    return MergedFile(done, layers)
