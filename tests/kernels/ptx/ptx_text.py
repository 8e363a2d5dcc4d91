"""Reads the PTX that Triton emits: one kernel, as a list of instructions.

Source: PTX ISA 8.7, chapters "Syntax" and "Instruction Operands". Anything else is refused.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import NamedTuple

_ENTRY = re.compile(r"\.visible\s+\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{(.*)\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+\.(\w+)(?:\s+\.ptr\s+\.global\s+\.align\s+\d+)?\s+(\w+)")
_SHARED = re.compile(r"\.extern\s+\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)\[\]")
_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(%\w+)<(\d+)>$")
_USED = re.compile(r'\.pragma\s+"used_bytes_mask (\w+)"$')
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_ADDRESS = re.compile(r"\[\s*([%\w]+)\s*(?:\+\s*(-?\d+)\s*)?\]")
_NUMBER = re.compile(r"0f([0-9A-F]{8})$|0d([0-9A-F]{16})$|(-?(?:0x[0-9a-fA-F]+|\d+))U?$")

Operand = str | int | tuple["Operand", ...] | None


class Address(NamedTuple):
    """[base + offset]; the base is a register, a parameter, or shared memory."""

    base: str
    offset: int


class Instruction(NamedTuple):
    """An instruction.

    `guard`: a predicate, and true if it is negated; `used`: a bit for each byte of a load
    whose value matters (pragma "used_bytes_mask").
    """

    name: str
    operands: tuple[Operand | Address, ...]
    guard: tuple[str, bool] | None
    text: str
    used: int = -1


class Kernel(NamedTuple):
    """An entry; `parameters` are pairs of name and type, `registers` bits by prefix (pred: 1)."""

    name: str
    parameters: tuple[tuple[str, str], ...]
    shared: frozenset[str]
    registers: dict[str, int]
    code: tuple[Instruction, ...]
    labels: dict[str, int]


@lru_cache(maxsize=512)
def parse(text: str) -> Kernel:
    """The kernel in a PTX module that holds one."""
    text = re.sub(r"//[^\n]*", "", text)
    text = text.replace(".shared::cta", ".shared")  # the same; Triton 3.8 and newer say it in full
    shared = frozenset(_SHARED.findall(text))
    found = _ENTRY.search(text.split(".section")[0])
    if found is None or text.count(".entry") != 1:
        raise NotImplementedError("a module must have one kernel")
    name, parameters, _, body = found.groups()
    registers: dict[str, int] = {}
    labels: dict[str, int] = {}
    code: list[Instruction] = []
    used = -1
    # Lines with source positions end without a semicolon.
    body = re.sub(r"^\s*\.loc\b[^\n]*$", "", body, flags=re.MULTILINE)
    for part in body.split(";"):
        statement = part.strip()
        while label := re.match(r"(\$?\w+):\s*", statement):
            labels[label[1]] = len(code)
            statement = statement[label.end() :]
        if declared := _REGISTERS.match(statement):
            registers[declared[2]] = 1 if declared[1] == "pred" else int(declared[1][1:])
        elif mask := _USED.match(statement):
            used = int(mask[1], 16)
        elif statement:
            code.append(_instruction(statement)._replace(used=used))
            used = -1
    pairs = tuple((name, kind) for kind, name in _PARAMETER.findall(parameters))
    return Kernel(name, pairs, shared, registers, tuple(code), labels)


def _instruction(statement: str) -> Instruction:
    found = _STATEMENT.match(statement)
    if found is None:
        raise NotImplementedError(f"PTX: {statement}")
    opposite, predicate, name, operands = found.groups()
    guard = None if predicate is None else (predicate, opposite == "!")
    parsed = tuple(_operand(a) for a in _OPERAND.findall(operands))
    return Instruction(name, parsed, guard, " ".join(statement.split()))


def _operand(text: str) -> Operand | Address:
    """A register or label by name, a number by its bits (None: `_`), a vector as a tuple."""
    if text[0] == "{":
        return tuple(_operand(a) for a in _OPERAND.findall(text[1:-1]))  # type: ignore[misc]
    if text[0] == "[":
        address = _ADDRESS.match(text)
        if address is None:
            raise NotImplementedError(f"PTX: address {text}")
        return Address(address[1], int(address[2] or 0))
    if number := _NUMBER.match(text):
        single, double, integer = number.groups()
        return int(integer, 0) if integer else int(single or double, 16)
    if "|" in text:
        return tuple(text.split("|"))
    return None if text == "_" else text
