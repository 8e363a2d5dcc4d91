"""The transfer of batch norms from one model, library or file into another."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS
from batchnorm.tools.conventions import Count, convert_variance, count_of
from batchnorm.tools.fitting import check_number, fit
from batchnorm.tools.sides import open_side, read_source
from batchnorm.tools.stacking import unstack
from batchnorm.tools.state import BatchNormState
from batchnorm.tools.transferring.matching import Names, match
from batchnorm.tools.transferring.remarks import Remarks, remark, remark_rest, remark_rounding

__all__ = ["Transferred", "transfer"]

_OWNER = "transfer"


@dataclass(frozen=True, eq=False)
class Transferred:
    """The result of `transfer`.

    Args:
        target: the target that was given, if it is a model, which has been changed in place; a
            new one, if it is a tree of arrays; None if none was given.
        states: the states of the layers that were written, as they are now; without a target
            the source's states.
        pairs: names of source and target for each of them.
        notes: values that are not exact or were not carried over, with the layers concerned; and
            arrays of a file or a tree that look like a layer, but are none.
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
    """Write the batch norms of one model into another, of the same library or another one.

    Momentum, epsilon and the kind of variance are converted (S9, S10). Nothing is changed unless
    everything fits.

    Args:
        source: a model or layer of torch, flax nnx or Keras, theirs or ours; a state dict of
            torch; a state of nnx; linen's variables; Haiku's `(params, state)`; Equinox's
            `(model, state)`; the path of a checkpoint; a `Checkpoint`; or `BatchNormState`s.
        target: a model or layer, which is written in place; or a state dict, a state of nnx,
            linen's variables, Haiku's or Equinox's pair, of which the result holds a new one. None
            only reads the source.
        names: target name for each source name, as a map or a function; only these layers are
            moved. Without it all layers are, by equal names (but for case and separators), else
            by order, if both sides have the same channels in the same order.
        count: values per channel in a training batch, N·H·W for images: torch stores the
            unbiased variance, the others the biased one, and their ratio depends on it. An int,
            or a map by the source's names or a function of the state where layers differ.
            Without it the variance is copied unchanged, and a note says so.
        eps: for layers whose source does not say it, as in most checkpoints.
        decay: weight of the old value in the running statistics, for such layers.
        limit: most bytes to read of a checkpoint, as in `read_checkpoint`.
        seconds: most seconds to read one for.

    Returns:
        The target and its new states; read the `notes`.

    Raises:
        TypeError: source or target is of a type that holds no batch norms.
        ValueError: layers do not match, or a state does not fit its layer: other channels, or no
            place for a gamma that matters. The target is unchanged.
        CheckpointError: the checkpoint cannot be read.

    >>> import torch
    >>> from batchnorm.torch import BatchNorm
    >>> old, new = torch.nn.BatchNorm1d(3, momentum=0.25), BatchNorm(3)
    >>> transfer(old, new).pairs, new.momentum
    ([('', '')], 0.25)
    """
    check_number(_OWNER, "eps", eps)
    check_number(_OWNER, "decay", decay, 1.0)
    found, notes = read_source(_OWNER, source, limit, seconds)
    sources = [_complete(state, eps, decay) for state in found]
    if target is None:
        return Transferred(None, sources, notes=notes)
    side = open_side(_OWNER, target)
    if not sources or not side.states:
        which = "target" if sources else "source"
        raise ValueError(f"{_OWNER}: the {which} has no batch norm.")
    if names is None:
        sources = unstack(sources, side.states)
    pairs = match(sources, side.states, names)
    remarks = Remarks()
    changes = {}
    for i, j in pairs:
        wanted = side.states[j]
        state = convert_variance(sources[i], wanted.variance, count_of(sources[i], count))
        remark(remarks, state, wanted, side)
        moved = replace(state, name=wanted.name)
        fit(moved, wanted)
        changes[wanted.name] = moved
    result = side.write(changes)
    written = {state.name: state for state in open_side(_OWNER, result).states}
    remark_rounding(remarks, changes, written)
    remark_rest(remarks, sources, side.states, pairs)
    return Transferred(
        result,
        [written[name] for name in changes],
        [(sources[i].name, side.states[j].name) for i, j in pairs],
        [*notes, *side.notes, *remarks.lines()],
    )


def _complete(state: BatchNormState, eps: float | None, decay: float | None) -> BatchNormState:
    if state.eps is None and eps is not None:
        state = replace(state, eps=eps)
    if state.decay is None and not state.cumulative and decay is not None:
        state = replace(state, decay=decay)
    return state
