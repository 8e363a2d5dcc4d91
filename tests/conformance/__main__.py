"""The conformance table from the command line, in the folder tests/.

python -m conformance                          # paths, and what each does not serve
python -m conformance torch                    # the whole table on a path
python -m conformance torch ghost2-half-train  # a case

A path's process has an environment of its own, which is set where it is not: for Keras on
another backend, KERAS_BACKEND=jax.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import paths
from cases import CASES


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
    failed = 0
    for case in (case for case in CASES if not wanted or case.name in wanted):
        reason = way.refuse(case)
        outcome = "passed" if reason is None else f"not served: {reason}"
        if reason is None:
            try:
                paths.check(name, case)
            except Exception as error:
                failed += 1
                outcome = f"FAILED: {type(error).__name__}: {error}"
        print(f"{name} {case.name}: {outcome}", flush=True)
    return int(failed > 0)


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
