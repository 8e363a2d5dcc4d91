"""Functions that `torch.compile` must not look into, and operators that run each time."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

import torch

from batchnorm.torch.private import constant_in_graphs, skip_in_compilers

_Function = TypeVar("_Function", bound=Callable[..., Any])


def untraced(function: _Function) -> _Function:
    """Mark a function that `torch.compile` must run as it is, with all that it calls.

    Where the tracer gives up on a caller of a layer it goes on with the functions called inside,
    down to calls of the extension, which it makes without `self`. A test says if the mark is gone.
    """
    return skip_in_compilers(function)


def is_more(size: int | torch.SymInt, most: int) -> bool:
    """True if a size is larger, as far as the compiler knows; a dynamic one is guarded on."""
    if isinstance(size, int):
        return size > most
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports SymPy

    return bool(guard_or_false(size > most))


@lru_cache(maxsize=1)
def digest_code(root: Path) -> str:
    """A digest of the code in `root` that array code on torch is made of."""
    digest = hashlib.sha256()
    for folder in ("core", "torch"):
        for path in sorted(root.joinpath(folder).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


@constant_in_graphs
def code_digest() -> str:
    """A digest of this library's code, an argument of operators that are made of others.

    Caches of compiled graphs on disk know such an operator by its name and arguments only. They
    outlive an update of this library, after which the operator may be made of others.
    """
    return digest_code(Path(__file__).parent.parent)


_LIBRARY = torch.library.Library("batchnorm", "FRAGMENT")


def define_operator(
    name: str,
    function: Callable[..., Any],
    shape: Callable[..., Any] | None = None,
    *,
    captured: bool = True,
    mutates: tuple[str, ...] = (),
) -> None:
    """Define the operator `torch.ops.batchnorm.name`; its arguments are those of `function`.

    It costs a call some microseconds less than one of `torch.library.custom_op`, whose checks no
    operator here needs: none returns an argument or memory that it has returned before, and none
    has a gradient but by what `function` calls.

    Args:
        name: of the operator.
        function: runs it. Without `shape`, made of other operators: those stand in its place in a
            graph, with the gradient that they have; its last argument is then `code_digest()`.
        shape: the same for tensors without values.
        captured: False keeps it out of captured graphs, as `uncaptured` does.
        mutates: names of the arguments that it writes.
    """
    tag = None if captured else getattr(torch.Tag, "cudagraph_unsafe", None)
    schema = torch.library.infer_schema(function, mutates_args=mutates)
    _LIBRARY.define(name + schema, tags=() if tag is None else (tag,))
    if shape is None:
        _LIBRARY.impl(name, function, "CompositeImplicitAutograd")
    else:
        # A tracer that is at work where a graph runs would trace what the operator calls.
        _LIBRARY.impl(name, untraced(function), "CompositeExplicitAutograd")
        torch.library.register_fake(f"batchnorm::{name}", shape, lib=_LIBRARY)


def uncaptured(name: str) -> Callable[..., Any]:
    """A decorator: an operator that reads the state of Python, which a captured graph would not.

    A graph of CUDA that is replayed runs kernels alone, with what the recording saw. The tag keeps
    the operator out of it, in versions of torch that know the tag.
    """
    tag = getattr(torch.Tag, "cudagraph_unsafe", None)
    tags: dict[str, Any] = {} if tag is None else {"tags": (tag,)}
    return torch.library.custom_op(name, mutates_args=(), **tags)
