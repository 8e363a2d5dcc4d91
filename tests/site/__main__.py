"""The built site as its readers meet it: `make docs-check`.

python tests/site              # every page in build/site, and the pages that tools write
python tests/site --links      # links and anchors alone, without a browser
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from browser import find_chromium, open_browser, serve
from links import check_links
from reports import check_reports, write_reports
from walk import check_copies, check_formulas, check_search, page_names, walk

SITE = Path(__file__).parents[2] / "build" / "site"


def main() -> int:
    """Check what the command line asks for; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--links", action="store_true", help="links and anchors alone")
    alone = parser.parse_args().links
    names = page_names(SITE)
    if not names:
        raise SystemExit("docs-check: build/site is empty; run make docs first")
    wrong = check_links(SITE)
    print(f"{len(names)} pages, {len(wrong)} dead links", flush=True)
    if not alone:
        find_chromium()
        with open_browser() as browser:
            wrong += _check_site(browser, names)
            wrong += _check_reports(browser)
    print(*wrong, sep="\n")
    print(f"{len(wrong)} faults")
    return int(bool(wrong))


def _check_site(browser: object, names: list[str]) -> list[str]:
    with serve(SITE) as address:
        wrong = check_search(browser, address) + check_copies(browser, address)
        wrong += check_formulas(browser, address)
        print(f"search, copies and formulas: {len(wrong)} faults", flush=True)
        return wrong + walk(browser, address, names)


def _check_reports(browser: object) -> list[str]:
    with tempfile.TemporaryDirectory() as folder, serve(Path(folder)) as address:
        names = write_reports(Path(folder))
        return walk(browser, address, names) + check_reports(browser, address)


if __name__ == "__main__":
    sys.exit(main())
