"""Are the cover and the table of the conformance cases equally sharp? Faults made on purpose.

`make mutants`, or: python tests/mutation core native --workers 2 --results mutants.json

Each mutant is one edit of a formula: of the Python core, or of the kernels' copy of what happens
once per channel. The cases of the cover run against it first, then the rest of the table. A
mutant that only the rest finds is a hole in the cover, and makes the exit status 1; one that
nothing finds is listed, since it is either no fault or a case that is missing.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
from collections import Counter
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent.parent / "conformance")]

import core_mutants  # noqa: E402
import native_mutants  # noqa: E402
from running import Mutant, Verdict  # noqa: E402

KINDS = {"core": core_mutants, "native": native_mutants}


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(prog="mutation", description=__doc__.partition("\n")[0])
    parser.add_argument("kinds", nargs="*", choices=[*KINDS, []], default=[*KINDS])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="", help="mutants whose name contains this")
    parser.add_argument("--results", type=Path, help="a JSON file to write")
    arguments = parser.parse_args()
    found: dict[str, dict[str, object]] = {}
    for kind in arguments.kinds or KINDS:
        mutants = [m for m in KINDS[kind].mutants() if arguments.only in m.name]
        found[kind] = _summarize(kind, _judge(kind, mutants, arguments.workers))
    if arguments.results:
        arguments.results.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")
    return int(any(group["found by the rest of the table only"] for group in found.values()))


def _judge(kind: str, mutants: list[Mutant], workers: int) -> dict[str, Verdict]:
    check = KINDS[kind].prepare(workers)
    context = multiprocessing.get_context("fork")
    verdicts = {}
    with context.Pool(workers) as pool:
        for i, (name, verdict) in enumerate(pool.imap_unordered(check, mutants), start=1):
            verdicts[name] = verdict
            print(f"{kind} {i}/{len(mutants)} {verdict.by:<8} {name} {verdict.detail}", flush=True)
    return verdicts


def _summarize(kind: str, verdicts: dict[str, Verdict]) -> dict[str, object]:
    count = Counter(verdict.by for verdict in verdicts.values())
    holes = sorted(name for name, verdict in verdicts.items() if verdict.by == "table")
    alive = sorted(name for name, verdict in verdicts.items() if verdict.by == "nothing")
    faults, by_cover = len(verdicts), count["cover"]
    print(f"{kind}: {faults} mutants, {by_cover} found by the cover, {len(holes)} by the rest only")
    print(*(f"  lives: {name}" for name in alive), sep="\n")
    return {
        "mutants": faults,
        "found by the cover": by_cover,
        "found by other tests of the core": count["tests"],
        "found by the rest of the table only": holes,
        "found by nothing": alive,
    }


if __name__ == "__main__":
    sys.exit(main())
