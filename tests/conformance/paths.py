"""The paths through the code that the table runs on, by name, and what each does not serve.

A path's module has a dictionary WAYS of its own and imports its framework, so that a process
imports one: `find` imports the module whose path is asked for.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path as File
from typing import Any, NamedTuple

import comparison
from cases import CASES, Case
from comparison import Path
from cover import cover

# Where a path's name begins with this, the module that has it, and the environment of a process.
MODULES = {
    "naive": ("naive", {}),
    "torch": ("torch_path", {}),
    "jax": ("jax_path", {"JAX_PLATFORMS": "cpu"}),
    "keras": ("keras_path", {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}),
    "triton": ("triton_path", {"TRITON_INTERPRET": "1"}),
}


def serve_all(case: Case) -> None:
    """No reason to refuse any case."""


class Way(NamedTuple):
    """A path, and the column that it has in the table.

    `refuse` gives the reason why the path does not serve a case, or None. `costly` paths trace,
    compile or interpret each case, and run a cover of the table unless all of it is asked for.
    `sample`: names of the cases that a path runs at all, where one takes many seconds; a third of
    them, unless all is asked for.
    """

    path: Path
    refuse: Callable[[Case], str | None] = serve_all
    costly: bool = False
    sample: tuple[str, ...] = ()

    def cases(self, everything: bool) -> list[Case]:
        """The cases that this path runs."""
        served = [case for case in CASES if self.refuse(case) is None]
        if self.sample:
            sample = self.sample if everything else self.sample[::3]
            return [case for case in served if case.name in sample]
        return cover(served) if self.costly and not everything else served


def everything() -> bool:
    """Whether all cases run on all paths: `make test-all` sets the variable."""
    return os.environ.get("BATCHNORM_TEST_ALL") == "1"


def find(name: str) -> Way:
    """The path of this name; imports its framework."""
    module, _ = MODULES[name.partition("-")[0]]
    return import_module(module).WAYS[name]


def check(name: str, case: Case) -> None:
    """Run a case on a path; a failure says how to repeat it."""
    try:
        comparison.check(find(name).path, case)
    except Exception as error:
        _, environment = MODULES[name.partition("-")[0]]
        given = {key: os.environ.get(key, value) for key, value in environment.items()}
        shown = "".join(f"{key}={value} " for key, value in given.items())
        here = File(__file__).parent.parent
        error.add_note(
            f"repeat with: cd {here} && {shown}{sys.executable} -m conformance {name} {case.name}"
        )
        raise


def rows(*names: str) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize`: each path with each case that it runs."""
    pairs = [(name, case) for name in names for case in find(name).cases(everything())]
    return {
        "argnames": ("way", "case"),
        "argvalues": pairs,
        "ids": [f"{name}-{case.name}" for name, case in pairs],
    }
