"""Sessions for the versions that users have: one for each environment of tests/versions/table.py.

nox --list             # their names
nox -s torch-newest    # one of them; it writes its outcome into tests/versions/results.json
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import nox

ROOT = Path(__file__).parent
sys.path.insert(0, str(ROOT / "tests" / "versions"))
from table import ENVIRONMENTS, Environment  # noqa: E402

nox.needs_version = ">=2025.5.1"
nox.options.reuse_venv = "yes"
nox.options.stop_on_first_error = False
nox.options.default_venv_backend = "venv"

# Packages whose versions follow those that the table pins.
_FRAMEWORKS = {"torch", "triton", "jax", "jaxlib", "flax", "keras", "tensorflow-cpu", "tf2onnx"}
_FRAMEWORKS |= {"numpy", "ml_dtypes", "optax", "tensorstore"}
_PYTHON = "3.11"  # of constraints.txt


def _constrain(environment: Environment, folder: Path) -> Path:
    """constraints.txt without what the environment is about."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    if environment.python != _PYTHON:
        lines = []  # not every version there has a wheel for another Python
    kept = [line for line in lines if re.split(r"[=<>#\s]", line)[0] not in _FRAMEWORKS]
    path = folder / "constraints.txt"
    path.write_text("\n".join(kept) + "\n")
    return path


def _make(environment: Environment) -> Callable[[nox.Session], None]:
    def examine(session: nox.Session) -> None:
        constraints = _constrain(environment, Path(session.create_tmp()))
        tools = ["-r", str(ROOT / "tests" / "versions" / "requirements.txt")]
        session.install("-c", str(constraints), *tools, *environment.requirements)
        session.install("--no-deps", "--editable", ".")
        session.run("python", "tests/versions", environment.name, *session.posargs)

    examine.__doc__ = f"{', '.join(environment.requirements)} on Python {environment.python}."
    return examine


for _environment in ENVIRONMENTS:
    nox.session(name=_environment.name, python=_environment.python)(_make(_environment))
