"""The conformance table from the command line, in the folder tests/.

python -m conformance                          # paths, and the cases that each refuses
python -m conformance torch                    # the whole table on a path
python -m conformance torch ghost2-half-train  # a case
python -m conformance torch random 2000 17     # 2000 random ones, from number 17 on

A path's process needs certain environment variables. They are set unless you set them: for Keras
on another backend, KERAS_BACKEND=jax.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import paths
from cases import CASES, Case
from random_cases import names, random_case


def main(arguments: list[str]) -> int:
    """Run what the arguments name; 1 if a case fails."""
    if not arguments:
        return _describe()
    name, *wanted = arguments
    prefix = name.partition("-")[0]
    if prefix not in paths.MODULES:
        print(f"conformance: no path {name!r}; paths begin with {', '.join(paths.MODULES)}.")
        return 2
    for key, value in paths.MODULES[prefix][1].items():
        os.environ.setdefault(key, value)
    way = paths.find(name)
    if wanted[:1] == ["random"]:
        count, first = int(wanted[1]), int((*wanted, 0)[2])
        outcomes = Counter(_run(way, name, case, False) for case in _named(names(count, first)))
        print(f"{name}, {count} random cases from number {first} on: {dict(outcomes)}")
    else:
        outcomes = Counter(_run(way, name, case, True) for case in _named(wanted) if case)
    return int(outcomes["FAILED"] > 0)


def _named(wanted: list[str]) -> list[Case]:
    """The cases of these names; the table without names."""
    drawn = [case for case in map(random_case, wanted) if case is not None]
    return drawn + [case for case in CASES if not wanted or case.name in wanted]


def _run(way: paths.Way, name: str, case: Case, tell: bool) -> str:
    """The outcome of a case in one word; printed if the case failed, or if `tell`."""
    reason, outcome = way.refuse(case), "passed"
    if reason is not None:
        outcome = f"not served: {reason}"
    else:
        try:
            paths.check(name, case)
        except Exception as error:
            notes = "\n  ".join(getattr(error, "__notes__", ()))
            outcome = f"FAILED: {type(error).__name__}: {error}\n  {case}\n  {notes}"
    word = outcome.partition(":")[0]
    if tell or word == "FAILED":
        print(f"{name} {case.name}: {outcome}", flush=True)
    return word


def _describe() -> int:
    for prefix, (module, environment) in paths.MODULES.items():
        os.environ.update(environment)
        try:
            ways = __import__(module).WAYS
        except ImportError as error:
            print(f"{prefix}: {error}")
            continue
        for name, way in ways.items():
            reasons = Counter(way.refuse(case) for case in CASES)
            print(f"{name}: {len(way.chosen())} of {len(way.cases())} cases in `make test`")
            for reason, count in reasons.items():
                if reason is not None:
                    print(f"    {count} not served: {reason}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
