"""The batch norms of one checkpoint, written as another."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from batchnorm.tools.checkpoints import DEFAULT_LIMIT, CheckpointError, read_checkpoint
from batchnorm.tools.checkpoints.writing import FORMATS, Names, format_of, write_checkpoint
from batchnorm.tools.conventions import Count, convert_variance, count_of
from batchnorm.tools.state import BatchNormState, Variance

__all__ = ["Converted", "convert_checkpoint"]


@dataclass(frozen=True, eq=False)
class Converted:
    """What was written.

    Args:
        path: of the new file.
        names: whose names its arrays have.
        states: its batch norms.
        notes: what is not exact, or was not carried over.
    """

    path: Path
    names: Names
    states: list[BatchNormState]
    notes: list[str]


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    names: Names | None = None,
    count: Count = None,
    force: bool = False,
    limit: int = DEFAULT_LIMIT,
) -> Converted:
    """Write the batch norms of a checkpoint in another format, under another library's names.

    Args:
        source: of any format that `read_checkpoint` knows.
        target: ends in .safetensors, .pt, .pth, .msgpack, .weights.h5 or .h5 (Keras 2's layout,
            which every Keras loads by name).
        names: "torch", "flax" (linen's collections), "nnx" or "keras"; None for those that are
            usual for the format: torch in .safetensors and .pt, flax in .msgpack.
        count: values per channel in a training batch, to convert the variance (S10), as in
            `transfer`. Without it the variance is carried as it is, and a note says so.
        force: replace an existing file.
        limit: as in `read_checkpoint`.

    Returns:
        What was written; read its `notes`.

    Raises:
        CheckpointError: source cannot be read or has no batch norm; target exists, cannot be
            written, or has a format that cannot have such names.
        ImportError: .pt needs torch, .h5 needs h5py.
    """
    source, target = Path(source), Path(target)
    allowed = FORMATS[format_of(target)]
    names = names or allowed[0]
    if names not in allowed:
        raise CheckpointError(
            f"{target}: such files can have the names of {', '.join(allowed)}; got {names}."
        )
    if target.exists() and not force:
        raise CheckpointError(f"{target}: it exists; force=True (--force) replaces it.")
    found = read_checkpoint(source, limit=limit)
    if not found.layers:
        raise CheckpointError(
            f"{source}: it has no batch norm among its {len(found.entries)} arrays."
        )
    wanted: Variance = "unbiased" if names == "torch" else "biased"
    states = []
    for state in found.layers:
        kind: Variance = "biased" if state.renorm is not None else wanted
        states.append(convert_variance(state, kind, count_of(state, count)))
    write_checkpoint(target, states, names, force=force)
    return Converted(target, names, states, [*found.notes, *_notes(states, wanted)])


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
        shown = ", ".join(f"eps={eps} decay={decay}" for eps, decay in sorted(options, key=str))
        notes.append(f"Files of arrays have no place for options; the source says {shown}.")
    narrow = sum(s.stored in ("float16", "bfloat16") for s in states)
    if narrow:
        notes.append(f"{narrow} layers of half-precision statistics were written as float32.")
    return notes
