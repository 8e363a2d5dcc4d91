"""One front end's checks, in a process of their own: crashes are results, too."""

from __future__ import annotations

import json
import sys
import time
from typing import Any

from batchnorm.verification.comparison import MismatchError, compare, prepare
from batchnorm.verification.messages import LONGEST, MARK
from batchnorm.verification.ways import UncheckedError, find_ways


def main(arguments: list[str]) -> None:
    """Run the checks of `front_end device quick`, and print a message for each step of them."""
    front_end, device, quick = arguments
    try:
        ways = find_ways(front_end, device, quick == "quick")
    except UncheckedError as error:
        _tell(unchecked=str(error)[:LONGEST])
        return
    for number, way in enumerate(ways):
        _tell(way=number, name=way.name, instructions=way.instructions, cases=len(way.cases))
    by_case: dict[str, list[int]] = {}
    cases = {}
    for number, way in enumerate(ways):
        for case in way.cases:
            cases[case.name] = case
            by_case.setdefault(case.name, []).append(number)
    for name, numbers in by_case.items():
        prepared = {u: prepare(cases[name], u) for u in {ways[n].path.unbiased for n in numbers}}
        for number in numbers:
            way, start = ways[number], time.perf_counter()
            _tell(begin=name, way=number)
            found: dict[str, Any] = {}
            try:
                path = way.path._replace(run=way.run)
                found["worst"] = compare(path, cases[name], *prepared[path.unbiased])
            except MismatchError as error:
                found["error"] = str(error)[:LONGEST]
            except Exception as error:  # whatever a kernel or a compiler raises is a finding
                found["error"] = f"{type(error).__name__}: {' '.join(str(error).split())}"[:LONGEST]
            _tell(end=name, way=number, seconds=time.perf_counter() - start, **found)
    _tell(finished=True)


def _tell(**message: Any) -> None:
    sys.stdout.write(f"{MARK}{json.dumps(message)}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
