"""flax nnx models whose batch norms normalize by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flax import nnx

from batchnorm.tools.frameworks.nnx.stacked import module_of
from batchnorm.tools.frameworks.nnx.states import find
from batchnorm.tools.frameworks.records import FoundLayer


def refuse_update(layer: Any) -> str | None:
    """The reason for not touching a layer's statistics, or None."""
    return "is frozen; unfreeze() it first" if getattr(module_of(layer), "frozen", False) else None


@contextmanager
def rehearse(
    model: nnx.Module, layers: Sequence[FoundLayer]
) -> Iterator[tuple[nnx.Module, Sequence[FoundLayer]]]:
    """A copy of the model, in evaluation mode but for `layers`; the arrays are shared."""
    actor = nnx.clone(model)
    actor.eval()
    copies = dict(find(actor))
    actors = [replace(found, layer=copies[found.name]) for found in layers]
    for found in actors:
        module_of(found.layer).use_running_average = False
    yield actor, actors
