"""Run the zoo: every model under every check, into results.json.

python tests/zoo                  # all of it
python tests/zoo Parakeet GIN     # some models: their rows alone are replaced
"""

from __future__ import annotations

import json
import platform
import sys
import time
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from checks import CHECKS, Pair
from limits import broken
from models import MODELS
from torchvision_operators import declare

RESULTS = Path(__file__).parent / "results.json"


def examine(name: str) -> dict[str, Any]:
    """All checks of one model: a value each, or why there is none."""
    entry = MODELS[name]
    row: dict[str, Any] = {"model": name, "package": entry.package}
    try:
        pair = Pair(entry)
    except Exception as error:  # a package that is missing is a result here
        return row | {"missing": _say(error)}
    row |= {"warnings": pair.said, "leaks": entry.leaks, "scale": pair.scale()}
    for check, run in CHECKS.items():
        try:
            row[check] = run(pair)
        except Exception as error:
            row[check] = f"fails: {_say(error)}"
    return row


def _say(error: Exception) -> str:
    """The first line of an error, with its class."""
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200]


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("torch", *dict.fromkeys(entry.package for entry in MODELS.values())):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> int:
    """Examine the models that the command line names, or all."""
    declare()
    torch.set_num_threads(1)  # the same sums on every machine
    warnings.simplefilter("ignore")  # of packages; those of conversion are recorded
    chosen = sys.argv[1:] or list(MODELS)
    old = json.loads(RESULTS.read_text())["rows"] if sys.argv[1:] and RESULTS.exists() else []
    rows = {row["model"]: row for row in old}
    for name in chosen:
        start = time.perf_counter()
        rows[name] = examine(name)
        print(f"{name} ({time.perf_counter() - start:.0f} s)", flush=True)
        for key, value in rows[name].items():
            print(f"    {key}: {value}", flush=True)
        ordered = [rows[model] for model in MODELS if model in rows]
        document = {"command": "make test-zoo", "versions": _versions(), "rows": ordered}
        RESULTS.write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    wrong = {name: broken(rows[name]) for name in chosen if broken(rows[name])}
    for name, checks in wrong.items():
        print(f"{name} is outside the limits of tests/zoo/limits.py: {', '.join(checks)}")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
