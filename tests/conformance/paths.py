"""The paths through the code that the table runs on, by name, and the cases that each refuses.

A path's module has a dictionary WAYS of its own and imports its framework. So that a process
imports one framework, `find` imports only the module of the requested path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path as File
from typing import Any, NamedTuple

import pytest

from batchnorm.verification import comparison
from batchnorm.verification.comparison import Path
from cases import CASES, Case
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


def is_never_slow(case: Case) -> bool:
    """False of any case."""
    return False


class Way(NamedTuple):
    """A path, and the column that it has in the table.

    `refuse` gives the reason why the path does not serve a case, or None. `costly` paths trace,
    compile or interpret each case: `make test` runs a cover of the table on them, `make test-all`
    the rest. `sister`: a path whose code this one shares but for one part, and which runs the
    cover; `make test` runs a sixth of the cover here. `sample`: names of the only cases that a
    path runs, where a case takes many seconds; `make test` runs a sixth of them. `slow` is true of
    cases that the cover does without. `stand_in`: the path runs the cover alone, for a sister that
    runs all in `make test-all` and does more.
    """

    path: Path
    refuse: Callable[[Case], str | None] = serve_all
    costly: bool = False
    sample: tuple[str, ...] = ()
    slow: Callable[[Case], bool] = is_never_slow
    sister: str = ""
    stand_in: bool = False

    def cases(self) -> list[Case]:
        """The cases that this path runs."""
        served = [case for case in CASES if self.refuse(case) is None]
        if self.stand_in:
            return cover(served)
        return [c for c in served if c.name in self.sample] if self.sample else served

    def chosen(self) -> list[Case]:
        """The cases of this path that `make test` runs."""
        cases = self.cases()
        if self.sample:
            return [case for case in cases if case.name in self.sample[::6]]
        if not self.costly or self.stand_in:
            return cases
        return cover([c for c in cases if not self.slow(c)])[:: 6 if self.sister else 1]


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
        command = f"cd {here} && {shown}{sys.executable} -m conformance {name} {case.name}"
        # `add_note` of Python 3.11
        error.__notes__ = [*getattr(error, "__notes__", ()), f"repeat with: {command}"]
        raise


def rows(*names: str) -> dict[str, Any]:
    """Arguments of `pytest.mark.parametrize`: each path with each case that it runs."""
    found = []
    for name in names:
        chosen = {case.name for case in find(name).chosen()}
        for case in find(name).cases():
            marks = () if case.name in chosen else (pytest.mark.exhaustive,)
            found.append(pytest.param(name, case, id=f"{name}-{case.name}", marks=marks))
    return {"argnames": ("way", "case"), "argvalues": found}
