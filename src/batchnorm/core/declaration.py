"""Declarations of options: a front end declares each option of its layer once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from batchnorm.core import config
from batchnorm.core.errors import ArgumentTypeError

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class Option:
    """One option of a layer; everything that lists options reads its declaration.

    Front ends add what only they ask of an option.

    Attributes:
        name: of the argument, and of the layer's attribute.
        default: of the argument.
        check: function from all arguments to the value that the layer keeps.
        parts: further arguments that go into the value, with their defaults.
        kept: the value that the layer keeps by default.
        core: the field of the core's Options that takes the value; None for no field.
        kernels: kernels compute it; if not, any value but `kept` goes to array code.
        converts: conversion of whole models takes it.
    """

    name: str
    default: Any
    check: Callable[[Mapping[str, Any]], Any]
    parts: Mapping[str, Any] = field(default_factory=lambda: _NOTHING)
    kept: Any = None
    core: str | None = None
    kernels: bool = True
    converts: bool = True


def list_arguments(options: Iterable[Option]) -> dict[str, Any]:
    """The arguments that options take, with their defaults, in order."""
    found: dict[str, Any] = {}
    for option in options:
        found |= {option.name: option.default, **option.parts}
    return found


def check_arguments(options: Iterable[Option], given: Mapping[str, Any]) -> dict[str, Any]:
    """The values that a layer keeps for these arguments; those left out have their defaults."""
    options = tuple(options)
    check_known(options, given)
    every = {**list_arguments(options), **given}
    return {option.name: option.check(every) for option in options}


def check_known(options: Iterable[Option], given: Iterable[str]) -> None:
    """Raise if `given` holds a name that is no argument of an option."""
    every = list_arguments(options)
    if unknown := sorted(set(given) - every.keys()):
        raise ArgumentTypeError(
            f"options must be among {', '.join(every)}; got {', '.join(unknown)}."
        )


def refuse_options(options: Iterable[Option], given: config.Options) -> str | None:
    """The option of the core that is set and that no kernel computes, as a reason, or None."""
    for option in options:
        unserved = option.core is not None and not option.kernels
        if unserved and getattr(given, str(option.core)) != option.kept:
            return f"none computes {option.name}"
    return None
