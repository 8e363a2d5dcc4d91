"""Declarations of options: a front end declares each option of its layer once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from batchnorm.core.errors import ArgumentTypeError

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Option:
    """One option of a layer; everything that lists options reads its declaration.

    Attributes:
        name: of the argument, and of the layer's attribute.
        default: of the argument.
        check: function from all arguments to the value that the layer keeps.
        parts: further arguments that go into the value, with their defaults.
        kept: the value that the layer keeps by default.
        core: the value is a field of the core's Options, of the same name but for `symbol`.
        symbol: the name that the spec, the core's Options and states have for it, where the
            framework's is another.
        training: it matters in training alone; in evaluation a call has `kept`.
        folds: a layer in evaluation is an affine map with any value; if not, only one with `kept`
            can be folded.
        kernels: kernels compute it; if not, any value but `kept` goes to array code.
        agreed: function from the value, a field of the core's Options, to the text that ranks
            compare before they merge; None if they may differ in it.
        shown: in the layer's repr, where it differs from `kept`.
        converts: conversion of whole models takes it.
        original: the framework's own layer may replace this one whatever the value is; if not,
            only where it is `kept`.
    """

    name: str
    default: Any
    check: Callable[[Mapping[str, Any]], Any]
    parts: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    kept: Any = None
    core: bool = False
    symbol: str | None = None
    training: bool = False
    folds: bool = True
    kernels: bool = True
    agreed: Callable[[Any], str] | None = None
    shown: bool = True
    converts: bool = True
    original: bool = False

    @property
    def core_name(self) -> str:
        """The name of the field of the core's Options, if it is one."""
        return self.symbol or self.name


def list_arguments(options: Iterable[Option]) -> dict[str, Any]:
    """The arguments that options take, with their defaults, in order."""
    found: dict[str, Any] = {}
    for option in options:
        found |= {option.name: option.default, **option.parts}
    return found


def check_arguments(options: Iterable[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a layer keeps for these arguments; those left out have their defaults."""
    options = tuple(options)
    every = list_arguments(options)
    if unknown := sorted(given.keys() - every.keys()):
        raise ArgumentTypeError(
            f"options must be among {', '.join(every)}; got {', '.join(unknown)}."
        )
    every |= given
    return {option.name: option.check(every) for option in options}
