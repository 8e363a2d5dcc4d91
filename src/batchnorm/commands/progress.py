"""Signs of life of commands that take long, on standard error."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from batchnorm.commands.streams import write_error

__all__ = ["counting", "tell"]


def tell(text: str) -> None:
    """Write a line at once, so that a log shows how far the work is."""
    write_error(f"{text}\n")


@contextmanager
def counting(what: str, total: int) -> Iterator[Callable[[], None]]:
    """Yield a function to call after each piece of work.

    Args:
        what: the work, like "training".
        total: number of pieces.
    """
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import Progress

        with Progress(console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task(what, total=total)
            yield lambda: bar.advance(task)
        return
    done = 0

    def count() -> None:
        nonlocal done
        done += 1
        tell(f"{what}: {done} of {total}")

    yield count
