"""Executes a PTX kernel: all threads of a launch at once, or warp by warp in a random order.

A register is an array with a value for each thread of the launch. Threads that are at the same
instruction form a group. The group that is furthest behind goes first, so that groups meet again
after a branch. Source: PTX ISA 8.7, "Control Flow Instructions", "Parallel
Synchronization and Communication Instructions", and `shfl.sync`, `ldmatrix`, `ld`, `st`.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from ptx_arithmetic import dtype_of, find_operation
from ptx_memory import WARP, Clock, Memory, ProgramError
from ptx_text import Address, Instruction, Kernel

_ACCESS = re.compile(
    r"(ld|st)\.(param|global|shared)((?:\.(?:nc|L1::evict_\w+|L1::no_allocate))*)"
    r"(?:\.v([24]))?\.([bsu])(8|16|32|64)$"
)
_EVERY_LANE = 0xFFFFFFFF
_UNKNOWN = 0xA5A5A5A5A5A5A5A5  # the value of a register before it is written


class Machine:
    """One launch.

    Args:
        kernel: the kernel.
        grid: number of CTAs.
        each: threads of each CTA.
        arguments: the bits of each parameter.
        buffers: pairs of an address and the memory there.
        shared: bytes of shared memory of each CTA.
        order: None for all threads at once, else a generator that draws the next warp.
    """

    def __init__(
        self,
        kernel: Kernel,
        grid: int,
        each: int,
        arguments: dict[str, np.ndarray],
        buffers: Callable[[Clock], Iterable[tuple[int, Memory]]],
        shared: int,
        order: random.Random | None = None,
    ) -> None:
        threads = grid * each
        self._kernel, self._each, self._size = kernel, each, threads
        self._arguments, self._order, self._shared_size = arguments, order, shared
        self._clock = Clock(threads, each)
        self._buffers = list(buffers(self._clock))
        unit = min([int(m[6]) // 8 for m in self._accesses() if m[2] == "shared"], default=1)
        self._shared = Memory(
            np.zeros(grid * shared, np.uint8),
            unit,
            self._clock,
            defined=np.zeros(grid * shared // unit, bool),
            alike=True,
            name="shared memory",
        )
        lane = np.arange(threads, dtype=np.uint32)
        self._registers: dict[str, np.ndarray] = {
            "%tid.x": lane % each,
            "%ctaid.x": lane // each,
        }
        self._registers |= {name: np.zeros(threads, np.uint32) for name in kernel.shared}
        self._groups: list[tuple[int, np.ndarray]] = []
        self._waits = np.full(threads, -1)  # at which barrier

    def run(self) -> None:
        """Run until every thread has returned; raises ProgramError for a fault of the program."""
        self._add(0, np.ones(self._size, bool))
        with np.errstate(all="ignore"):
            while self._groups:
                self._advance(*self._next())
        if (self._waits >= 0).any():
            raise ProgramError("barrier: only some threads of a CTA reach it")

    def _accesses(self) -> Iterable[re.Match[str]]:
        return filter(None, (_ACCESS.match(i.name) for i in self._kernel.code))

    def _add(self, pc: int, threads: np.ndarray) -> None:
        """Threads go on from there, each warp by itself where they are run in an order."""
        if not threads.any():
            return
        if self._order is None:
            groups = [threads]
        else:
            warps = np.unique(self._clock.warp[threads])
            groups = [threads & (self._clock.warp == warp) for warp in warps]
        for group in groups:
            self._groups.append((pc, group))

    def _next(self) -> tuple[int, np.ndarray]:
        """The group that is furthest behind, merged with the groups that are at the same place."""
        pool = self._groups
        if self._order is not None:
            warp = self._order.choice([self._clock.warp[g.argmax()] for _, g in pool])
            pool = [(pc, g) for pc, g in pool if g[self._clock.warp == warp].any()]
        first = min(pc for pc, _ in pool)
        together = [g for pc, g in pool if pc == first]
        taken = {id(g) for g in together}
        self._groups = [(pc, g) for pc, g in self._groups if id(g) not in taken]
        return first, np.logical_or.reduce(together)

    def _advance(self, pc: int, threads: np.ndarray) -> None:
        """Run a group to where it splits, waits, ends or meets another."""
        stop = min((at for at, _ in self._groups if at > pc), default=len(self._kernel.code))
        every = bool(threads.all())
        while True:
            at = self._kernel.code[pc]
            name = at.name
            active, partial = threads, not every
            if at.guard is not None:
                predicate, opposite = self._read(at.guard[0], "pred"), at.guard[1]
                active, partial = threads & (predicate != opposite), True
            if name in ("bra", "bra.uni"):
                assert isinstance(at.operands[0], str)
                self._add(self._kernel.labels[at.operands[0]], active)
                self._add(pc + 1, threads & ~active)
                return
            if name == "ret":
                self._add(pc + 1, threads & ~active)
                return
            if name == "bar.sync":
                self._wait(pc, at, active, threads)
                return
            try:
                self._step(at, active, partial)
            except ProgramError as fault:
                raise ProgramError(f"{fault}: {self._kernel.name}, {pc}: {at.text}") from None
            pc += 1
            if pc >= stop:
                self._groups.append((pc, threads))
                return

    def _wait(self, pc: int, at: Instruction, active: np.ndarray, threads: np.ndarray) -> None:
        if at.operands != (0,) or at.guard is not None:
            raise NotImplementedError(at.text)
        self._whole_warps(at, active)
        self._waits[active] = pc
        waits = self._waits.reshape(-1, self._each)
        if ((waits >= 0) & (waits != pc)).any(axis=1)[(waits == pc).any(axis=1)].any():
            raise ProgramError("barrier: threads of a CTA wait at different ones")
        released = np.repeat((waits == pc).all(axis=1), self._each)
        self._waits[released] = -1
        self._clock.meet(np.flatnonzero(released), whole_cta=True)
        self._add(pc + 1, released)

    def _whole_warps(self, at: Instruction, active: np.ndarray) -> None:
        lanes = active.reshape(-1, WARP)
        if (lanes.any(axis=1) != lanes.all(axis=1)).any():
            raise ProgramError(f"divergence: only some lanes of a warp reach {at.text}")

    def _step(self, at: Instruction, active: np.ndarray, partial: bool) -> None:
        """One instruction that neither branches nor waits for other warps."""
        found = find_operation(at.name)
        if found is not None:
            operation, kinds = found
            sources = at.operands[1:]
            if len(sources) != len(kinds):
                raise NotImplementedError(at.text)
            values = [self._read(a, kind) for a, kind in zip(sources, kinds, strict=True)]
            self._write(at.operands[0], operation(*values), active, partial)
        elif access := _ACCESS.match(at.name):
            self._access(at, access, np.flatnonzero(active))
        elif at.name == "bar.warp.sync" and at.operands == (-1,):
            self._whole_warps(at, active)
            self._clock.meet(np.flatnonzero(active), whole_cta=False)
        elif exchange := _EXCHANGES.get(at.name):
            self._whole_warps(at, active)
            self._write(at.operands[0], exchange(self, at, active), active, partial)
        elif at.name in _MATRIX_STORES:
            self._whole_warps(at, active)
            _store_matrix(self, at, active)
        else:
            raise NotImplementedError(f"no exact meaning is known of: {at.text}")

    def _read(self, operand: Any, kind: str) -> np.ndarray:
        """An operand's values; of a register that is wider, the low bits."""
        dtype = dtype_of(kind)
        if kind == "pred":
            known = isinstance(operand, int)
            return np.full(self._size, bool(operand)) if known else self._register(operand)
        bits = np.dtype(f"u{dtype.itemsize}")
        if isinstance(operand, tuple):
            each = dtype.itemsize * 8 // len(operand)
            parts = [self._read(a, f"u{each}").astype(bits) for a in operand]
            return sum((a << bits.type(i * each) for i, a in enumerate(parts)), start=bits.type(0))
        if isinstance(operand, int):
            value = bits.type(operand & ((1 << 8 * dtype.itemsize) - 1))
            return np.full(self._size, value).view(dtype)
        return self._register(operand).astype(bits, copy=False).view(dtype)

    def _register(self, name: str) -> np.ndarray:
        if name not in self._registers:
            raise ProgramError(f"undefined: register {name} is read before it is written")
        return self._registers[name]

    def _write(self, to: Any, values: np.ndarray, active: np.ndarray, partial: bool) -> None:
        """Set a register, or several to the parts of a value, where threads are active."""
        if not isinstance(to, tuple) and values.ndim == 2:
            values = values[:, 0]
        if isinstance(to, tuple):
            each = values.dtype.itemsize // len(to)
            parts = values
            if values.ndim == 1:
                parts = np.ascontiguousarray(values).view(f"u{each}").reshape(-1, len(to))
            for i, name in enumerate(to):
                self._write(name, parts[:, i], active, partial)
            return
        if to is None:
            return
        size = self._kernel.registers[to.rstrip("0123456789")]
        dtype = np.dtype(bool) if size == 1 else np.dtype(f"u{size // 8}")
        if values.dtype.kind == "f":
            values = values.view(f"u{values.dtype.itemsize}")
        values = values.astype(dtype, copy=False)
        if partial:
            before = self._registers.get(to)
            before = (
                np.full(self._size, np.uint64(_UNKNOWN)).astype(dtype) if before is None else before
            )
            values = np.where(active, values, before)
        self._registers[to] = values

    def _access(self, at: Instruction, access: re.Match[str], threads: np.ndarray) -> None:
        """Load or store, `threads` by their numbers."""
        direction, space, _, count, kind, bits = access.groups()
        load, size = direction == "ld", int(bits) // 8
        place, rest = at.operands[load], at.operands[not load]
        names = rest if isinstance(rest, tuple) else (rest,)
        if len(names) != int(count or 1) or len(at.operands) != 2 or not isinstance(place, Address):
            raise NotImplementedError(at.text)
        if space == "param":
            values = [np.full(threads.size, self._arguments[place.base].view(f"u{size}"))]
        elif threads.size == 0:
            values = [np.zeros(0, f"u{size}") for _ in names]
        else:
            memory, offsets = self._locate(place, space, threads, size * len(names))
            if not load:
                sources = [self._read(name, f"u{bits}")[threads] for name in names]
                memory.store(offsets, sources, threads)
                return
            values = memory.load(offsets, size, len(names), threads, at.used)
        if load:
            active = np.zeros(self._size, bool)
            active[threads] = True
            for name, value in zip(names, values, strict=True):
                whole = np.zeros(self._size, f"{'i' if kind == 's' else 'u'}{size}")
                whole[threads] = value
                self._write(name, whole, active, threads.size < self._size)

    def _locate(
        self, place: Address, space: str, threads: np.ndarray, size: int
    ) -> tuple[Memory, np.ndarray]:
        """The memory that an access goes to, and each thread's offset there."""
        at = self._read(place.base, "u64")[threads].astype(np.int64) + place.offset
        if space == "shared":
            if (at + size > self._shared_size).any():
                raise ProgramError(
                    f"out of bounds: shared memory is {self._shared_size} bytes long"
                )
            return self._shared, at + self._clock.cta[threads] * self._shared_size
        for start, memory in self._buffers:
            if start <= at[0] < start + memory.size:
                return memory, at - start  # of all of them: one that is elsewhere is lost
        raise ProgramError(f"out of bounds: {size} bytes at {at[0]:#x}, where no argument is")


def _shuffle(machine: Machine, at: Instruction, active: np.ndarray) -> np.ndarray:
    """shfl.sync among all lanes of a warp."""
    source, choice = machine._read(at.operands[1], "u32"), machine._read(at.operands[2], "u32")
    if at.operands[3:] != (31, -1):
        raise NotImplementedError(at.text)
    lane = np.arange(source.size)
    if at.name == "shfl.sync.bfly.b32":
        other = lane ^ (choice & 31)
    else:
        other = lane - lane % WARP + (choice & 31)
    return source[other]


def _reduce(machine: Machine, at: Instruction, active: np.ndarray) -> np.ndarray:
    """redux.sync among all lanes of a warp."""
    if (machine._read(at.operands[2], "u32")[active] != _EVERY_LANE).any():
        raise NotImplementedError(at.text)
    values = machine._read(at.operands[1], "s32").reshape(-1, WARP)
    return values.max(axis=1).repeat(WARP)


def _find_matrices(
    machine: Machine, at: Instruction, place: Any, threads: np.ndarray
) -> tuple[Memory, list[np.ndarray]]:
    """The memory of matrices, and where each thread has its word of each.

    Each 8 lanes point at the rows, of 16 bytes, of a matrix; 4 lanes share a row.
    """
    assert isinstance(place, Address)
    memory, offsets = machine._locate(place, "shared", threads, 16)
    words = []
    for i in range(int(at.name.split(".x")[1][0])):
        rows = offsets.reshape(-1, WARP)[:, 8 * i : 8 * i + 8].repeat(4, axis=1).ravel()
        if (rows % 16).any():
            raise ProgramError(f"misaligned: {at.text}")
        words.append(rows + threads % 4 * 4)
    return memory, words


def _load_matrix(machine: Machine, at: Instruction, active: np.ndarray) -> np.ndarray:
    """ldmatrix."""
    threads = np.flatnonzero(active)
    memory, words = _find_matrices(machine, at, at.operands[1], threads)
    found = np.zeros((active.size, len(words)), np.uint32)
    for i, word in enumerate(words):
        found[threads, i] = memory.load(word, 4, 1, threads)[0]
    return found


def _store_matrix(machine: Machine, at: Instruction, active: np.ndarray) -> None:
    """stmatrix."""
    threads, (place, names) = np.flatnonzero(active), at.operands
    memory, words = _find_matrices(machine, at, place, threads)
    assert isinstance(names, tuple)
    for word, name in zip(words, names, strict=True):
        memory.store(word, [machine._read(name, "u32")[threads]], threads)


_EXCHANGES = {
    "shfl.sync.bfly.b32": _shuffle,
    "shfl.sync.idx.b32": _shuffle,
    "redux.sync.max.s32": _reduce,
    **{f"ldmatrix.sync.aligned.m8n8.x{n}.shared.b16": _load_matrix for n in (1, 2, 4)},
}
_MATRIX_STORES = {f"stmatrix.sync.aligned.m8n8.x{n}.shared.b16" for n in (1, 2, 4)}
