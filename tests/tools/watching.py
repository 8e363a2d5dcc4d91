"""Detection of opened files by the system's kernel (Linux, inotify)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterable
from pathlib import Path

_IN_OPEN = 0x20
_EVENT = struct.Struct("iIII")


class Watch:
    """Watches files, and folders with the files in them.

    Args:
        paths: files and folders that must not be opened; missing ones are left out.
    """

    def __init__(self, paths: Iterable[Path]) -> None:
        self._library = ctypes.CDLL(None, use_errno=True)
        self._descriptor = self._library.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        assert self._descriptor >= 0, os.strerror(ctypes.get_errno())
        self._paths: dict[int, Path] = {}
        for top in paths:
            for path in (top, *(p for p in top.rglob("*") if p.is_dir())):
                if path.exists():
                    self._add(path)

    def _add(self, path: Path) -> None:
        number = self._library.inotify_add_watch(self._descriptor, bytes(path), _IN_OPEN)
        assert number >= 0, os.strerror(ctypes.get_errno())
        self._paths[number] = path

    def opened(self) -> set[Path]:
        """The files that were opened since the last call."""
        try:
            data = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return set()
        found, at = set(), 0
        while at < len(data):
            number, _, _, length = _EVENT.unpack_from(data, at)
            name = data[at + _EVENT.size :][:length].rstrip(b"\0").decode()
            found.add(self._paths[number] / name if name else self._paths[number])
            at += _EVENT.size + length
        return found

    def close(self) -> None:
        """End watching."""
        os.close(self._descriptor)
