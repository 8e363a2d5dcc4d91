"""`batchnorm info`."""

from __future__ import annotations

import json
from typing import Annotated

import typer


def info(
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")] = False,
) -> None:
    """Print versions and the kernels in use, for bug reports."""
    from batchnorm import environment

    if as_json:
        print(json.dumps(environment.find_config(), indent=2))
    else:
        environment.show_config()
