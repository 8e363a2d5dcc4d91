"""A machine for pickles that builds data and never calls anything.

`pickletools` of Python's library decodes the opcodes. Python's own unpickler, which follows them,
runs the functions that the file names. Even with restricted imports it hashes keys for ever, and a
few bytes make it allocate any amount of memory. This one knows the opcodes that appear in weights.
An object of any class is kept as `Made(name, arguments)`, for the caller to judge.
"""

from __future__ import annotations

import io
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["Made", "Named", "PickleError", "run"]


class PickleError(ValueError):
    """A pickle that is damaged or does more than hold data."""


@dataclass(frozen=True)
class Named:
    """A class or function of a pickle, by its name; it is not imported."""

    name: str


class Made:
    """An object that calling `maker` with `arguments` would make; nothing is called.

    Args:
        maker: a `Named`, or anything else that the pickle calls.
        arguments: of the call.
    """

    __slots__ = ("arguments", "items", "maker", "state")

    def __init__(self, maker: Any, arguments: Any) -> None:
        self.maker, self.arguments, self.state = maker, arguments, None
        self.items: dict[Any, Any] | None = None


_MARK = object()
_NUMBERS = ("BININT", "BININT1", "BININT2", "BINFLOAT", "LONG1")
_TEXTS = ("SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "SHORT_BINSTRING", "BINSTRING")
_BYTES = ("SHORT_BINBYTES", "BINBYTES", "BINBYTES8")
_VALUES = frozenset((*_NUMBERS, *_TEXTS, *_BYTES))
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "MARK": _MARK}
_EMPTY: dict[str, Callable[[], Any]] = {
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_SET": list,  # elements may be unhashable here
    "EMPTY_TUPLE": tuple,
}
_PUTS, _GETS = ("BINPUT", "LONG_BINPUT"), ("BINGET", "LONG_BINGET")
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_NOTHING = ("PROTO", "FRAME", "STOP")
_LARGEST_KEY = 1 << 63  # hashes of larger numbers can be made to collide


def run(data: bytes | bytearray, start: int, persistent: Callable[[Any], Any]) -> tuple[Any, int]:
    """Run the pickle that starts at byte `start`.

    Args:
        data: holds the pickle; more may follow.
        start: of the pickle.
        persistent: function from a persistent id, as of torch's storages, to its object.

    Returns:
        The object, and the position behind the pickle.

    Raises:
        PickleError: it is damaged, or uses an opcode that weights do not need.
    """
    machine, file = _Machine(persistent), io.BytesIO(data)
    file.seek(start)
    try:
        for op, argument, at in pickletools.genops(file):
            machine.at = at or 0
            machine.step(op.name, argument)
        return machine.stack.pop(), file.tell()
    except PickleError:
        raise
    except ValueError as error:
        raise PickleError(f"truncated or damaged after byte {machine.at}: {error}") from error
    except (IndexError, KeyError, TypeError, RecursionError) as error:
        raise PickleError(f"damaged at byte {machine.at} ({type(error).__name__})") from error


class _Machine:
    def __init__(self, persistent: Callable[[Any], Any]) -> None:
        self.at, self.persistent = 0, persistent
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def step(self, op: str, argument: Any) -> None:
        if op in _VALUES:
            self.stack.append(argument)
        elif op in _PUTS:
            self.memo[argument] = self.stack[-1]
        elif op in _GETS:
            self.stack.append(self.memo[argument])
        elif op in _CONSTANTS:
            self.stack.append(_CONSTANTS[op])
        elif op in _EMPTY:
            self.stack.append(_EMPTY[op]())
        elif op in _TUPLES:
            self._make_tuple(_TUPLES[op])
        elif op == "GLOBAL":
            self.stack.append(Named(argument.replace(" ", ".")))
        elif op in _STEPS:
            _STEPS[op](self)
        elif op not in _NOTHING:
            raise PickleError(f"opcode {op} at byte {self.at} is not used by weights")

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
        if isinstance(target, Made) and target.items is None:
            target.items = {}
        into = target.items if isinstance(target, Made) else target
        if not isinstance(into, dict) or len(pairs) % 2:
            raise PickleError(f"items for no dictionary at byte {self.at}")
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            # Hashing a nested tuple takes exponential time: its parts may be shared.
            small = type(key) is int and -_LARGEST_KEY < key < _LARGEST_KEY
            into[key if isinstance(key, str) or small else None] = value

    def _append(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target += items
        elif not isinstance(target, Made):
            raise PickleError(f"elements for no list at byte {self.at}")

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

    def _persistent(self) -> None:
        self.stack.append(self.persistent(self.stack.pop()))

    def _memoize(self) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _pair(self) -> list[Any]:
        value, key = self.stack.pop(), self.stack.pop()
        return [key, value]


_STEPS: dict[str, Callable[[_Machine], Any]] = {
    "TUPLE": lambda m: m.stack.append(tuple(m._since_mark())),
    "FROZENSET": lambda m: m.stack.append(tuple(m._since_mark())),
    "SETITEM": lambda m: m._set_items(m._pair()),
    "SETITEMS": lambda m: m._set_items(m._since_mark()),
    "APPEND": lambda m: m._append([m.stack.pop()]),
    "APPENDS": lambda m: m._append(m._since_mark()),
    "ADDITEMS": lambda m: m._append(m._since_mark()),
    "POP": lambda m: m.stack.pop(),
    "STACK_GLOBAL": _Machine._stack_global,
    "REDUCE": _Machine._make,
    "NEWOBJ": _Machine._make,
    "BUILD": _Machine._build,
    "BINPERSID": _Machine._persistent,
    "MEMOIZE": _Machine._memoize,
}
