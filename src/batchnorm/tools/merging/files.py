"""The batch norms, or all arrays, of several checkpoints, merged and written as one file."""

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
from batchnorm.tools.merging.counts import check_one_for_all
from batchnorm.tools.merging.whole_files import check_files, names_of, write_merged

__all__ = ["MergedFile", "merge_checkpoints"]


@dataclass(frozen=True, eq=False)
class MergedFile:
    """The new file, and the layers in it.

    Args:
        written: the file, its states, and what it does not hold.
        layers: how far the sources were apart in each.
        others: number of the arrays in no batch norm's state that it holds.
    """

    written: Converted
    layers: list[MergedLayer]
    others: int = 0


@names_errors("merge")
def merge_checkpoints(
    sources: Sequence[str | os.PathLike[str]],
    target: str | os.PathLike[str],
    *,
    counts: Counts = None,
    names: Names | None = None,
    everything: bool = False,
    force: bool = False,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> MergedFile:
    """Merge the batch norms, or all arrays, of checkpoints, and write them as a new one.

    Args:
        sources: two or more, each as in `convert_checkpoint`.
        target: another file, as in `convert_checkpoint`.
        counts: as in `merge`; with them the variance becomes of the kind that the names imply.
        names: as in `convert_checkpoint`; not with `everything`.
        everything: write all other arrays as well, averaged by the same weights in float64 as in
            `merge`, with the first source's names and types. All sources have the same arrays and
            the target's format. Arrays of optimizers and callbacks, and values that are no
            arrays, are left out.
        force: replace an existing file.
        limit: most bytes to read of each source, as in `read_checkpoint`.
        seconds: most seconds to read one for.

    Returns:
        The new file and its contents; read the `notes`. Its `left_out` is that of the first source.

    Raises:
        ValueError: as `merge`. With `everything`: sources of other arrays, `names`.
        CheckpointError: as `convert_checkpoint`. With `everything`: an array that cannot be kept,
            a target of another format.
        ImportError: .pt needs torch, .h5 needs h5py.
    """
    paths = [os.fspath(source) for source in sources]
    if len(paths) < 2:
        raise ArgumentValueError(f"there must be two or more files; got {len(paths)}.")
    if paths.count("-") > 1:
        raise ArgumentValueError("only one of the files can be standard input, '-'.")
    target = Path(target)
    chosen = check_target(target, paths, names, force)
    if everything and names is not None:
        raise ArgumentValueError(
            f"names (--names) must be left out with everything=True (--all), since only batch "
            f"norms are renamed; got {names}."
        )
    found = [read_layers(path, limit, seconds, everything=everything) for path in paths]
    notes = [f"{path}: {note}" for path, c in zip(paths, found, strict=True) for note in c.notes]
    if everything:
        check_files(paths, found, target)
    states, layers, rows = merge_layers([checkpoint.layers for checkpoint in found], counts)
    if everything:
        weights = check_one_for_all(counts, len(paths))
        others, more = write_merged(target, paths, found, states, weights)
        left = len(found[0].entries) - len(names_of(found[0]))
        done = Converted(target, None, states, [*notes, *more], left)
        return MergedFile(done, layers, others)
    done = write_states(target, states, chosen, rows, force)
    done = replace(done, notes=[*notes, *done.notes], left_out=found[0].others)
    return MergedFile(done, layers)
