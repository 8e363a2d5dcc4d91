"""Formulas of pages: TeX in Markdown, as GitHub reads it, and MathML in the site.

Browsers set MathML by themselves, so that a page loads neither a script nor a font for it.
"""

from __future__ import annotations

import re
from typing import Any

from latex2mathml.converter import convert

_BLOCK = re.compile(r"^```math\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"\$`([^`\n]+)`\$")
_PLACE = re.compile(r"(<p>)?formula-(\d+)-of-this-page(?(1)</p>)")
_found: dict[str, list[str]] = {}  # by page


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Put a word in the place of each formula, which Markdown leaves alone."""
    formulas = _found[page.file.src_uri] = []

    def keep(match: re.Match[str], display: str) -> str:
        formulas.append(convert(match[1].strip(), display=display))
        return f"formula-{len(formulas) - 1}-of-this-page"

    markdown = _BLOCK.sub(lambda match: keep(match, "block"), markdown)
    return _INLINE.sub(lambda match: keep(match, "inline"), markdown)


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Put the formulas into their places."""
    formulas = _found.pop(page.file.src_uri)

    def place(match: re.Match[str]) -> str:
        formula = formulas[int(match[2])]
        return f'<div class="formula">{formula}</div>' if match[1] else formula

    return _PLACE.sub(place, html)
