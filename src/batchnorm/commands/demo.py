"""`batchnorm demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.commands.errors import check_framework, needs
from batchnorm.commands.files import check_writable, writing
from batchnorm.commands.progress import counting


def demo(
    framework: Annotated[
        str, typer.Option(help="torch, jax or keras: whose batch norm this one is compared with.")
    ] = "torch",
    seeds: Annotated[int, typer.Option(min=1, help="Pairs of networks to train.")] = 3,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the training set.")] = 20,
    out: Annotated[Path, typer.Option(help="Where the picture goes, a .png.")] = Path("demo.png"),
    quick: Annotated[
        bool, typer.Option("--quick", help="One seed, two epochs, less data.")
    ] = False,
) -> None:
    """Train two networks on padded batches of real data: the framework's norm, and this one."""
    check_framework(framework)
    check_writable("--out", out, ".png")
    with needs("the demo", f"cli,{framework}"):
        from rich.console import Console

        from batchnorm.demo import experiment, report

        chosen = experiment.load_framework(framework)
    if quick:
        seeds, epochs = 1, 2
    console = Console()
    total = seeds * epochs
    with needs("the demo", f"cli,{framework}"), counting("demo: training epoch", total) as advance:
        results = experiment.run(chosen, seeds, epochs, advance, limit=320 if quick else None)
    with writing("--out", out):
        report.draw(results, out)
    console.print(report.make_table(results, console.width))
    console.print(report.explain(seeds))
    console.print(f"picture: {out.resolve()}", soft_wrap=True)
