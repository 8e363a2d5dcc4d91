"""A progress bar on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Sized
from typing import Any


def track(items: Iterable[Any], label: str | None) -> Iterable[Any]:
    """The items, with a progress bar on standard error if that is a terminal and rich is installed.

    Args:
        items: any.
        label: text beside the bar; None for no bar.
    """
    if label is None:
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
    return show(items, label, total=total, console=console, transient=True)
