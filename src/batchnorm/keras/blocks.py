"""The number of `with` blocks of a kind that are open."""

from __future__ import annotations

import threading


class OpenBlocks:
    """The blocks in all threads; a compiler guards on the attribute `in_use`."""

    def __init__(self) -> None:
        self.in_use = False
        self._open = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        """Count blocks that open, or that end."""
        with self._lock:
            self._open += change
            self.in_use = self._open > 0
