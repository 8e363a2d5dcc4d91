"""A headless Chromium, and a server for the pages that it walks."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

__all__ = ["find_chromium", "open_browser", "serve", "watch"]

_LONGEST = 120_000  # milliseconds, on a machine that is busy
_NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
_MISSING = (
    "docs-check: no Chromium was found; install one (Debian, Ubuntu: apt-get install chromium), "
    "or set CHROMIUM to the path of its program"
)


def find_chromium() -> str:
    """The path of Chromium; exits with the remedy where there is none."""
    given = os.environ.get("CHROMIUM")
    found = given or next(filter(None, map(shutil.which, _NAMES)), None)
    if found is None or not Path(found).exists():
        raise SystemExit(_MISSING)
    return found


@contextmanager
def open_browser() -> Iterator[Any]:
    """Yield a browser of playwright's."""
    from playwright.sync_api import sync_playwright

    # Chromium refuses its sandbox to root, as whom containers run.
    options = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=find_chromium(), args=options, timeout=_LONGEST
        )
        try:
            yield browser
        finally:
            browser.close()


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        pass


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Yield the address at which a folder is served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=folder)) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def watch(page: Any, address: str) -> list[str]:
    """A list that gets a line for each error of a page's scripts, and for what fails to load."""
    seen: list[str] = []
    page.on("console", lambda m: seen.append(f"{m.type}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda error: seen.append(f"script: {error}"))
    page.on("requestfailed", lambda request: seen.append(f"not loaded: {request.url}"))

    def note(request: Any) -> None:
        if not request.url.startswith((address, "data:", "blob:")):
            seen.append(f"asks another host: {request.url}")

    page.on("request", note)
    return seen
