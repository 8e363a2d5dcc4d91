"""The table of docs/versions.md, made from results.json.

python tests/versions/page.py            # writes it
python tests/versions/page.py --check    # fails where the page is not what the results give
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results.json"
PAGE = Path(__file__).parents[2] / "docs" / "versions.md"
_BLOCK = re.compile(r"(<!-- make test-versions writes this -->\n).*?(<!-- up to here -->)", re.S)
_HEADINGS = ("environment", "versions", "passed", "failed", "skipped", "date")


def make_table(results: dict[str, Any]) -> str:
    """The results as a table, a row for each environment."""
    lines = ["| " + " | ".join(_HEADINGS) + " |", "|---" * len(_HEADINGS) + "|"]
    for row in results["rows"]:
        versions = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
        parts = row["parts"].values()
        counts = [str(sum(part[key] for part in parts)) for key in ("passed", "failed", "skipped")]
        dates = sorted({part["date"] for part in parts})
        days = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
        cells = [row["name"], versions, *counts, days]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def make_page(text: str) -> str:
    """The page with the table of the results between its comments.

    Raises:
        ValueError: the page does not have the comments once.
    """
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError(f"{PAGE.name} must have the two comments once, around its table.")
    table = make_table(json.loads(RESULTS.read_text()))
    return _BLOCK.sub(lambda found: f"{found[1]}\n{table}\n\n{found[2]}", text)


def main() -> None:
    """Write the page, or compare it."""
    text = PAGE.read_text()
    made = make_page(text)
    if sys.argv[1:] != ["--check"]:
        PAGE.write_text(made)
    elif made != text:
        sys.exit("docs/versions.md is not of these results; run: python tests/versions/page.py")


if __name__ == "__main__":
    main()
