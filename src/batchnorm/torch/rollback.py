"""Running statistics that a failed call leaves as they were (S9)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor

from batchnorm.core.running import Running


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
    except BaseException:
        with torch.no_grad():
            for old, before in written:
                old.copy_(before)
        raise


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
