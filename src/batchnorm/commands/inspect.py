"""`batchnorm inspect`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from batchnorm.commands.errors import ProblemFound, UserError, needs
from batchnorm.commands.files import (
    Checkpoint,
    Limit,
    Seconds,
    check_new,
    check_writable,
    reading,
    writing,
)


def inspect(
    file: Checkpoint,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
    per_channel: Annotated[
        bool, typer.Option("--per-channel", help="With --json: print every channel's numbers.")
    ] = False,
    html: Annotated[Path | None, typer.Option(help="Also write this .html report.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With --html: replace an existing report unasked.")
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with status 1 for warnings, too.")
    ] = False,
    eps: Annotated[
        float, typer.Option(min=0.0, help="Epsilon of layers for which the file has none.")
    ] = 1e-5,
    limit: Limit = 1 << 30,
    seconds: Seconds = 120.0,
) -> None:
    """Find every batch norm of a checkpoint, and report its problems.

    Exit status 0: no problem; 1: an error in a layer, or no batch norm; 2: the file cannot be read.
    No code of a file is run.
    """
    if per_channel and not as_json:
        raise UserError("--per-channel needs --json; add --json.")
    if html is not None:
        check_writable("--html", html, ".html", file)
        check_new("--html", html, force)
    if not as_json:
        with needs("the table", "cli"):
            from rich.console import Console
    with reading(file, "files,cli"):
        from batchnorm.tools.inspection import Thresholds
        from batchnorm.tools.inspection import inspect as look

        report = look(file, thresholds=Thresholds(eps=eps), limit=limit, seconds=seconds)
    if html is not None:
        with writing("--html", html):
            report.save_html(html)
    if as_json:
        print(report.to_json(per_channel=per_channel))
    else:
        Console().print(report)
    wrong = report.errors or (strict and report.warnings)
    if wrong or not report.layers:
        raise ProblemFound
