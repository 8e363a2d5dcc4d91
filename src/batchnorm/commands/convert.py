"""`batchnorm convert`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from batchnorm.commands.errors import UserError, needs


class _Names(str, Enum):
    torch = "torch"
    flax = "flax"
    nnx = "nnx"
    keras = "keras"


def convert(
    source: Annotated[
        Path,
        typer.Argument(
            help="A checkpoint: .safetensors, .pt, .keras, .weights.h5, .h5, .msgpack, or a folder "
            "of orbax."
        ),
    ],
    target: Annotated[
        Path,
        typer.Argument(help="What to write: .safetensors, .pt, .msgpack, .weights.h5 or .h5."),
    ],
    names: Annotated[
        _Names | None,
        typer.Option(help="Whose names the arrays get; those usual for the format otherwise."),
    ] = None,
    count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Values per channel in a training batch, one for all layers: converts between "
            "torch's unbiased variance and the others' biased one.",
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing file.")] = False,
    limit: Annotated[int, typer.Option(min=1, help="MiB of arrays that reading may take.")] = 1024,
) -> None:
    """Write the batch norms of a checkpoint in another format.

    Only they are written. A .h5 has Keras 2's layout: model.load_weights(file, by_name=True) loads
    it into a whole model. Nothing in the source is executed.
    """
    from batchnorm.tools.convert import convert_checkpoint

    with needs(f"{source.name} to {target.name}", "files,torch"):
        try:
            done = convert_checkpoint(
                source,
                target,
                names=None if names is None else names.value,
                count=count,
                force=force,
                limit=limit << 20,
            )
        except (ValueError, OSError) as error:
            raise UserError(str(error)) from error
    layers = "1 batch norm" if len(done.states) == 1 else f"{len(done.states)} batch norms"
    typer.echo(f"{target}: {layers}, {done.names}'s names")
    for note in done.notes:
        typer.echo(f"  note: {note}")
