"""A machine for pickles that builds data and never calls anything.

Python's own unpickler runs what the file names; with its imports restricted it still allocates
whatever memory a few bytes ask for. This one knows the opcodes that appear in weights. An object
of any class is kept as `Made(name, arguments)`, for the caller to judge.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Made", "Named", "PickleError", "run"]


class PickleError(ValueError):
    """A pickle that is damaged or does more than hold data."""


@dataclass(frozen=True)
class Named:
    """A class or function of a pickle, by its name; it is not imported."""

    name: str


@dataclass
class Made:
    """What calling `maker` with `arguments` would have made, and the state set on it."""

    maker: Any
    arguments: Any
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


_MARK = object()
_CONSTANTS = {b"N": None, b"\x88": True, b"\x89": False}
# Opcode: struct format of its argument, which becomes the value.
_NUMBERS = {b"K": "<B", b"M": "<H", b"J": "<i", b"G": ">d"}
# Opcode: struct format of the length of its text or bytes.
_TEXTS = {b"\x8c": "<B", b"X": "<I", b"\x8d": "<Q"}
_BYTES = {b"C": "<B", b"B": "<I", b"\x8e": "<Q", b"U": "<B", b"T": "<i"}
_GETS = {b"h": "<B", b"j": "<I"}
_PUTS = {b"q": "<B", b"r": "<I"}
_TUPLES = {b"\x85": 1, b"\x86": 2, b"\x87": 3}
_EMPTY: dict[bytes, Callable[[], Any]] = {b"}": dict, b"]": list, b")": tuple}


def run(data: bytes, start: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """Run the pickle that starts at byte `start`.

    Args:
        data: holds the pickle; more may follow.
        start: of the pickle.
        persistent: what a persistent id, such as torch's storages, stands for.

    Returns:
        The object, and where the pickle ended.

    Raises:
        PickleError: it is damaged, or uses an opcode that weights do not need.
    """
    machine = _Machine(data, start, persistent)
    try:
        return machine.run(), machine.at
    except (IndexError, KeyError, TypeError, ValueError, struct.error, RecursionError) as error:
        if isinstance(error, PickleError):
            raise
        raise PickleError(f"damaged at byte {machine.at} ({type(error).__name__})") from error


class _Machine:
    def __init__(self, data: bytes, start: int, persistent: Callable[[Any], Any]) -> None:
        self.data, self.at, self.persistent = data, start, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while (op := self._take(1)) != b".":
            if op in _NUMBERS:
                self.stack.append(self._number(_NUMBERS[op]))
            elif op in _TEXTS:
                self.stack.append(self._take(self._number(_TEXTS[op])).decode())
            elif op in _BYTES:
                self.stack.append(self._take(self._number(_BYTES[op])))
            elif op in _CONSTANTS:
                self.stack.append(_CONSTANTS[op])
            elif op in _EMPTY:
                self.stack.append(_EMPTY[op]())
            elif op in _PUTS:
                self.memo[self._number(_PUTS[op])] = self.stack[-1]
            elif op in _GETS:
                self.stack.append(self.memo[self._number(_GETS[op])])
            elif op in _TUPLES:
                self._make_tuple(_TUPLES[op])
            else:
                self._step(op)
        return self.stack.pop()

    def _step(self, op: bytes) -> None:
        step = _STEPS.get(op)
        if step is None:
            raise PickleError(f"opcode {op!r} at byte {self.at - 1} is not used by weights")
        step(self)

    def _take(self, size: int) -> bytes:
        if size < 0 or self.at + size > len(self.data):
            raise PickleError(f"truncated at byte {len(self.data)}")
        self.at += size
        return self.data[self.at - size : self.at]

    def _line(self) -> str:
        end = self.data.index(b"\n", self.at)
        line = self.data[self.at : end].decode()
        self.at = end + 1
        return line

    def _number(self, layout: str) -> Any:
        return struct.unpack(layout, self._take(struct.calcsize(layout)))[0]

    def _since_mark(self) -> list[Any]:
        for i in range(len(self.stack) - 1, -1, -1):
            if self.stack[i] is _MARK:
                items = self.stack[i + 1 :]
                del self.stack[i:]
                return items
        raise PickleError(f"no mark before byte {self.at}")

    def _make_tuple(self, size: int) -> None:
        items = tuple(self.stack[-size:])
        if len(items) < size:
            raise PickleError(f"too short a stack at byte {self.at}")
        self.stack[-size:] = [items]

    def _set_items(self, pairs: list[Any]) -> None:
        target = self.stack[-1]
        into = target.items if isinstance(target, Made) else target
        if not isinstance(into, dict) or len(pairs) % 2:
            raise PickleError(f"items for no dictionary at byte {self.at}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing a nested tuple takes exponential time: its parts may be shared.
            if not isinstance(key, (str, int, float, bool, type(None))):
                key = f"<{type(key).__name__}>"
            into[key] = value

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Made):
            raise PickleError(f"elements for no list at byte {self.at}")

    def _global(self) -> None:
        module = self._line()
        self.stack.append(Named(f"{module}.{self._line()}"))

    def _stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(name, str) or not isinstance(module, str):
            raise PickleError(f"a class without a name at byte {self.at}")
        self.stack.append(Named(f"{module}.{name}"))

    def _make(self) -> None:
        arguments, maker = self.stack.pop(), self.stack.pop()
        self.stack.append(Made(maker, arguments))

    def _build(self) -> None:
        state = self.stack.pop()
        if isinstance(self.stack[-1], Made):
            self.stack[-1].state = state

    def _long(self) -> None:
        self.stack.append(int.from_bytes(self._take(self._number("<B")), "little", signed=True))

    def _persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]


_STEPS: dict[bytes, Callable[[_Machine], Any]] = {
    b"\x80": lambda m: m._take(1),  # protocol
    b"\x95": lambda m: m._take(8),  # frame
    b"(": lambda m: m.stack.append(_MARK),
    b"t": lambda m: m.stack.append(tuple(m._since_mark())),
    b"s": lambda m: m._set_items(m._pair()),
    b"u": lambda m: m._set_items(m._since_mark()),
    b"a": lambda m: m._append([m.stack.pop()]),
    b"e": lambda m: m._append(m._since_mark()),
    b"0": lambda m: m.stack.pop(),
    b"c": _Machine._global,
    b"\x93": _Machine._stack_global,
    b"R": _Machine._make,
    b"\x81": _Machine._make,
    b"b": _Machine._build,
    b"\x8a": _Machine._long,
    b"Q": _Machine._persistent,
    b"\x94": _Machine._memoize,
}
