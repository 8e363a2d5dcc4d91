"""`batchnorm bench`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from batchnorm.commands.errors import UserError, needs

_FRAMEWORKS = ("torch", "jax", "keras")


def bench(
    shape: Annotated[
        str,
        typer.Option(help="Shape of x, like 32,256,56,56. Channels: axis 1 in torch, else last."),
    ] = "262144,64",
    masked: Annotated[
        float | None, typer.Option(help="Share of rows that a mask excludes, like 0.5.")
    ] = None,
    framework: Annotated[str, typer.Option(help="torch, jax or keras.")] = "torch",
    inference: Annotated[
        bool, typer.Option("--inference", help="A forward pass in evaluation, not a step.")
    ] = False,
    seconds: Annotated[float, typer.Option(min=0.1, help="Time to measure, about.")] = 3.0,
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
    if framework not in _FRAMEWORKS:
        raise UserError(f"--framework must be {' or '.join(_FRAMEWORKS)}; got {framework}")
    sizes = _parse(shape)
    with needs("the benchmark", f"cli,{framework}"):
        from batchnorm.benchmark.bench import run

        try:
            found = run(framework, sizes, masked=masked, inference=inference, seconds=seconds)
        except ValueError as error:
            raise UserError(str(error)) from error
    if as_json:
        print(json.dumps(found, indent=2))
    else:
        with needs("the table", "cli"):
            _print(found)


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
    table = Table(title=title, box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("", "ms", "quartiles", "error", "ratio"):
        table.add_column(heading, justify="right" if heading else "left", no_wrap=bool(heading))
    ours = found["variants"]["batchnorm"]["ms"]
    for name, variant in found["variants"].items():
        low, high = (format_number(q) for q in variant["quartiles"])
        table.add_row(
            Text(name),  # as it is: rich would take x[mask] for a style
            format_number(variant["ms"]),
            f"{low} to {high}",
            f"{variant['error']:.0e}" if "error" in variant else "",
            format_number(variant["ms"] / ours),
        )
    machine, versions = found["machine"], found["versions"]
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    console = Console(markup=False, highlight=False)
    console.print(table)
    console.print("Ratio: to batchnorm's time. Error: the largest, relative to 1 + |right value|.")
    console.print(
        f"{machine['processor']}, {machine['cores']} cores, {machine['instructions']}; {packages}"
    )
