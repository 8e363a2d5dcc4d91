"""The results of PTX instructions, on arrays with a value for each thread.

Only exact ones: IEEE operations rounded to nearest, and integers. Instructions that approximate
(.approx, .full), flush (.ftz) or fuse (fma) are not here, so they are refused. Source: PTX
ISA 8.7, "Integer", "Floating Point", "Comparison and Selection", "Logic and Shift" and "Data
Movement and Conversion" instructions.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Callable
from typing import Any

import numpy as np

_SIGNED, _UNSIGNED = ("s16", "s32", "s64"), ("u16", "u32", "u64")
_KINDS = {"s": "i", "u": "u", "b": "u", "f": "f"}
_CONVERSION = re.compile(r"cvt\.(?:(rn|rzi)\.)?([suf]\d+|bf16)\.([suf]\d+|bf16)$")
Operation = tuple[Callable[..., Any], tuple[str, ...]]


def find_operation(name: str) -> Operation | None:
    """A function of arrays, and its arguments' types; None if no exact one has that name."""
    if name not in OPERATIONS and (conversion := _CONVERSION.match(name)):
        to, of = conversion[2], conversion[3]
        if _rounds(to, of) == conversion[1]:
            OPERATIONS[name] = (lambda a: convert(a, of, to)), (of,)
    return OPERATIONS.get(name)


def dtype_of(kind: str) -> np.dtype:
    """numpy's type for a type of PTX; a bfloat16 is its bits."""
    if kind == "pred":
        return np.dtype(bool)
    if kind == "bf16":
        return np.dtype(np.uint16)
    return np.dtype(f"{_KINDS[kind[0]]}{int(kind[1:]) // 8}")


def convert(a: np.ndarray, of: str, to: str) -> np.ndarray:
    """cvt; floating to nearest even, bfloat16 by way of float32."""
    if of == "bf16":
        a = (a.astype(np.uint32) << 16).view(np.float32)
    if to == "bf16":
        bits = a.astype(np.float32).view(np.uint32)
        rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        return np.where(np.isnan(a), 0x7FFF, rounded).astype(np.uint16)
    return a.astype(dtype_of(to))


def _pair(high: np.ndarray, low: np.ndarray, to: str) -> np.ndarray:
    """cvt of two values into the halves of a word."""
    upper, lower = (convert(a, "f32", to).view(np.uint16).astype(np.uint32) for a in (high, low))
    return (upper << np.uint32(16)) | lower


def _rounds(to: str, of: str) -> str | None:
    """The rounding that a conversion must name; for unknown types a name that none has."""
    floating = [kind == "bf16" or kind[0] == "f" for kind in (to, of)]
    if floating == [False, False]:
        return None
    if floating == [True, True]:
        narrower = (to, of) in (("f32", "f64"), ("f16", "f32"), ("bf16", "f32"))
        wider = (of, to) in (("f32", "f64"), ("f16", "f32"), ("bf16", "f32"))
        return "rn" if narrower else None if wider else "none"
    return "rn" if floating == [True, False] and to in ("f32", "f64") else "none"


def _divide(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Towards zero; a divisor of 0 has no defined result, and gives all ones."""
    safe = np.where(b == 0, 1, b)
    quotient = a // safe
    quotient = quotient + ((quotient < 0) & (quotient * safe != a))
    return np.where(b == 0, -1 if a.dtype.kind == "i" else np.iinfo(a.dtype).max, quotient)


def _extreme(choose: Callable[..., Any], sign: float) -> Callable[..., Any]:
    """fmin or fmax: a number rather than NaN, and +0 above -0."""

    def found(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        both = (a == 0) & (b == 0)
        return np.where(both, sign * (sign * a + sign * b), choose(a, b))

    return found


def _shift(a: np.ndarray, count: np.ndarray, left: bool) -> np.ndarray:
    """Counts beyond the width shift everything out."""
    bits = a.dtype.itemsize * 8
    few = np.minimum(count, bits - 1).astype(a.dtype)
    if not left:
        gone = a >> a.dtype.type(bits - 1) if a.dtype.kind == "i" else a.dtype.type(0)
        return np.where(count < bits, a >> few, gone)
    return np.where(count < bits, a << few, a.dtype.type(0))


def _bits(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe.u32"""
    wide = a.astype(np.uint64) >> np.minimum(start & 0xFF, 63).astype(np.uint64)
    return (wide & ((np.uint64(1) << (length & 0xFF).clip(0, 32).astype(np.uint64)) - 1)).astype(
        np.uint32
    )


def _signed_bits(a: np.ndarray, start: np.ndarray, length: np.ndarray) -> np.ndarray:
    """bfe.s32, where the field is within the word."""
    if ((start + length > 32) | (length == 0)).any():
        raise NotImplementedError("bfe.s32 beyond the word")
    return (a << (32 - start - length).astype(np.int32)) >> (32 - length).astype(np.int32)


def _permute(a: np.ndarray, b: np.ndarray, control: np.ndarray) -> np.ndarray:
    """prmt.b32: four bytes out of eight, or their signs."""
    both, found = a.astype(np.uint64) | (b.astype(np.uint64) << np.uint64(32)), np.zeros_like(a)
    for i in range(4):
        choice = (control >> (4 * i)) & 0xF
        byte = (both >> ((choice & 7) * 8).astype(np.uint64)) & np.uint64(0xFF)
        byte = np.where(choice & 8, np.where(byte & np.uint64(0x80), 0xFF, 0), byte)
        found |= byte.astype(np.uint32) << np.uint32(8 * i)
    return found


def _or_nan(compare: Callable[..., Any]) -> Callable[..., Any]:
    return lambda a, b: compare(a, b) | np.isnan(a) | np.isnan(b)


def _of_halves(compare: Callable[..., Any], kind: str) -> Callable[..., Any]:
    """Of numbers in 16 bits each; where there are two in a word, two results, the lower first."""

    def found(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        halves = (np.ascontiguousarray(v).view(dtype_of(kind)) for v in (a, b))
        return compare(*(convert(v, kind, "f32").reshape(len(a), -1) for v in halves))

    return found


def _table() -> dict[str, Operation]:
    table: dict[str, Operation] = {}
    compare = {n: getattr(operator, n) for n in ("eq", "ne", "lt", "le", "gt", "ge")}
    for t in (*_SIGNED, *_UNSIGNED):
        for name, f in (("add", np.add), ("sub", np.subtract), ("div", _divide)):
            table[f"{name}.{t}"] = f, (t, t)
        table[f"mul.lo.{t}"] = np.multiply, (t, t)
        table[f"mad.lo.{t}"] = (lambda a, b, c: a * b + c), (t, t, t)
        table[f"rem.{t}"] = (lambda a, b: a - _divide(a, b) * b), (t, t)
        table[f"min.{t}"], table[f"max.{t}"] = (np.minimum, (t, t)), (np.maximum, (t, t))
        table[f"shr.{t}"] = (lambda a, n: _shift(a, n, False)), (t, "u32")
    for t, wide in (("s16", "s32"), ("u16", "u32"), ("s32", "s64"), ("u32", "u64")):
        to = dtype_of(wide)
        table[f"mul.wide.{t}"] = (lambda a, b, to=to: a.astype(to) * b.astype(to)), (t, t)
        table[f"mad.wide.{t}"] = (
            (lambda a, b, c, to=to: a.astype(to) * b.astype(to) + c),
            (t, t, wide),
        )
    for t in _SIGNED:
        table[f"neg.{t}"], table[f"abs.{t}"] = (np.negative, (t,)), (np.abs, (t,))
    for t in ("b16", "b32", "b64", "pred"):
        for name, f in (("and", np.bitwise_and), ("or", np.bitwise_or), ("xor", np.bitwise_xor)):
            table[f"{name}.{t}"] = f, (t, t)
        table[f"not.{t}"] = np.invert, (t,)
        table[f"shl.{t}"] = (lambda a, n: _shift(a, n, True)), (t, "u32")
    for t in ("f32", "f64"):
        for name in ("add", "subtract", "multiply", "divide"):
            table[f"{name[:3]}.rn.{t}"] = getattr(np, name), (t, t)
        table[f"sqrt.rn.{t}"] = np.sqrt, (t,)
        table[f"neg.{t}"], table[f"abs.{t}"] = (np.negative, (t,)), (np.abs, (t,))
        table[f"min.{t}"] = _extreme(np.fmin, -1.0), (t, t)
        table[f"max.{t}"] = _extreme(np.fmax, 1.0), (t, t)
    for t in ("b16", "b32", "b64", "f32", "f64", "s16", "s32", "s64", "u16", "u32", "u64"):
        table[f"selp.{t}"] = (lambda a, b, p: np.where(p, a, b)), (t, t, "pred")
        table[f"mov.{t}"] = np.copy, (t,)
    table["mov.pred"] = np.copy, ("pred",)
    for t in ("b16", "b32", "b64"):
        table[f"setp.eq.{t}"] = compare["eq"], (t, t)
        table[f"setp.ne.{t}"] = compare["ne"], (t, t)
    for name, f in compare.items():
        ordered = (lambda a, b: (a < b) | (a > b)) if name == "ne" else f
        for t in (*_SIGNED, *_UNSIGNED):
            table[f"setp.{name}.{t}"] = f, (t, t)
        for suffix, compared in (("", ordered), ("u", _or_nan(f))):
            for t in ("f32", "f64"):
                table[f"setp.{name}{suffix}.{t}"] = compared, (t, t)
            for t in ("f16", "bf16"):
                halves = _of_halves(compared, t)
                table[f"setp.{name}{suffix}.{t}"] = halves, ("u16", "u16")
                table[f"setp.{name}{suffix}.{t}x2"] = halves, ("u32", "u32")
    for t in ("f16", "bf16"):
        table[f"cvt.rn.{t}x2.f32"] = (lambda a, b, t=t: _pair(a, b, t)), ("f32", "f32")
    table["bfe.u32"] = _bits, ("u32", "u32", "u32")
    table["bfe.s32"] = _signed_bits, ("s32", "u32", "u32")
    table["prmt.b32"] = _permute, ("u32", "u32", "u32")
    return table


OPERATIONS = _table()
