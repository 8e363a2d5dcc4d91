"""Output memory that is used again after its tensor is freed.

The system maps fresh pages and fills them with zeros when a kernel first writes them, on top of the
kernel's own work. So the storages of large outputs stay here when nobody else holds them, and serve
later outputs of the same size.

The storages are torch's own, of exactly the size of a tensor: views, `resize_`, `share_memory_`,
pickling, `torch.save`, DLPack and NumPy work as with any other tensor. A storage that wraps memory
of ours (by DLPack, or `torch.frombuffer`) would be told when it is freed, but could not be resized:
programs free activations early by `tensor.untyped_storage().resize_(0)`.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from batchnorm.torch.private import count_storage_uses

LEAST = 1 << 20  # bytes; smaller outputs fit in a cache, and fresh ones cost little
_IDLE = 1.0  # seconds after which the system may take the pages of an idle storage
_MADV_FREE = 8
_OWN = 2  # references to an object that nobody else has: a block's, and that of `getrefcount`


_SERVED = (
    sys.platform == "linux"
    and count_storage_uses is not None
    and getattr(sys, "_is_gil_enabled", lambda: True)()  # else references are not counted exactly
)


class _Block:
    """A storage that outputs of one size share, one after another.

    Attributes:
        storage: torch's.
        size: its number of bytes.
        seen: when it was last handed out, or found in use.
        lent: False once the system may take its pages.
    """

    __slots__ = ("lent", "seen", "size", "storage")

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.size = storage.nbytes()
        self.seen = time.monotonic()
        self.lent = True

    @property
    def in_use(self) -> bool:
        """True if anybody but this block holds the storage, in C++ or its object in Python."""
        assert count_storage_uses is not None
        return count_storage_uses(self.storage) > 1 or sys.getrefcount(self.storage) > _OWN

    @property
    def intact(self) -> bool:
        """False if somebody has resized or shared the storage, or fixed its size as NumPy does."""
        unchanged = self.storage.nbytes() == self.size and self.storage.resizable()
        return unchanged and not self.storage.is_shared()


class Recycler:
    """The storages of large outputs, idle or in use, of which it holds a bounded number of bytes.

    Args:
        limit: the most that it holds, in bytes; None: the most that was in use at once, and not
            above a quarter of the memory that is available; 0: nothing.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._lock = threading.Lock()
        self._blocks: dict[int, list[_Block]] = {}
        self._peak = 0.0
        self._available = (0.0, 0)  # when it was asked, and the answer

    @property
    def on(self) -> bool:
        """True if outputs are recycled here."""
        return self.limit != 0 and _SERVED

    @property
    def held(self) -> tuple[int, int]:
        """The bytes that are held, and those of them that are in use."""
        with self._lock:
            every = list(self._every())
            return sum(b.size for b in every), sum(b.size for b in every if b.in_use)

    def empty(self, shape: Sequence[int], strides: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A tensor as `torch.empty_strided` makes, in memory without gaps."""
        size = torch.Size(shape).numel() * dtype.itemsize
        found = torch.empty(0, dtype=dtype, device="cpu")
        if type(found) is not Tensor:  # in a mode that makes others
            return torch.empty_strided(shape, strides, dtype=dtype, device="cpu")
        with self._lock:
            block = self._find(size)
            if block is not None:
                return found.set_(block.storage, 0, shape, strides)
        memory = self._allocate(size)
        with self._lock:
            self._keep(memory)
        return found.set_(memory, 0, shape, strides)

    def __str__(self) -> str:
        if not _SERVED:
            return "not recycled on this system"
        if not self.on:
            return "not recycled, as BATCHNORM_MEMORY or limit_memory say"
        held, busy = self.held
        return f"recycled, {held / 2**20:.0f} MiB held, {busy / 2**20:.0f} of them in use"

    def set_limit(self, limit: int | None) -> None:
        """Change the limit; what is idle beyond it is given back."""
        with self._lock:
            self.limit = limit
            if limit == 0:
                self._blocks.clear()  # those in use are freed with their tensors
            elif limit is not None:
                self._evict(limit)

    def release(self) -> int:
        """Give the idle storages back; returns their bytes."""
        with self._lock:
            self._peak = 0.0
            return self._evict(0)

    def rest(self) -> None:
        """Let the system take the pages of what has been idle for a while, if it needs them."""
        if not self._lock.acquire(blocking=False):  # the collector ran inside
            return
        try:
            now = time.monotonic()
            for block in self._every():
                if block.in_use:
                    block.seen, block.lent = now, True
                elif block.lent and now - block.seen > _IDLE:
                    block.lent = False
                    _offer_pages(block.storage)
        finally:
            self._lock.release()

    def forget(self) -> None:
        """Begin anew in a process that was forked: the storages are its parent's."""
        self.__init__(self.limit)  # type: ignore[misc]

    def _every(self) -> Iterator[_Block]:
        for blocks in self._blocks.values():
            yield from blocks

    def _find(self, size: int) -> _Block | None:
        blocks = self._blocks.get(size, [])
        for at in reversed(range(len(blocks))):  # the latest, which a cache may still hold
            block = blocks[at]
            if block.in_use:
                continue
            if not block.intact:
                del blocks[at]
                continue
            block.seen, block.lent = time.monotonic(), True
            return block
        return None

    def _allocate(self, size: int) -> torch.UntypedStorage:
        try:
            return torch.UntypedStorage(size)
        except RuntimeError:
            self.release()
        try:
            return torch.UntypedStorage(size)
        except RuntimeError as error:
            raise MemoryError(
                f"batchnorm: no memory for an output of {size:,} bytes; the statistics are as they "
                "were. Use a smaller batch."
            ) from error

    def _keep(self, memory: torch.UntypedStorage) -> None:
        size = memory.nbytes()
        busy = sum(block.size for block in self._every() if block.in_use)
        self._peak = max(busy + size, 0.99 * self._peak)  # forgets what was long ago
        limit = min(self._peak, self._find_quarter()) if self.limit is None else self.limit
        self._evict(limit - size)
        if busy + size <= limit:
            self._blocks.setdefault(size, []).append(_Block(memory))

    def _evict(self, limit: float) -> int:
        """Drop idle storages, the longest unused first, until no more than `limit` is held."""
        now, held, given = time.monotonic(), 0, 0
        idle = []
        for block in self._every():
            held += block.size
            if block.in_use:
                block.seen = now
            else:
                idle.append(block)
        idle.sort(key=lambda block: block.seen)
        for block in idle:
            if held - given <= limit:
                break
            given += block.size
            self._blocks[block.size].remove(block)
        self._blocks = {size: blocks for size, blocks in self._blocks.items() if blocks}
        return given

    def _find_quarter(self) -> int:
        asked, quarter = self._available
        now = time.monotonic()
        if now - asked > 1.0:
            quarter = _find_available() // 4
            self._available = (now, quarter)
        return quarter


def _find_available() -> int:
    """The memory that is available, in bytes, also within the control group of a container."""
    found = sys.maxsize
    for line in _read("/proc/meminfo").splitlines():
        if line.startswith("MemAvailable:"):
            found = int(line.split()[1]) * 1024
    most = _read("/sys/fs/cgroup/memory.max").strip()
    used = _read("/sys/fs/cgroup/memory.current").strip()
    if most.isdigit() and used.isdigit():
        found = min(found, max(int(most) - int(used), 0))
    return found


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def _offer_pages(memory: torch.UntypedStorage) -> None:
    """Let the system take the whole pages of a storage; it costs nothing if it does not."""
    page, first = os.sysconf("SC_PAGE_SIZE"), memory.data_ptr()
    begin, end = -(-first // page) * page, (first + memory.nbytes()) // page * page
    if begin < end:
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(begin), ctypes.c_size_t(end - begin), ctypes.c_int(_MADV_FREE)
        )


def _parse_limit(text: str | None) -> int | None:
    if text is None or text == "":
        return None
    if not text.isdigit():
        raise ValueError(
            f"BATCHNORM_MEMORY must be a number of bytes, 0 for no recycling of outputs; got "
            f"{text!r}."
        )
    return int(text)


RECYCLER = Recycler(_parse_limit(os.environ.get("BATCHNORM_MEMORY")))


def _after_collection(phase: str, info: dict[str, Any]) -> None:
    if phase == "stop" and info["generation"] == 2:
        RECYCLER.rest()


if RECYCLER.on:
    gc.callbacks.append(_after_collection)
    os.register_at_fork(after_in_child=RECYCLER.forget)
