"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import batchnorm

_INSTALL = "pip install 'batchnorm[cli,torch]'"

try:
    import typer
except ImportError:
    sys.exit(f"batchnorm: the command line needs typer; install it with: {_INSTALL}")

app = typer.Typer(help="Batch normalization, exact on padded batches.", no_args_is_help=True)


def main() -> None:
    """Run the command line."""
    app()


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"batchnorm {batchnorm.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
) -> None:
    pass


@app.command()
def config() -> None:
    """Print versions, and the kernels in use."""
    batchnorm.show_config()


@app.command()
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
    try:
        from rich.console import Console
        from rich.progress import Progress

        from batchnorm.demo import experiment, report

        if framework not in experiment.FRAMEWORKS:
            names = " or ".join(experiment.FRAMEWORKS)
            raise _failure(f"--framework must be {names}; got {framework}")
        chosen = experiment.load_framework(framework)
    except ImportError as error:
        missing = (error.name or str(error)).partition(".")[0]
        install = _INSTALL.replace("torch", framework)
        raise _failure(f"the demo needs {missing}; install it with: {install}") from error
    _check_writable(out)
    if quick:
        seeds, epochs = 1, 2
    console = Console()
    with Progress(console=console) as progress:
        task = progress.add_task("training", total=seeds * epochs)
        results = experiment.run(
            chosen, seeds, epochs, lambda: progress.advance(task), limit=320 if quick else None
        )
    report.draw(results, out)
    console.print(report.make_table(results))
    console.print(report.explain(seeds))
    console.print(f"picture: {out.resolve()}", soft_wrap=True)


def _check_writable(path: Path) -> None:
    """Fail before minutes of training rather than after."""
    if path.suffix.lower() != ".png":
        raise _failure(f"--out: the picture is a PNG; its name must end in .png, got {path}")
    try:
        existed = path.exists() or path.is_symlink()  # a dangling link is not ours to remove
        with path.open("ab"):
            pass
    except OSError as error:
        raise _failure(f"--out: cannot write {path}: {error.strerror}") from error
    if not existed:
        path.unlink()


def _failure(message: str) -> typer.Exit:
    typer.echo(f"batchnorm: {message}", err=True)
    return typer.Exit(1)
