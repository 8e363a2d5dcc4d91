"""The batch norms of one checkpoint, written as another."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass
from pathlib import Path

from batchnorm.tools.checkpoints import (
    DEFAULT_LIMIT,
    DEFAULT_SECONDS,
    CheckpointError,
    read_checkpoint,
)
from batchnorm.tools.checkpoints.writing import FORMATS, Names, format_of, write_checkpoint
from batchnorm.tools.conventions import Count, convert_variance, count_of
from batchnorm.tools.paths import is_inside, is_same_file
from batchnorm.tools.state import BatchNormState, Variance
from batchnorm.tools.text import list_names

__all__ = ["Converted", "convert_checkpoint"]


@dataclass(frozen=True, eq=False)
class Converted:
    """What was written.

    Args:
        path: of the new file.
        names: whose names its arrays have.
        states: its batch norms.
        notes: what is not exact, or was not carried over.
        left_out: arrays of the source that belong to none of them.
    """

    path: Path
    names: Names
    states: list[BatchNormState]
    notes: list[str]
    left_out: int


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    names: Names | None = None,
    count: Count = None,
    force: bool = False,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> Converted:
    """Write the batch norms of a checkpoint in another format, under another library's names.

    Args:
        source: of any format that `read_checkpoint` knows, or "-" for standard input.
        target: another file; ends in .safetensors, .pt, .pth, .msgpack, .weights.h5 or .h5 (Keras
            2's layout, which every Keras loads by name).
        names: "torch", "flax" (linen's collections), "nnx" or "keras"; None for those that are
            usual for the format: torch in .safetensors and .pt, flax in .msgpack.
        count: values per channel in a training batch, to convert the variance (S10), as in
            `transfer`. Without it the variance is carried as it is, and a note says so.
        force: replace an existing file.
        limit, seconds: as in `read_checkpoint`.

    Returns:
        What was written; read its `notes`.

    Raises:
        CheckpointError: source cannot be read or has no batch norm; target exists, is the source
            or within it, cannot be written, or has a format that cannot have such names.
        ImportError: .pt needs torch, .h5 needs h5py.
    """
    source, target = os.fspath(source), Path(target)
    allowed = FORMATS[format_of(target)]
    names = names or allowed[0]
    if names not in allowed:
        raise CheckpointError(
            f"{target}: such files can have the names of {', '.join(allowed)}; got {names}."
        )
    _check_target(target, source, force)
    found = read_checkpoint(source, limit=limit, seconds=seconds)
    if not found.layers:
        raise CheckpointError(
            f"{source}: it has no batch norm among its {len(found.entries)} arrays."
        )
    wanted: Variance = "unbiased" if names == "torch" else "biased"
    states = []
    for state in found.layers:
        kind: Variance = "biased" if state.renorm is not None else wanted
        states.append(convert_variance(state, kind, count_of(state, count)))
    try:
        write_checkpoint(target, states, names, force=force)
    except OSError as error:
        raise CheckpointError(
            f"{target}: it cannot be written: {error.strerror or error}."
        ) from error
    notes = [*found.notes, *_notes(states, wanted)]
    return Converted(target, names, states, notes, found.others)


def _check_target(target: Path, source: str, force: bool) -> None:
    """Refuse what must not be replaced: the source above all, however it is spelled."""
    try:
        there = target.stat()
    except (FileNotFoundError, NotADirectoryError):
        there = None  # writing says what is wrong with the folder
    except OSError as error:
        raise CheckpointError(f"{target}: it cannot be written: {error.strerror}.") from error
    if is_same_file(source, target):
        raise CheckpointError(
            f"{target}: it is the source, of which the batch norms alone would be left; give the "
            "target another name."
        )
    if source and Path(source).is_dir() and is_inside(target, Path(source)):
        raise CheckpointError(
            f"{target}: it lies inside the source, a folder; give it a place elsewhere."
        )
    if there is not None and not stat.S_ISREG(there.st_mode):
        what = "a folder" if stat.S_ISDIR(there.st_mode) else "not a regular file"
        raise CheckpointError(f"{target}: it is {what}; give the name of a file.")
    if there is not None and not force:
        raise CheckpointError(f"{target}: it exists; force=True (--force) replaces it.")


def _notes(states: list[BatchNormState], wanted: Variance) -> list[str]:
    notes = []
    carried = [s for s in states if s.renorm is None and s.variance != wanted]
    if carried:
        notes.append(
            f"{len(carried)} of {len(states)} variances were carried as they are, "
            f"{carried[0].variance}, where the names imply {wanted} ones; a count converts them."
        )
    options = {(s.eps, s.decay) for s in states}
    if options != {(None, None)}:
        shown = list_names([f"eps={eps} decay={decay}" for eps, decay in sorted(options, key=str)])
        notes.append(f"Files of arrays have no place for options; the source says {shown}.")
    narrow = sum(s.stored in ("float16", "bfloat16") for s in states)
    if narrow:
        notes.append(f"{narrow} layers of half-precision statistics were written as float32.")
    return notes
