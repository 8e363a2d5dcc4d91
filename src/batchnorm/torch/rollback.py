"""Running statistics that a failed call leaves as they were (S9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from batchnorm.core.errors import ArgumentRuntimeError
from batchnorm.core.running import Running
from batchnorm.torch.private import find_transformation


@contextmanager
def unmoved_on_failure(statistics: Iterable[Tensor | None] | None) -> Iterator[None]:
    """Write the statistics back, to the bit, if the block that moves them raises."""
    given = [a for a in statistics or () if a is not None]
    kept = [(a, a.detach().clone(), _version(a)) for a in given]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for a, before, version in kept:
                if _version(a) != version or a.is_inference():
                    a.copy_(before)
        raise


def write_all(pairs: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Copy into each tensor its new value, or into none if one of them cannot be written."""
    written = []
    try:
        for old, new in pairs:
            before = old.detach().clone()
            old.copy_(new)
            written.append((old, before))
    except BaseException as error:
        with torch.no_grad():
            for old, before in written:
                old.copy_(before)
        transformed = find_transformation() is not None
        if transformed and isinstance(error, RuntimeError):
            raise _transformed_error(mapped="vmap" in str(error)) from error
        raise


def _transformed_error(mapped: bool) -> ArgumentRuntimeError:
    """The error about statistics that a transformation of torch.func keeps from moving.

    `mapped`: torch blames vmap, whatever other transformations are inside it.
    """
    if mapped:
        rule = "moved under torch.func.vmap, where each slice would move the same tensors"
        remedy = "mapped buffers, as of torch.func.stack_module_state"
    else:
        rule = "moved in a function that torch.func transforms, since they come from outside"
        remedy = "clones of the buffers made inside, or under functionalize with an argument"
    return ArgumentRuntimeError(
        f"running statistics cannot be {rule}. Give it others by torch.func.functional_call with "
        f"{remedy}; or move none: torch.func.replace_all_batch_norm_modules_(model), eval() or "
        "freeze()."
    )


def store(running: Running, new: Running | None, again: Tensor | Literal[True] | None) -> None:
    """Write `new` into `running` in place, unless the forward pass is a recomputation (S9).

    `again`: as `recomputation_flag` tells.
    """
    if again is True:
        return
    assert new is not None
    values = (
        (old, v.to(old.dtype)) for old, v in zip(running, new, strict=True) if old is not None
    )
    if torch.compiler.is_compiling():
        for old, value in values:
            old.copy_(value if again is None else torch.where(again, old, value))
    else:
        write_all(values)


def _version(a: Tensor) -> int:
    return 0 if a.is_inference() else a._version  # inference tensors count none
