"""Models that share an architecture, merged with statistics as of all their data."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS, Checkpoint
from batchnorm.tools.merging.counts import Counts, check_counts, check_one_for_all
from batchnorm.tools.merging.layers import align, check_same, check_values
from batchnorm.tools.merging.others import average_others
from batchnorm.tools.merging.states import MergedLayer, merge_states
from batchnorm.tools.sides import NamedArrays, is_states, open_side, read_source
from batchnorm.tools.stacking import unstack
from batchnorm.tools.state import BatchNormState

__all__ = ["Counts", "MergedLayer", "merge", "merge_layers"]

_OWNER = "merge"


@names_errors(_OWNER)
def merge(
    models_or_states: Sequence[Any],
    counts: Counts = None,
    *,
    everything: bool = False,
    report: list[MergedLayer] | None = None,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> Any:
    """Merge models of one architecture: federated clients, averaged checkpoints, ranks.

    Running means are averaged by count. Running variances are averaged together with the squared
    distances of the means, which a plain average of variances misses, so that the result
    describes all the data together. Gamma and beta are averaged by the same weights, and counters
    of steps are summed.

    Args:
        models_or_states: two or more of the same layers, each in any of these forms: a model or
            layer of torch, flax nnx or Keras, theirs or ours; a state dict of torch; a state of
            nnx; linen's variables; Haiku's `(params, state)`; Equinox's `(model, state)`; the path
            of a checkpoint or a `Checkpoint`; a `BatchNormState` or a list of them.
        counts: one number for each model: the rows that its statistics are over, N·H·W of all
            images. A number of samples weighs the same where every sample has as many rows. Or a
            map from every layer's name (the first model's) to such numbers. A model with count 0
            weighs nothing. None weighs all models the same.
        everything: average all other arrays as well, by the same weights, in float64. Without it
            they are the first model's.
        report: a list, to which a `MergedLayer` for each layer is appended.
        limit: most bytes to read of a checkpoint, as in `read_checkpoint`.
        seconds: most seconds to read one for.

    Returns:
        A new model, layer, state dict or tree of the first one's kind and types, with its options;
        the inputs are unchanged. A `BatchNormState` if the first is one; a list of them if it is
        such a list, a checkpoint or a path. A Keras model is not compiled.

    Raises:
        TypeError: what cannot be merged, or no sequence; counts that are no numbers.
        ValueError: fewer than two; no batch norm; layers of other names, shapes or eps, with and
            without renormalization, gamma, beta or statistics; statistics that are not finite,
            negative variances; counts that do not fit. With `everything`: other arrays, integers
            that differ, values that are not finite. Nothing has been made then.
        CheckpointError: a checkpoint cannot be read.

    Warns of arrays that look like a batch norm, but cannot be read as one: they are not merged.

    Arithmetic is in float64 and rounded once. torch's unbiased variances are made biased first
    and unbiased afterwards where counts are given (S10), exactly if these are rows; with numbers
    of samples the factor n/(n - 1) is off by up to one part in the smallest n. Without counts
    variances merge as they are. Renormalization's deviations merge by their squares (S11). The
    statistics of Haiku and Equinox count as settled, as after `transfer`.

    Source: S22; Chan, Golub and LeVeque 1983.

    >>> import torch
    >>> clients = [torch.nn.BatchNorm1d(1), torch.nn.BatchNorm1d(1)]
    >>> for client, mean in zip(clients, (-3.0, 3.0)):
    ...     _ = client.running_mean.fill_(mean)
    >>> merge(clients).running_var  # 1 + 3², where an average of variances would say 1
    tensor([10.])
    """
    models = _check_models(models_or_states)
    if report is not None and not isinstance(report, list):
        raise ArgumentTypeError(f"report must be a list; got {type(report).__name__}.")
    first = models[0]
    found = [read_source(_OWNER, model, limit, seconds) for model in models]
    states, layers, _ = merge_layers([layers for layers, _ in found], counts)
    for number, (_, notes) in enumerate(found):
        for note in notes:
            warnings.warn(f"{_OWNER}: model {number}: {note}", stacklevel=3)
    others: NamedArrays = ()
    if everything:
        weights = check_one_for_all(counts, len(models))
        others = average_others([_others_of(model) for model in models], weights)
    if isinstance(first, BatchNormState):
        merged: Any = states[0]
    elif _has_states_alone(first):
        merged = states
    else:
        merged = open_side(_OWNER, first).copied({s.name: s for s in states}, others)
    if report is not None:
        report += layers
    return merged


def merge_layers(
    models: Sequence[Sequence[BatchNormState]], counts: Counts
) -> tuple[list[BatchNormState], list[MergedLayer], list[float | None]]:
    """The merged states of all layers, their report, and the rows behind them where known.

    Args:
        models: the states of each model's layers; more than one model.
        counts: as in `merge`.

    Raises:
        ArgumentValueError: they do not belong together.
    """
    for number, model in enumerate(models):
        if not model:
            raise ArgumentValueError(
                f"every model must have a batch norm; model {number} has none."
            )
    first = models[0]
    layers = align([first, *(unstack(model, first) for model in models[1:])])
    rows = check_counts(counts, len(models), [state.name for state in first])
    for states in layers:
        check_same(states, rows is not None)
        check_values(states, None if rows is None else rows[states[0].name])
    pairs = [merge_states(s, None if rows is None else rows[s[0].name]) for s in layers]
    totals = [None if rows is None else float(rows[s[0].name].sum()) for s in layers]
    return [state for state, _ in pairs], [layer for _, layer in pairs], totals


def _check_models(given: Any) -> Sequence[Any]:
    if isinstance(given, str) or not isinstance(given, Sequence):
        raise ArgumentTypeError(
            f"models_or_states must be a list or tuple of them; got {type(given).__name__}."
        )
    if len(given) < 2:
        raise ArgumentValueError(f"models_or_states must hold two or more; got {len(given)}.")
    return given


def _has_states_alone(model: Any) -> bool:
    """True for a source of states that nothing can be written into."""
    kinds = (str, os.PathLike, Checkpoint, BatchNormState)
    return is_states(model) or isinstance(model, kinds)


def _others_of(model: Any) -> NamedArrays:
    if _has_states_alone(model):
        raise ArgumentValueError(
            "everything=True needs models, state dicts or trees, since checkpoints are read for "
            "their batch norms alone here; merge_checkpoints and `batchnorm merge --all` merge all "
            f"arrays of files; got {type(model).__name__}."
        )
    return open_side(_OWNER, model).others()
