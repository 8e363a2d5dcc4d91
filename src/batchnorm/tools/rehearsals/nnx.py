"""flax nnx models whose batch norms normalize by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from flax import nnx

from batchnorm.tools.frameworks.nnx import find
from batchnorm.tools.frameworks.nnx_stacked import module_of
from batchnorm.tools.models import FoundLayer


def why_frozen(layer: Any) -> str | None:
    """Why its statistics are not to be touched, or None."""
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
