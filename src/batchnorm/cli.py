"""The command line: its options, its commands, and the handling of errors."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Sequence
from functools import wraps
from inspect import Parameter, cleandoc, signature
from typing import Annotated, Any

try:
    import typer
    from typer.core import TyperGroup
except ImportError:
    _install = "pip install 'batchnorm[cli]'"
    sys.stderr.write(f"batchnorm: the command line needs typer; install it with: {_install}\n")
    sys.exit(2)

from batchnorm.commands.bench import bench
from batchnorm.commands.convert import convert
from batchnorm.commands.demo import demo
from batchnorm.commands.errors import UserError
from batchnorm.commands.info import info
from batchnorm.commands.inspect import inspect
from batchnorm.commands.merge import merge
from batchnorm.commands.statuses import MEANINGS, run
from batchnorm.commands.streams import write_error
from batchnorm.commands.verify import verify

# The modules above are cheap to import: a command imports its tools when it runs.


class _Group(TyperGroup):
    """Exits with a status for each kind of error, and with a message for a user's mistake."""

    def main(self, *args: Any, **extra: Any) -> Any:
        """Run the command line; always ends with `SystemExit`."""
        sys.exit(int(run(lambda: super(_Group, self).main(*args, **extra))))


# Paragraphs, since the help joins the lines of one.
_EPILOG = "\n\n".join(
    [
        "batchnorm COMMAND --help has examples.",
        "Exit status:",
        *(f"{status:>5}  {meaning}" for status, meaning in MEANINGS.items()),
    ]
)

app = typer.Typer(
    cls=_Group,
    help="Batch normalization, exact on padded batches.",
    epilog=_EPILOG,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        from batchnorm import __version__

        print(f"batchnorm {__version__}")
        raise typer.Exit


_Debug = Annotated[
    bool, typer.Option("--debug", help="Show the traceback behind an error message.")
]


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print version."),
    ] = False,
    debug: _Debug = False,
) -> None:
    pass


_EXAMPLES: dict[Callable[..., None], tuple[str, ...]] = {
    inspect: (
        "inspect model.safetensors",
        "inspect model.keras --html report.html",
        "inspect model.pt --json --strict > report.json",
    ),
    convert: (
        "convert resnet50.pt resnet50.h5",
        "convert mlp.msgpack mlp.pt --count 256",
        "convert model.keras batch_norms.safetensors --names torch",
    ),
    merge: (
        "merge client1.pt client2.pt client3.pt -o server.pt --counts 5000,1200,300",
        "merge epoch8.safetensors epoch9.safetensors -o averaged.safetensors --all",
    ),
    demo: ("demo", "demo --framework jax --seeds 5 --out picture.png"),
    bench: (
        "bench --quick",
        "bench --shape 32,256,56,56 --masked 0.3",
        "bench --framework jax --shape 262144,64 --json",
    ),
    info: ("info", "info --json"),
    verify: ("verify", "verify --quick", "verify --device cuda --json > verify.json"),
}


def _register(command: Callable[..., None], examples: Sequence[str]) -> None:
    # Typer keeps the line breaks of all paragraphs but the first.
    paragraphs = cleandoc(command.__doc__ or "").split("\n\n")
    text = "\n\n".join(" ".join(paragraph.split()) for paragraph in paragraphs)
    lines = "\n\n".join(f"batchnorm {example}" for example in examples)
    app.command(help=text, epilog=f"Examples:\n\n{lines}")(_take_debug(command))


def _take_debug(command: Callable[..., None]) -> Callable[..., None]:
    """The command with `--debug` among its own options, too: it may stand anywhere."""

    @wraps(command)
    def run_command(context: typer.Context, debug: bool, **arguments: Any) -> None:
        try:
            command(**arguments)
        except (UserError, MemoryError, OSError) as error:
            if debug or (context.parent and context.parent.params["debug"]):
                write_error("".join(traceback.format_exception(error)))
            raise

    own = signature(command, eval_str=True)
    added = (
        Parameter("context", Parameter.KEYWORD_ONLY, annotation=typer.Context),
        Parameter("debug", Parameter.KEYWORD_ONLY, default=False, annotation=_Debug),
    )
    parameters = [p.replace(kind=Parameter.KEYWORD_ONLY) for p in own.parameters.values()]
    run_command.__signature__ = own.replace(parameters=[*parameters, *added])  # type: ignore[attr-defined]
    run_command.__annotations__ = {p.name: p.annotation for p in (*parameters, *added)}
    return run_command


for _command, _examples in _EXAMPLES.items():
    _register(_command, _examples)


def main() -> None:
    """Run the command line."""
    app()
