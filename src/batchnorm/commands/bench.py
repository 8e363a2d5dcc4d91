"""`batchnorm bench`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from batchnorm.commands.errors import UserError, check_framework, needs
from batchnorm.commands.progress import tell

_SHAPE = "262144,64"
_COLUMNS = {"ms": 0, "quartiles": 70, "error": 50, "ratio": 0}  # and the width that each needs
_QUICK = "8192,64"  # the shape of --quick


def bench(
    shape: Annotated[
        str,
        typer.Option(help="Shape of x, like 32,256,56,56. Channels: axis 1 in torch, else last."),
    ] = _SHAPE,
    masked: Annotated[
        float | None, typer.Option(help="Share of rows that a mask excludes, like 0.5.")
    ] = None,
    framework: Annotated[str, typer.Option(help="torch, jax or keras.")] = "torch",
    inference: Annotated[
        bool, typer.Option("--inference", help="A forward pass in evaluation, not a step.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure, about.")] = 3.0,
    quick: Annotated[
        bool,
        typer.Option(
            "--quick",
            help=f"A third of a second, and without --shape an input of {_QUICK}: it shows that "
            "everything works, but its figures are noisy.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Time a training step, forward and backward, against the framework's own layer.

    It runs in float32 on this machine's processor. Each variant is compared with a float64 result
    before it is timed. The variants take turns, and the table has medians. torch's layer takes no
    mask: it gets the real rows, and its output is scattered. The copy moves as many bytes as the
    step must.
    """
    check_framework(framework)
    if quick:
        seconds = min(seconds, 1 / 3)
        shape = _QUICK if shape == _SHAPE else shape
    sizes = _parse(shape)
    if not as_json:
        _import_rich()
    with needs("the benchmark", f"cli,{framework}"):
        from batchnorm.benchmark.bench import run

        try:
            found = run(
                framework, sizes, masked=masked, inference=inference, seconds=seconds, tell=tell
            )
        except ValueError as error:
            raise UserError(str(error)) from error
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        _print(found)


def _import_rich() -> None:
    """A missing package is noticed before the work."""
    with needs("the table", "cli"):
        import rich.console
        import rich.table  # noqa: F401


def _parse(shape: str) -> tuple[int, ...]:
    try:
        return tuple(int(size) for size in shape.split(","))
    except ValueError as error:
        rule = "--shape must be sizes with commas, like 262144,64"
        raise UserError(f"{rule}; got {shape}") from error


def _print(found: dict[str, Any]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from batchnorm.tools.text import format_number

    padded = "" if found["padded"] is None else f", {found['padded']:.0%} padded"
    mode = "inference" if found["mode"] == "inference" else "training step"
    title = f"{mode}, {tuple(found['shape'])}{padded}, {found['framework']}"
    console = Console(markup=False, highlight=False)
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    table.add_column("", overflow="fold")
    # A narrow terminal keeps the names, the times and their ratios.
    headings = [h for h, least in _COLUMNS.items() if console.width >= least]
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    ours = found["variants"]["batchnorm"]["ms"]
    for name, variant in found["variants"].items():
        low, high = (format_number(q) for q in variant["quartiles"])
        cells = {
            "ms": format_number(variant["ms"]),
            "quartiles": f"{low} to {high}",
            "error": f"{variant['error']:.0e}" if "error" in variant else "",
            "ratio": format_number(variant["ms"] / ours),
        }
        # Text: rich would take x[mask] for a style.
        table.add_row(Text(name), *(cells[heading] for heading in headings))
    machine, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    console.print(table)
    console.print("Ratio: to batchnorm's time. Error: the largest, relative to 1 + |right value|.")
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}; {packages}"
    )
