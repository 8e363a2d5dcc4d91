"""Memory that threads share, and the detection of races in it.

Accesses are ordered by `bar.sync` within a CTA, by `bar.warp.sync` within a warp, by nothing
between CTAs of a launch. Two accesses of different threads to the same bytes, at least one of them
a write, and without such an order, are a race. It is found from the accesses since each barrier,
whatever the order of execution was. Source: PTX ISA 8.7, "Memory Consistency Model".
"""

from __future__ import annotations

import numpy as np

WARP = 32
_MANY = -2


class ProgramError(Exception):
    """A fault of a program; the message begins with its kind."""


class Clock:
    """The times at which each CTA and each warp last met at a barrier."""

    def __init__(self, threads: int, each: int) -> None:
        self.cta = np.arange(threads, dtype=np.int32) // each
        self.warp = np.arange(threads, dtype=np.int32) // WARP
        self.now = 1
        self._of_cta = np.zeros(threads // each, np.int64)
        self._of_warp = np.zeros(threads // WARP, np.int64)

    def meet(self, threads: np.ndarray, *, whole_cta: bool) -> None:
        """All threads of some CTAs, or of some warps, have met."""
        self.now += 1
        if whole_cta:
            self._of_cta[self.cta[threads]] = self.now
        else:
            self._of_warp[self.warp[threads]] = self.now

    def before_cta(self, time: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """True if this was before the last barrier of the thread's whole CTA."""
        return time < self._of_cta[self.cta[thread]]

    def before_warp(self, time: np.ndarray, thread: np.ndarray) -> np.ndarray:
        """True if this was before the last barrier of the thread's own warp."""
        return time < self._of_warp[self.warp[thread]]


class _Touches:
    """The threads that have read, or written, each unit of a memory, as far as races need it."""

    def __init__(self, units: int, clock: Clock) -> None:
        self._clock = clock
        self.thread = np.full(units, -1, np.int32)  # one of them
        self._time = np.zeros(units, np.int64)
        self._kind = np.zeros(units, np.int8)  # 1: several of a warp, 2: of several warps
        self._cta = np.full(units, -1, np.int32)  # ever in this launch, or _MANY

    def unordered(self, units: np.ndarray, who: np.ndarray) -> np.ndarray:
        """Units that another thread than `who` has touched without a barrier in between."""
        clock, kind = self._clock, self._kind[units]
        thread, time, cta = self.thread[units], self._time[units], self._cta[units]
        same = clock.warp[thread] == clock.warp[who]
        ordered = clock.before_cta(time, who) | (same & (kind < 2) & clock.before_warp(time, who))
        alone = (kind == 0) & (thread == who)
        foreign = (cta == _MANY) | ((cta >= 0) & (cta != clock.cta[who]))
        return foreign | ((thread >= 0) & ~ordered & ~alone)

    def add(self, units: np.ndarray, who: np.ndarray) -> None:
        """Threads that touch units now, each unit any number of times."""
        clock, before = self._clock, self.thread[units]
        time, kind = self._time[units], self._kind[units]
        live = (before >= 0) & ~clock.before_cta(time, who)
        same = clock.warp[before] == clock.warp[who]
        # Within a warp, what was before its last meeting no longer counts.
        past = same & (kind < 2) & clock.before_warp(time, who)
        kind = np.where(live & ~past, np.maximum(kind, before != who), 0)
        kind = np.where(live & ~same, 2, kind)
        self.thread[units] = who
        one = self.thread[units]
        kind = np.maximum(kind, one != who)
        kind = np.where(clock.warp[one] != clock.warp[who], 2, kind)
        self._kind[units] = 0
        for value in (1, 2):  # in this order, so that the largest of several stays
            self._kind[units[kind == value]] = value
        self._time[units] = clock.now
        there, cta = self._cta[units], clock.cta[who]
        self._cta[units] = cta
        several = (self._cta[units] != cta) | ((there != -1) & (there != cta))
        self._cta[units[several]] = _MANY


class Memory:
    """Bytes, and the threads that touched them last.

    Args:
        data: the bytes.
        unit: the size of the smallest possible access; accesses are tracked by such units.
        clock: of the launch.
        exists: which units may be touched (all).
        defined: which may be read (all); written ones are added.
        alike: True if several warps may write the same value. Triton has all warps of a program
            store numbers that all of them hold in shared memory.
        name: for messages.
    """

    def __init__(
        self,
        data: np.ndarray,
        unit: int,
        clock: Clock,
        *,
        exists: np.ndarray | None = None,
        defined: np.ndarray | None = None,
        alike: bool = False,
        name: str,
    ) -> None:
        units = data.size // unit
        self._bytes, self._unit, self._clock, self._alike = data, unit, clock, alike
        self.name, self.size = name, data.size
        self._exists = np.ones(units, bool) if exists is None else exists
        self._defined = np.ones(units, bool) if defined is None else defined
        self._writes, self._reads = _Touches(units, clock), _Touches(units, clock)

    def load(
        self, at: np.ndarray, size: int, count: int, threads: np.ndarray, used: int = -1
    ) -> list[np.ndarray]:
        """`count` values of `size` bytes for each thread, from these offsets.

        `used`: a bit for each byte that matters.
        """
        units, who = self._find(at, size * count, threads, used)
        if not self._defined[units].all():
            raise ProgramError(f"undefined: read of {self.name} before it was written")
        self._refuse(self._writes, self._writes.unordered(units, who), units, who)
        self._reads.add(units, who)
        view = self._view(size)
        return [view[at // size + i] for i in range(count)]

    def store(self, at: np.ndarray, values: list[np.ndarray], threads: np.ndarray) -> None:
        """Write each thread's values, one behind the other, to its offset."""
        size = values[0].dtype.itemsize
        units, who = self._find(at, size * len(values), threads)
        view, places = self._view(size), [at // size + i for i in range(len(values))]
        clash = self._writes.unordered(units, who)
        if self._alike:
            same = [view[place] == value for place, value in zip(places, values, strict=True)]
            clash &= ~np.stack(same, axis=1).repeat(size // self._unit, axis=1).ravel()
        self._refuse(self._writes, clash, units, who)
        self._refuse(self._reads, self._reads.unordered(units, who), units, who)
        for place, value in zip(places, values, strict=True):
            view[place] = value
            if (view[place] != value).any():
                raise ProgramError(f"race: threads write different values to {self.name} at once")
        self._writes.add(units, who)
        last = self._writes.thread[units]
        if not self._alike and (self._clock.warp[last] != self._clock.warp[who]).any():
            raise ProgramError(f"race: several warps write {self.name} at once")
        self._defined[units] = True

    def _view(self, size: int) -> np.ndarray:
        return self._bytes[: self._bytes.size // size * size].view(f"u{size}")

    def _find(
        self, at: np.ndarray, size: int, threads: np.ndarray, used: int = -1
    ) -> tuple[np.ndarray, np.ndarray]:
        """The units of each thread's access, and the thread of each."""
        if (at % size).any():
            raise ProgramError(
                f"misaligned: {size} bytes of {self.name} at {at[at % size != 0][0]}"
            )
        some = (1 << self._unit) - 1
        which = [i for i in range(size // self._unit) if used >> (i * self._unit) & some]
        units = ((at // self._unit)[:, None] + np.array(which)).ravel()
        outside = (at < 0) | (at + size > self.size)
        if outside.any() or not self._exists[units].all():
            raise ProgramError(f"out of bounds: {size} bytes of {self.name}, {self.size} long")
        return units, np.repeat(threads, len(which))

    def _refuse(
        self, touches: _Touches, bad: np.ndarray, units: np.ndarray, who: np.ndarray
    ) -> None:
        if bad.any():
            first, second = touches.thread[units[bad][0]], who[bad][0]
            did = "reads" if touches is self._reads else "writes"
            pair = f"thread {first} {did}, then thread {second} comes"
            raise ProgramError(f"race: in {self.name} {pair}, and no barrier is between them")
