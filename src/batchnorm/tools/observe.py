"""Forward passes of a model in which its batch norms are watched: their inputs, and the moments."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.core.moments import Moments
from batchnorm.tools.frameworks.adapter import Adapter
from batchnorm.tools.frameworks.records import FoundLayer, Observation
from batchnorm.tools.frameworks.switch import adapter_for
from batchnorm.tools.measure import merge
from batchnorm.tools.progress import track

__all__ = ["Batches", "Observation", "Tally", "observe", "run_watched"]


@contextmanager
def observe(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """Call `see` before every call of one of the layers inside the `with` block.

    Masks are seen however they reach a layer: as an argument, in a pair, propagated by Keras, or
    from `padding_mask`. Compiled torch models fall back to eager code inside the block. Layers of
    nnx are seen under JAX's transformations too, by callbacks, whose order is not that of the
    calls; those of Keras must run eagerly.

    Args:
        layers: from `find_layers`.
        see: called in the order of the calls; a layer used twice is seen twice. An exception from
            it ends the model's forward pass, or under a transformation of JAX the block.

    Raises:
        TypeError: a layer of a kind that cannot be watched.
        ValueError: from the model's forward pass, where a Keras layer runs in a graph or under a
            transformation.
    """
    frameworks = {found.framework for found in layers}
    assert len(frameworks) <= 1, "a model belongs to one framework"
    if not frameworks:
        yield
        return
    with adapter_for(frameworks.pop()).watch(layers, see):
        yield


class Tally:
    """Moments of all inputs of a layer together: every row counts the same (S14)."""

    def __init__(self) -> None:
        self.moments: Moments | None = None
        self.uses = 0
        self.skipped = 0

    def add(self, moments: Moments) -> None:
        """Take in the moments of one call.

        Channels in which they are not finite are left out, as in training (S9); `skipped` counts
        the calls with such a channel.
        """
        self.uses += 1
        finite = np.isfinite(moments.mean) & np.isfinite(moments.var)
        self.skipped += not finite.all()
        before = [] if self.moments is None else [self.moments]
        self.moments = merge([*before, moments])


@dataclass(frozen=True)
class Batches:
    """The batches that a tool runs a model on.

    Args:
        owner: the tool's name, for messages.
        items: arrays, or mappings of keyword arguments, which for Keras are one input; with
            `call` anything.
        call: function of the model and a batch, or None.
        label: text of the progress bar; None for no bar.
    """

    owner: str
    items: Iterable[Any]
    call: Callable[[Any, Any], Any] | None
    label: str | None


def run_watched(
    adapter: Adapter,
    model: Any,
    layers: Sequence[FoundLayer],
    batches: Batches,
    see: Callable[[Observation], None],
    prepare: Callable[[Any], None] = lambda batch: None,
) -> int:
    """Run a model on batches, its batch norms as in training, and leave it as it was.

    Args:
        adapter: of the model's framework.
        model: the model.
        layers: those of its batch norms that are watched.
        batches: its inputs.
        see: called before every call of one of the layers.
        prepare: called with each batch before the model is.

    Returns:
        The number of batches.

    Raises:
        TypeError: a tuple or list without `call`: it may hold labels, masks or several inputs.
        ValueError: no batch.
    """
    count = 0
    with adapter.rehearse(model, layers) as (actor, actors), observe(actors, see):
        for batch in track(batches.items, batches.label):
            prepare(batch)
            _run(adapter, actor, batch, batches)
            adapter.settle()
            count += 1
    if not count:
        raise ValueError(f"{batches.owner}: batches must yield at least one batch; it was empty.")
    return count


def _run(adapter: Adapter, model: Any, batch: Any, batches: Batches) -> None:
    if batches.call is not None:
        batches.call(model, batch)
    elif isinstance(batch, (tuple, list)):
        raise TypeError(
            f"{batches.owner}: batches must yield arrays or mappings of keyword arguments; got a "
            f"{type(batch).__name__} of {len(batch)}. Say what of it the model gets, for instance "
            "call=lambda model, batch: model(batch[0])."
        )
    else:
        adapter.call(model, batch)
