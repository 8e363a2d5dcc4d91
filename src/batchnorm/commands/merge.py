"""`batchnorm merge`."""

from __future__ import annotations

from typing import Annotated

import typer

from batchnorm.commands.convert import Force, Names, left_out
from batchnorm.commands.errors import UserError
from batchnorm.commands.files import Checkpoint, Limit, Seconds, reading


def merge(
    first: Checkpoint,
    others: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="One or more others of the same layers.")
    ],
    out: Annotated[
        str,
        typer.Option(
            "--out",
            "-o",
            metavar="TARGET",
            help="The new file: .safetensors, .pt, .msgpack, .weights.h5 or .h5.",
        ),
    ],
    counts: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...",
            help="Rows behind each file's statistics, with commas; without it all weigh the same, "
            "and variances stay of the kind that they are.",
        ),
    ] = None,
    names: Names = None,
    everything: Annotated[
        bool,
        typer.Option(
            "--all",
            help="Write all other arrays too, averaged by the same weights. All files must have "
            "the same arrays, and TARGET their format: only batch norms are renamed. Arrays "
            "of optimizers and callbacks are left out.",
        ),
    ] = False,
    force: Force = False,
    limit: Limit = 1 << 30,
    seconds: Seconds = 120.0,
) -> None:
    """Merge the batch norms of several checkpoints: federated clients, averaged checkpoints.

    Means are averaged, variances with the distances of the means, gamma and beta by the same
    weights; counters are summed. Only the batch norms are written, unless --all is given. No code
    of a file is run.
    """
    if not out:
        raise UserError("--out: the name is empty; give a path.")
    numbers = None if counts is None else _parse(counts)
    files = [first, *others]
    with reading("-" if "-" in files else first, "files,torch"):
        from batchnorm.tools.merging.files import merge_checkpoints

        done = merge_checkpoints(
            files,
            out,
            counts=numbers,
            names=None if names is None else names.value,
            everything=everything,
            force=force,
            limit=limit,
            seconds=seconds,
        )
    written = done.written
    layers = "1 batch norm" if len(done.layers) == 1 else f"{len(done.layers)} batch norms"
    if everything:
        layers += f" and {done.others:,} other {'array' if done.others == 1 else 'arrays'}"
    kept = "the first file's names" if written.names is None else f"{written.names}'s names"
    print(f"{out}: {layers} of {len(files)} files merged, {kept}, {left_out(written.left_out)}")
    for layer in done.layers:
        print(f"  {layer}")
    for note in written.notes:
        print(f"  note: {note}")


def _parse(counts: str) -> list[float]:
    try:
        return [float(number) for number in counts.split(",")]
    except ValueError:
        raise UserError(
            f"--counts must be numbers with commas, like 100,250; got {counts!r}"
        ) from None
