"""Run the tests of one environment, in it, and write the outcome into results.json.

python tests/versions torch-newest                                 # `make test-versions` calls this
python tests/versions torch-newest torch -k export --results a.json    # other arguments for run.py
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import sys
import time
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
    start, counts, failed = time.perf_counter(), Counter[str](), []
    for name in [a for a in arguments if a in parts.PARTS]:
        options = [a for a in arguments if a not in parts.PARTS]
        outcome = parts.run(name, "some", True, options)
        print(f"\n=== {outcome.line}\n{outcome.output}", flush=True)
        last = outcome.output.rstrip().rpartition("\n")[2]
        counts.update({what: int(number) for number, what in _COUNT.findall(last)})
        failed += [] if outcome.status == 0 else [name]
    return {
        "name": environment.name,
        "front_end": environment.front_end,
        "role": environment.role,
        "versions": find_versions(),
        "passed": counts["passed"],
        "failed": counts["failed"] + counts["error"],
        "skipped": counts["skipped"],
        "failed_parts": failed,
        "seconds": round(time.perf_counter() - start),
        "date": datetime.date.today().isoformat(),
    }


def write_row(row: dict[str, Any], results: Path) -> None:
    """Put a row in its place: the table's order."""
    rows = json.loads(results.read_text())["rows"] if results.exists() else []
    by_name = {old["name"]: old for old in rows} | {row["name"]: row}
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
    row = examine(environment, arguments or list(environment.tests))
    print(json.dumps(row, indent=1))
    write_row(row, known.results)
    return int(bool(row["failed_parts"]))


if __name__ == "__main__":
    sys.exit(main())
