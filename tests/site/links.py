"""The links of built pages: every file and every anchor that one leads to is there."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

__all__ = ["check_links"]

_LOADING = {"script", "img", "iframe", "source", "video", "audio", "embed", "object"}


class _Page(HTMLParser):
    """The anchors of a page, and the addresses on it; of each, whether the browser loads it."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.anchors = {"", "top", "__top"}
        self.links: list[tuple[str, bool]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        style = tag == "link" and "stylesheet" in given.get("rel", "")
        for name in ("href", "src", "data"):
            if name in given:
                self.links.append((given[name], style or tag in _LOADING))


def check_links(site: Path) -> list[str]:
    """Faults of the links of a site, one line each.

    Args:
        site: the folder of its pages. 404.html is left out: it is served at any address.
    """
    names = [path for path in sorted(site.rglob("*.html")) if path.name != "404.html"]
    pages = {path: _Page(path.read_text(encoding="utf-8")) for path in names}
    wrong = []
    for path, page in pages.items():
        at = path.relative_to(site).as_posix()
        for link, loaded in dict.fromkeys(page.links):
            fault = _check(path, link, loaded, pages)
            if fault:
                wrong.append(f"{at}: {link}: {fault}")
    return wrong


def _check(path: Path, link: str, loaded: bool, pages: dict[Path, _Page]) -> str | None:
    parts = urlsplit(link)
    if parts.scheme in ("http", "https") or parts.netloc:
        return "is loaded from another host" if loaded else None
    if parts.scheme or link.startswith("javascript:"):
        return None
    if parts.path.startswith("/"):
        return "is absolute: the site may be served from any folder"
    target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
    if target.is_dir():
        target /= "index.html"
    if not target.exists():
        return "leads to no file"
    if target in pages and unquote(parts.fragment) not in pages[target].anchors:
        return "leads to no anchor of that page"
    return None
