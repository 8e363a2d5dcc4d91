"""Watching the batch norms of a model while it runs: what each is given, and its moments."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchnorm.core.moments import Moments
from batchnorm.tools.measure import merge
from batchnorm.tools.models import FoundLayer, framework_of

__all__ = ["Observation", "Tally", "observe", "run_batch"]


@dataclass(frozen=True, eq=False)
class Observation:
    """One call of a batch norm.

    Args:
        layer: which one.
        x: its input, an array of the framework's; not a copy, so look at it now.
        mask: boolean, of x's rank with sizes of x or 1, True at real rows (S1); None where all
            are.
        axes: channel axes of x, sorted, not negative.
        measure: moments of x over the real rows of a mask, float64, shape (C,).
    """

    layer: FoundLayer
    x: Any
    mask: Any
    axes: tuple[int, ...]
    measure: Callable[[Any, Any, tuple[int, ...]], Moments]

    def moments(self, *, padded: bool = False) -> Moments:
        """Count, mean and biased variance per channel, float64, shape (C,).

        Args:
            padded: count padding as if it were real.
        """
        return self.measure(self.x, None if padded else self.mask, self.axes)


@contextmanager
def observe(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """Call `see` before every call of one of the layers inside the `with` block.

    Masks are seen however they reach a layer: as an argument, in a pair, propagated by Keras, or
    from `padding_mask`. Compiled torch models fall back to eager code inside the block. Layers of
    nnx are seen under JAX's transformations too, by callbacks, whose order is not that of the
    calls; those of Keras must run eagerly.

    Args:
        layers: from `find_layers`.
        see: called in the order of the calls; a layer used twice is seen twice. What it raises
            ends the model's forward pass, or under a transformation of JAX the block.

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
    observer = importlib.import_module(f"batchnorm.tools.observers.{frameworks.pop()}")
    with observer.watch(layers, see):
        yield


class Tally:
    """Moments of everything that a layer has been given: every row counts the same (S14)."""

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


def run_batch(owner: str, model: Any, batch: Any, call: Callable[[Any, Any], Any] | None) -> None:
    """Run a model on what an iterable yields.

    Args:
        owner: whose name error messages carry.
        model: the model.
        batch: an array; or a mapping of keyword arguments, which for Keras is one input; with
            `call` anything.
        call: function of the model and the batch, or None.

    Raises:
        TypeError: a tuple or list without `call`: it may hold labels, masks or several inputs.
    """
    _run(owner, model, batch, call)
    if framework_of(model) == "nnx":
        importlib.import_module("batchnorm.tools.observers.nnx").settle()


def _run(owner: str, model: Any, batch: Any, call: Callable[[Any, Any], Any] | None) -> None:
    if call is not None:
        call(model, batch)
    elif isinstance(batch, dict) and framework_of(model) != "keras":
        model(**batch)
    elif isinstance(batch, (tuple, list)):
        raise TypeError(
            f"{owner}: batches must yield arrays or mappings of keyword arguments; got a "
            f"{type(batch).__name__} of {len(batch)}. Say what of it the model gets, for instance "
            "call=lambda model, batch: model(batch[0])."
        )
    else:
        model(batch)
