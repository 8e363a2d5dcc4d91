"""`batchnorm convert`."""

from __future__ import annotations

from enum import Enum
from typing import Annotated

import typer

from batchnorm.commands.errors import UserError
from batchnorm.commands.files import Checkpoint, Limit, Seconds, reading

__all__ = ["Force", "Names", "convert", "left_out"]


class _Library(str, Enum):
    torch = "torch"
    flax = "flax"
    nnx = "nnx"
    keras = "keras"


Names = Annotated[
    _Library | None,
    typer.Option(
        help="Library whose names the arrays get; without it, the usual one of the format."
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Replace an existing file.")]


def convert(
    source: Checkpoint,
    target: Annotated[
        str,
        typer.Argument(
            metavar="TARGET",
            help="The new file: .safetensors, .pt, .msgpack, .weights.h5 or .h5.",
        ),
    ],
    names: Names = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Values per channel in a training batch, for all layers; converts between torch's "
            "unbiased variance and the biased one of the others.",
        ),
    ] = None,
    force: Force = False,
    limit: Limit = 1 << 30,
    seconds: Seconds = 120.0,
) -> None:
    """Write the batch norms of a checkpoint in another format.

    Only the batch norms are written. A .h5 file has Keras 2's layout:
    model.load_weights(file, by_name=True) loads it into a whole model. No code of the source is
    run.
    """
    if not target:
        raise UserError("TARGET: the name is empty; give a path.")
    with reading(source, "files,torch"):
        from batchnorm.tools.convert import convert_checkpoint

        done = convert_checkpoint(
            source,
            target,
            names=None if names is None else names.value,
            count=count,
            force=force,
            limit=limit,
            seconds=seconds,
        )
    layers = "1 batch norm" if len(done.states) == 1 else f"{len(done.states)} batch norms"
    print(f"{target}: {layers} written, {done.names}'s names, {left_out(done.left_out)}")
    for note in done.notes:
        print(f"  note: {note}")


def left_out(count: int) -> str:
    """The number of arrays that a new file does not hold, as a phrase."""
    if count == 0:
        return "nothing left out"
    return f"{count:,} other {'array' if count == 1 else 'arrays'} left out"
