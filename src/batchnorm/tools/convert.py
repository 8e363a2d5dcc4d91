"""The batch norms of one checkpoint, written as another."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from batchnorm.tools.checkpoints import (
    DEFAULT_LIMIT,
    DEFAULT_SECONDS,
    Checkpoint,
    CheckpointError,
    read_checkpoint,
)
from batchnorm.tools.checkpoints.writing import FORMATS, Names, format_of, write_checkpoint
from batchnorm.tools.conventions import Count, convert_variance, count_of
from batchnorm.tools.paths import is_inside, is_same_file
from batchnorm.tools.state import BatchNormState, Variance
from batchnorm.tools.text import list_names

__all__ = ["Converted", "check_target", "convert_checkpoint", "read_layers", "write_states"]


@dataclass(frozen=True, eq=False)
class Converted:
    """The new file, and what it does not hold.

    Args:
        path: of the new file.
        names: the library whose names its arrays have; None for the source's own names.
        states: its batch norms.
        notes: values that are not exact, or were not carried over.
        left_out: number of the source's arrays that are not in it.
    """

    path: Path
    names: Names | None
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
            `transfer`. Without it the variance is copied unchanged, and a note says so.
        force: replace an existing file.
        limit: most bytes to read, as in `read_checkpoint`.
        seconds: most seconds to read for.

    Returns:
        The new file and its contents; read the `notes`.

    Raises:
        CheckpointError: source cannot be read or has no batch norm; target exists, is the source
            or within it, cannot be written, or has a format that cannot have such names.
        ImportError: .pt needs torch, .h5 needs h5py.
    """
    source, target = os.fspath(source), Path(target)
    names = check_target(target, [source], names, force)
    found = read_layers(source, limit, seconds)
    counts = [count_of(state, count) for state in found.layers]
    done = write_states(target, found.layers, names, counts, force)
    return replace(done, notes=[*found.notes, *done.notes], left_out=found.others)


def read_layers(source: str, limit: int, seconds: float, *, everything: bool = False) -> Checkpoint:
    """A checkpoint with at least one batch norm; arguments and errors as in `read_checkpoint`."""
    found = read_checkpoint(source, limit=limit, seconds=seconds, everything=everything)
    if not found.layers:
        raise CheckpointError(
            f"{source}: it has no batch norm among its {len(found.entries)} arrays."
        )
    return found


def write_states(
    target: Path,
    layers: Sequence[BatchNormState],
    names: Names,
    counts: Sequence[float | None],
    force: bool,
) -> Converted:
    """Write states, with the kind of variance that a library keeps.

    Args:
        target, names, force: as `check_target` has found them.
        layers: the states.
        counts: for each the values per channel behind its variance, to convert it; None leaves it.
    """
    wanted: Variance = "unbiased" if names == "torch" else "biased"
    states = []
    for state, count in zip(layers, counts, strict=True):
        kind: Variance = "biased" if state.renorm is not None else wanted
        states.append(convert_variance(state, kind, count))
    try:
        write_checkpoint(target, states, names, force=force)
    except OSError as error:
        raise CheckpointError(
            f"{target}: it cannot be written: {error.strerror or error}."
        ) from error
    return Converted(target, names, states, _notes(states, names, wanted), 0)


def check_target(target: Path, sources: Sequence[str], names: Names | None, force: bool) -> Names:
    """The names that a target's arrays get, after a check that it may be written.

    Args:
        target: its suffix decides the format.
        sources: files that are read, none of which it may be.
        names: as in `convert_checkpoint`.
        force: replace an existing file.

    Raises:
        CheckpointError: it must not be written, above all if it is a source.
    """
    allowed = FORMATS[format_of(target)]
    names = names or allowed[0]
    if names not in allowed:
        raise CheckpointError(
            f"{target}: such files can have the names of {', '.join(allowed)}; got {names}."
        )
    there = _stat(target)
    for source in sources:
        if is_same_file(source, target):
            raise CheckpointError(
                f"{target}: it is the source, whose other arrays would be lost; give the target "
                "another name."
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
    return names


def _stat(target: Path) -> os.stat_result | None:
    """The target as it is; None where there is none."""
    try:
        return target.stat()
    except (FileNotFoundError, NotADirectoryError):
        return None  # writing reports a missing folder
    except OSError as error:
        raise CheckpointError(f"{target}: it cannot be written: {error.strerror}.") from error


def _notes(states: list[BatchNormState], names: Names, wanted: Variance) -> list[str]:
    notes = []
    carried = [s for s in states if s.renorm is None and s.variance != wanted]
    if carried:
        notes.append(
            f"{len(carried)} of {len(states)} variances were copied unchanged "
            f"({carried[0].variance}). {names} expects {wanted} ones: pass count= (--count on the "
            "command line) to convert them."
        )
    options = {(s.eps, s.decay) for s in states}
    if options != {(None, None)}:
        shown = list_names([f"eps={eps} decay={decay}" for eps, decay in sorted(options, key=str)])
        notes.append(
            f"Options are not written, since such files hold arrays only; the source has {shown}."
        )
    narrow = sum(s.stored in ("float16", "bfloat16") for s in states)
    if narrow:
        notes.append(f"{narrow} layers of half-precision statistics were written as float32.")
    return notes
