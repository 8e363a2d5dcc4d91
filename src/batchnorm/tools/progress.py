"""A progress bar, where somebody can see it."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any


def track(items: Iterable[Any], text: str, wanted: bool) -> Iterable[Any]:
    """`items`, with a bar on the terminal's error stream if that is one and rich is installed."""
    if not wanted:
        return items
    try:
        from rich.console import Console
        from rich.progress import track as show
    except ImportError:
        return items
    console = Console(stderr=True)
    if not (console.is_terminal or console.is_jupyter):
        return items
    total = len(items) if isinstance(items, Sized) else None
    return show(items, text, total=total, console=console, transient=True)
