"""Carrying batch norms from one model, library or file into another."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from batchnorm.tools.checkpoints import Checkpoint, read_checkpoint
from batchnorm.tools.checkpoints.limits import DEFAULT_LIMIT, DEFAULT_SECONDS
from batchnorm.tools.conventions import Count, convert_variance, count_of
from batchnorm.tools.fitting import check_number, fit
from batchnorm.tools.matching import Names, match
from batchnorm.tools.models import FoundLayer, find_layers, framework_of, put_states
from batchnorm.tools.stacking import unstack
from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import list_names

__all__ = ["Transferred", "transfer"]

_ARRAYS = ("mean", "var", "gamma", "beta")


@dataclass(frozen=True, eq=False)
class Transferred:
    """What `transfer` did.

    Args:
        target: the target that was given, if it is a model, which has been changed in place; a
            new one, if it is a tree of arrays; None if none was given.
        states: the states of the layers that were written, as they are now; without a target
            the source's states.
        pairs: names of source and target for each of them.
        notes: what is not exact, or was not carried over, and for which layers; and what looks
            like a layer in a file or a tree of arrays, but is none.
    """

    target: Any
    states: list[BatchNormState]
    pairs: list[tuple[str, str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def transfer(
    source: Any,
    target: Any = None,
    *,
    names: Names = None,
    count: Count = None,
    eps: float | None = None,
    decay: float | None = None,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> Transferred:
    """Write the batch norms of one model into another, whatever library each is of.

    Momentum, epsilon and the kind of variance are converted (S9, S10). Nothing is changed unless
    everything fits.

    Args:
        source: a model or layer of torch, flax nnx or Keras, theirs or ours; linen's variables;
            Haiku's `(params, state)`; Equinox's `(model, state)`; the path of a checkpoint; a
            `Checkpoint`; or `BatchNormState`s.
        target: a model or layer, which is written in place; or linen's variables, Haiku's or
            Equinox's pair, of which the result holds a new one. None only reads the source.
        names: which source layer goes where: a map of names or a function of the source's
            name; only these are moved. Without it all layers are, by equal names (but for case
            and separators), else by order, if both sides have the same channels in the same
            order.
        count: values per channel in a training batch, N·H·W for images: torch stores the
            unbiased variance, the others the biased one, and their ratio depends on it. An int,
            or a map by the source's names or a function of the state where layers differ.
            Without it the variance is carried as it is, and a note says so.
        eps: where the source does not know it, as in most checkpoints.
        decay: weight of the old value in the running statistics, likewise.
        limit, seconds: bytes and time that a checkpoint may take, as in `read_checkpoint`.

    Returns:
        What was done; read its `notes`.

    Raises:
        TypeError: source or target is nothing that holds batch norms.
        ValueError: layers do not match, or a state does not fit its layer: other channels, or no
            place for a gamma that matters. The target is unchanged.
        CheckpointError: the checkpoint cannot be read.

    >>> import torch
    >>> from batchnorm.torch import BatchNorm
    >>> old, new = torch.nn.BatchNorm1d(3, momentum=0.25), BatchNorm(3)
    >>> transfer(old, new).pairs, new.momentum
    ([('', '')], 0.25)
    """
    check_number("transfer", "eps", eps)
    check_number("transfer", "decay", decay, 1.0)
    found, notes = _take(source, limit, seconds)
    sources = [_complete(state, eps, decay) for state in found]
    if target is None:
        return Transferred(None, sources, notes=notes)
    side = _open(target)
    if not sources or not side.states:
        which = "target" if sources else "source"
        raise ValueError(f"transfer: the {which} has no batch norm.")
    if names is None:
        sources = unstack(sources, side.states)
    pairs = match(sources, side.states, names)
    remarks = _Remarks()
    changes = {}
    for i, j in pairs:
        wanted = side.states[j]
        state = convert_variance(sources[i], wanted.variance, count_of(sources[i], count))
        _remark(remarks, state, wanted, side)
        moved = replace(state, name=wanted.name)
        fit(moved, wanted)
        changes[wanted.name] = moved
    result = side.write(changes)
    written = {state.name: state for state in _open(result).states}
    for _, j in pairs:
        moved, now = changes[side.states[j].name], written[side.states[j].name]
        if any(_differs(getattr(moved, name), getattr(now, name)) for name in _ARRAYS):
            remarks.add("values were rounded to the target's type", now.name)
    _remark_rest(remarks, sources, side.states, pairs)
    return Transferred(
        result,
        [written[name] for name in changes],
        [(sources[i].name, side.states[j].name) for i, j in pairs],
        [*notes, *side.notes, *remarks.lines()],
    )


class _Model:
    """Layers that are written in place."""

    options = True  # eps and decay are attributes of the layers
    notes: tuple[str, ...] = ()

    def __init__(self, model: Any) -> None:
        self.model = model
        self.layers: list[FoundLayer] = find_layers(model)
        self.states = [found.state for found in self.layers]
        in_torch = framework_of(model) == "torch"  # the explicit layer has no momentum
        self.cumulative = in_torch and all(hasattr(f.layer, "momentum") for f in self.layers)

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        put_states([(f, changes[f.name]) for f in self.layers if f.name in changes])
        return self.model


class _Immutable:
    """Trees of arrays, of which a changed copy is made."""

    cumulative = False

    def __init__(self, tree: Any, options: bool) -> None:
        self.tree, self.options = tree, options
        self.states: list[BatchNormState] = tree.states
        self.notes = tuple(tree.notes)

    def write(self, changes: Mapping[str, BatchNormState]) -> Any:
        return self.tree.replaced(changes)


def _open(model: Any) -> _Model | _Immutable:
    if framework_of(model) is not None:
        return _Model(model)
    if "equinox" in sys.modules:
        from batchnorm.tools.frameworks import equinox

        if equinox.owns(model):
            return _Immutable(equinox.Pair(model), options=True)
    if isinstance(model, (tuple, Mapping)):
        from batchnorm.tools.frameworks import trees

        if trees.owns(model):
            return _Immutable(trees.Tree(model), options=False)
    raise TypeError(
        "transfer: source and target must be models or layers of torch, flax nnx or Keras, "
        "variables of linen, or a pair of Haiku or Equinox; a source may also be a checkpoint, its "
        f"path, or states; got {type(model).__name__}."
    )


def _take(source: Any, limit: int, seconds: float) -> tuple[list[BatchNormState], list[str]]:
    """The source's layers, and notes on what looks like one."""
    if isinstance(source, (str, os.PathLike)):
        source = read_checkpoint(source, limit=limit, seconds=seconds)
    if isinstance(source, Checkpoint):
        return source.layers, source.notes
    if isinstance(source, BatchNormState):
        return [source], []
    if isinstance(source, list) and all(isinstance(s, BatchNormState) for s in source):
        return source, []
    side = _open(source)
    return side.states, list(side.notes)


def _complete(state: BatchNormState, eps: float | None, decay: float | None) -> BatchNormState:
    if state.eps is None and eps is not None:
        state = replace(state, eps=eps)
    if state.decay is None and not state.cumulative and decay is not None:
        state = replace(state, decay=decay)
    return state


class _Remarks:
    """Notes, each with the layers that it is about."""

    def __init__(self) -> None:
        self._names: dict[str, list[str]] = {}

    def add(self, what: str, name: str) -> None:
        self._names.setdefault(what, []).append(name or "the layer")

    def lines(self) -> list[str]:
        return [f"{what}: {list_names(names)}" for what, names in self._names.items()]


def _remark(
    remarks: _Remarks, state: BatchNormState, wanted: BatchNormState, side: _Model | _Immutable
) -> None:
    """Say what of a state does not reach its layer as it is meant."""
    name = wanted.name
    if state.var is not None and state.variance != wanted.variance:
        if state.variance is None:
            what = "the source does not say which variance it holds; it was carried as it is"
        else:
            what = (
                f"the {state.variance} variance was carried as it is, where the target keeps the "
                f"{wanted.variance} one; count= converts it"
            )
        remarks.add(what, name)
    for option in ("eps", "decay"):
        value = getattr(state, option)
        if value is None and side.options and not state.cumulative:
            kept = getattr(wanted, option)
            remarks.add(f"the source does not say {option}; the target keeps {kept}", name)
        elif value is not None and not side.options and getattr(wanted, option) is None:
            remarks.add(f"{option}={value:g} is to be set in the target's own module", name)
    if state.cumulative and not side.cumulative:
        remarks.add("the source averages all batches (momentum=None); the target cannot", name)
    if state.renorm is not None and wanted.renorm is None:
        remarks.add("renormalization's statistics were left out; the target has none", name)
    if state.renorm is None and wanted.renorm is not None:
        remarks.add("renormalization's statistics were derived from mean and variance (S11)", name)


def _remark_rest(
    remarks: _Remarks,
    sources: Sequence[BatchNormState],
    targets: Sequence[BatchNormState],
    pairs: Iterable[tuple[int, int]],
) -> None:
    moved, reached = {i for i, _ in pairs}, {j for _, j in pairs}
    for i, state in enumerate(sources):
        if i not in moved:
            remarks.add("not moved, as names says", state.name)
    for j, state in enumerate(targets):
        if j not in reached:
            remarks.add("unchanged in the target, as names says", state.name)


def _differs(wanted: Any, found: Any) -> bool:
    if wanted is None or found is None:
        return False
    return not np.array_equal(wanted, found, equal_nan=True)
