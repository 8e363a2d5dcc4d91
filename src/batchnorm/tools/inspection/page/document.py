"""The frame of a page: its head, its style and its foot."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from batchnorm.environment import __version__
from batchnorm.tools.inspection.page.markup import Markup, element

__all__ = ["make_document", "make_header"]

_POLICY = "default-src 'none'; style-src 'unsafe-inline'"  # a layer's name can load nothing


def make_header(
    overline: str, title: str, verdict: tuple[str, str], facts: Iterable[tuple[str, str]]
) -> Markup:
    """The head of a page: its title, a verdict (a level and a sentence), and figures by name."""
    level, sentence = verdict
    figures = (
        element("div", None, element("dt", None, name), element("dd", None, value))
        for name, value in facts
    )
    return element(
        "header",
        None,
        element("p", {"class": "overline"}, overline),
        element("h1", None, title),
        element("p", {"class": f"verdict {level}"}, sentence),
        element("dl", {"class": "facts"}, *figures),
    )


def make_document(title: str, body: Sequence[Markup], foot: str) -> str:
    """An HTML document.

    Args:
        title: of the window.
        body: elements of the page, one below the other.
        foot: a sentence for the last line.
    """
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    head = element(
        "head",
        None,
        element("meta", {"charset": "utf-8"}),
        element("meta", {"http-equiv": "Content-Security-Policy", "content": _POLICY}),
        element("meta", {"name": "viewport", "content": "width=device-width, initial-scale=1"}),
        element("meta", {"name": "color-scheme", "content": "light dark"}),
        element("title", None, title),
        element("style", None, Markup(style)),
    )
    footer = element("footer", None, f"Written by batchnorm {__version__}. {foot}")
    main = element("main", None, *body, footer)
    page = element("html", {"lang": "en"}, head, element("body", None, main))
    return f"<!doctype html>\n{page}\n"
