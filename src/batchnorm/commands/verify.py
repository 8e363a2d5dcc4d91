"""`batchnorm verify`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from batchnorm.commands.errors import ProblemFound, UserError, needs

if TYPE_CHECKING:
    from batchnorm.verification import Progress, Verification


def verify(
    device: Annotated[
        str, typer.Option(help="cpu, or cuda: layers on this machine's GPU.")
    ] = "cpu",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer cases, in a few seconds.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON instead of the table.")
    ] = False,
) -> None:
    """Check every kernel on this machine, against float64.

    A sample of the library's own tests: each kernel with each type, layout and mask, on a CPU with
    every instruction set that it has; then each installed front end, its kernels and its array
    code. "Worst" is the largest error as a part of what the specification allows.

    Exit status 0: all results are right; 1: some are not, or a process has ended early; 2: nothing
    could be checked. Put the output into a bug report, beside that of `batchnorm info`.
    """
    if device not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda; got {device}")
    with needs("verify", "cli"):
        from batchnorm.verification import verify as check

    with _progress() as progress:
        found = check(device, quick=quick, progress=progress)
    if as_json:
        print(found.to_json())
    elif found.checks:
        with needs("the table", "cli"):
            _print(found)
    if not found.checks:
        reasons = "; ".join(f"{front_end}: {reason}" for front_end, reason in found.unchecked)
        raise UserError(f"nothing could be checked on {device}: {reasons}")
    if not found.passed:
        raise ProblemFound


@contextmanager
def _progress() -> Iterator[Progress]:
    """Progress on standard error: a bar on a terminal, else a line for each front end."""
    from rich.console import Console
    from rich.progress import Progress as Bars

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _say
        return
    with Bars(console=console, transient=True) as bars:
        tasks = {}

        def advance(front_end: str, done: int, total: int) -> None:
            if front_end not in tasks:
                tasks[front_end] = bars.add_task(front_end, total=total)
            bars.update(tasks[front_end], completed=done)

        yield advance


def _say(front_end: str, done: int, total: int) -> None:
    """A line for each quarter of a front end's cases."""
    from batchnorm.commands.streams import write_error

    if 4 * done // total > 4 * (done - 1) // total:
        write_error(f"{front_end}: {done} of {total} cases\n")


def _print(found: Verification) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for heading in ("front end", "way", "instructions", "cases", "wrong", "worst"):
        right = heading in ("cases", "wrong", "worst")
        table.add_column(heading, justify="right" if right else "left", no_wrap=True)
    for check in found.checks:
        wrong = len(check.failures)
        table.add_row(
            Text(check.front_end),
            Text(check.way),
            check.instructions,
            str(check.cases),
            str(wrong),
            "" if wrong == check.cases else f"{check.worst:.2f}",
            style="bold red" if wrong else None,
        )
    console = Console(markup=False, highlight=False)
    console.print(table)
    for line in str(found).splitlines()[len(found.checks) :]:
        console.print(line, soft_wrap=True)
    shown = ", ".join(
        f"{name} {number}" for name, number in found.versions.items() if number != "not installed"
    )
    verdict = "all results are right" if found.passed else "results are wrong"
    console.print(f"{verdict}; {found.device}, {found.seconds:.0f} s; {shown}", soft_wrap=True)
