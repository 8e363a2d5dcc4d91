"""Every page in a browser, wide and narrow, light and dark; the search, copies and formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from browser import watch

__all__ = ["check_copies", "check_formulas", "check_search", "walk"]

SIZES = {"wide": (1280, 900), "narrow": (390, 844)}
SCHEMES = {"light": "default", "dark": "slate"}
# What a newcomer types, and the page on top of what the search finds.
WORDS = {
    "mask": "padding.html",
    "speech": "padding.html",
    "stride": "padding.html",
    "lengths": "padding.html",
    "license": "index.html",
}
_SEARCHED = "/\\d+|No/.test(document.querySelector('.md-search-result__meta')?.innerText)"
_FIRST = """() => {
    const first = document.querySelector('.md-search-result__item a');
    return first && new URL(first.href).pathname.slice(1);
}"""
_TOO_WIDE = """() => {
    const most = document.documentElement.clientWidth;
    if (document.documentElement.scrollWidth <= most) return null;
    const wide = [...document.body.querySelectorAll('*')]
        .filter(e => e.getBoundingClientRect().right > most + 1 && e.getClientRects().length);
    return `${document.documentElement.scrollWidth} wide: <${wide.at(-1)?.tagName}> `
        + `${wide.at(-1)?.className}`;
}"""


def walk(browser: Any, address: str, names: list[str]) -> list[str]:
    """Faults of pages, one line each.

    Args:
        browser: of playwright.
        address: of the server.
        names: paths of the pages below it.
    """
    wrong = []
    for size, (width, height) in SIZES.items():
        for scheme, expected in SCHEMES.items():
            context = browser.new_context(
                viewport={"width": width, "height": height}, color_scheme=scheme
            )
            for name in names:
                page = context.new_page()
                seen = watch(page, address)
                page.goto(f"{address}/{name}", wait_until="load")
                faults = list(dict.fromkeys(seen))
                fault = page.evaluate(_TOO_WIDE) if size == "narrow" else None
                faults += [] if fault is None else [fault]
                shown = page.evaluate("document.body.getAttribute('data-md-color-scheme')")
                if shown not in (expected, None):
                    faults.append(f"is {shown} for readers who want {scheme}")
                wrong += [f"{name} ({size}, {scheme}): {fault}" for fault in faults]
                page.close()
            context.close()
    return wrong


def check_search(browser: Any, address: str) -> list[str]:
    """Words whose first result is not the page that explains them."""
    wrong = []
    for word, expected in WORDS.items():
        page = browser.new_page()
        page.goto(f"{address}/scope.html?q={word}")
        page.wait_for_function(_SEARCHED, timeout=60_000)
        found = page.evaluate(_FIRST) or "nothing"
        if found != expected:
            wrong.append(f"search for {word!r}: {found} comes first, not {expected}")
        page.close()
    return wrong


def check_copies(browser: Any, address: str) -> list[str]:
    """Consoles whose copies are more than the commands."""
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    page = context.new_page()
    wrong = []
    for name in ("command-line.html", "index.html"):
        page.goto(f"{address}/{name}")
        page.evaluate("navigator.clipboard.writeText('')")
        page.locator(".language-console .md-code__button[data-md-type=copy]").first.click()
        copied = page.wait_for_function("navigator.clipboard.readText()").json_value()
        if not copied or any(line.startswith("$") for line in copied.splitlines()):
            wrong.append(f"{name}: a copied console begins with {copied[:40]!r}")
    context.close()
    return wrong


def check_formulas(browser: Any, address: str) -> list[str]:
    """Pages whose formulas are not set as mathematics."""
    wrong = []
    page = browser.new_page()
    for name, least in (("spec.html", 4), ("small-batches.html", 4)):
        page.goto(f"{address}/{name}")
        heights = page.evaluate(
            "[...document.querySelectorAll('math')].map(m => m.getBoundingClientRect().height)"
        )
        if len(heights) < least or min(heights) < 8 or page.get_by_text("-of-this-page").count():
            wrong.append(f"{name}: {len(heights)} formulas, of which {heights} points high")
    page.close()
    return wrong


def page_names(site: Path) -> list[str]:
    """The pages of a site, as paths."""
    found = (path.relative_to(site).as_posix() for path in sorted(site.rglob("*.html")))
    return [name for name in found if name != "404.html"]
