"""Run the tests of one environment, in it, and write the outcome into results.json.

python tests/versions torch-newest                                 # `make test-versions` calls this
python tests/versions torch-newest ranks                           # one part of them anew
python tests/versions torch-newest torch -k export --results a.json    # with options of pytest

A row has the counts of each part. Parts that run anew replace theirs as long as the versions are
the same; otherwise the row begins anew.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from table import ENVIRONMENTS, Environment

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import run as parts  # noqa: E402

_PACKAGES = (
    *("torch", "triton", "jax", "jaxlib", "flax", "keras", "tensorflow", "tensorflow-cpu", "numpy"),
)
_COUNT = re.compile(r"(\d+) (passed|failed|skipped|error)s?\b")


def find_versions() -> dict[str, str]:
    """Versions of the packages that matter, of those that are installed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def examine(environment: Environment, arguments: list[str]) -> dict[str, Any]:
    """Run the tests; the row for the results."""
    if not environment.warnings_are_errors:
        arguments = [*arguments, "-W", "default"]
    found = {}
    for name in [a for a in arguments if a in parts.PARTS]:
        options = [a for a in arguments if a not in parts.PARTS]
        outcome = parts.run(name, "some", True, options)
        print(f"\n=== {outcome.line}\n{outcome.output}", flush=True)
        last = outcome.output.rstrip().rpartition("\n")[2]
        counts = Counter({what: int(number) for number, what in _COUNT.findall(last)})
        found[name] = {
            "passed": counts["passed"],
            # A process that ends before its tests do has no last line.
            "failed": counts["failed"] + counts["error"] or int(outcome.status != 0),
            "skipped": counts["skipped"],
            "seconds": round(outcome.seconds),
            "date": datetime.date.today().isoformat(),
        }
    return {
        "name": environment.name,
        "front_end": environment.front_end,
        "role": environment.role,
        "versions": find_versions(),
        "parts": found,
    }


def write_row(row: dict[str, Any], results: Path) -> None:
    """Put a row in its place: the table's order."""
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    by_name = {old["name"]: old for old in rows}
    old = by_name.get(row["name"], {})
    if old.get("versions") == row["versions"]:
        row = row | {"parts": old["parts"] | row["parts"]}
    by_name[row["name"]] = row
    ordered = [by_name[e.name] for e in ENVIRONMENTS if e.name in by_name]
    document = {"command": "make test-versions", "rows": ordered}
    results.write_text(json.dumps(document, indent=1) + "\n")


def main() -> int:
    """Run what the command line asks for; 1 if a test failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    names = {environment.name: environment for environment in ENVIRONMENTS}
    parser.add_argument("environment", choices=names, metavar="NAME", help=", ".join(names))
    parser.add_argument("--results", type=Path, default=HERE / "results.json")
    known, arguments = parser.parse_known_args()
    environment = names[known.environment]
    options = [a for a in environment.tests if a not in parts.PARTS]
    row = examine(environment, arguments + options if arguments else list(environment.tests))
    print(json.dumps(row, indent=1))
    write_row(row, known.results)
    return int(any(part["failed"] for part in row["parts"].values()))


if __name__ == "__main__":
    sys.exit(main())
