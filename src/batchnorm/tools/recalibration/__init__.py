"""Exact population statistics in place of the moving averages from training."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from batchnorm.core.moments import Moments
from batchnorm.tools.frameworks.adapter import Adapter
from batchnorm.tools.frameworks.records import FoundLayer, Observation
from batchnorm.tools.frameworks.switch import adapter_for
from batchnorm.tools.models import find_layers, put_states
from batchnorm.tools.observe import Batches, Tally, run_watched
from batchnorm.tools.recalibration.report import Recalibrated, Recalibration, Untouched
from batchnorm.tools.state import BatchNormState, FloatArray
from batchnorm.tools.text import list_names, plural

__all__ = ["Recalibrated", "Recalibration", "Untouched", "recalibrate"]

_OWNER = "recalibrate"
_Merged = list[tuple[int, int, Moments]]  # uses, skipped uses, moments of each layer


def recalibrate(
    model: Any,
    batches: Iterable[Any],
    *,
    call: Callable[[Any, Any], Any] | None = None,
    synchronized: bool = False,
    process_group: Any = None,
    progress: bool = True,
) -> Recalibration:
    """Replace the running statistics of a model's batch norms by those of the data.

    Every real row counts the same, whatever the sizes of batches, and sums are in double
    precision. Forward passes are as in training for the batch norms (by the batch's statistics;
    a layer of this library with ghost batches or renormalization uses them) and as in evaluation
    for everything else, such as dropout. Masks are seen however they reach a layer, `padding_mask`
    around the call included. If anything raises, or is interrupted, the model is as before.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module` or Keras model; it changes in place.
        batches: arrays, or mappings of keyword arguments (Keras: a mapping is one input); with
            `call` anything. Use batches at least as large as in training.
        call: function of the model that it is given and a batch, like
            `lambda model, batch: model(batch[0], mask=batch[1])`.
        synchronized: count the batches of all ranks of torch.distributed. All ranks call this,
            each with its own batches. Without torch.distributed, or with one rank, the same as
            False.
        process_group: the ranks; None for the default group.
        progress: show a bar where rich is installed and standard error is a terminal.

    Returns:
        The layers that changed, and those that kept their statistics, with the reason (frozen,
        without running statistics, or never used). A channel without a finite row keeps its old
        values.

    Raises:
        TypeError: not a model, or batches that need `call`.
        ValueError: a model without batch norms; no batch; no batch norm ran; synchronized=True
            without torch; a Keras model that runs its layers in a graph.
        SynchronizationError: another rank failed; no rank's model has changed.

    Source: S2, S9, S10, S14; Wu and Johnson 2021 (arXiv 2105.07576), section 3.2. Each layer gets
    its own kind of variance, biased or unbiased (S10). Renormalization's statistics are derived
    from the new ones (S11). torch's `num_batches_tracked` becomes the number of calls, so that a
    cumulative average goes on from there; momentum stays.

    >>> import torch
    >>> layer = torch.nn.BatchNorm1d(1)
    >>> batches = [torch.tensor([[1.0], [3.0]]), torch.tensor([[5.0], [7.0], [9.0]])]
    >>> recalibrate(layer, batches, progress=False).batches
    2
    >>> layer.running_mean, layer.running_var  # of all five rows
    (tensor([5.]), tensor([10.]))
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError(
            f"{_OWNER}: model must hold a batch norm; {type(model).__name__} has none."
        )
    adapter = adapter_for(layers[0].framework)
    chosen, kept = _choose(layers, adapter)
    merge = _find_merge(adapter, synchronized, process_group)
    given = Batches(_OWNER, batches, call, "recalibrating" if progress else None)
    tallies = {found.name: Tally() for found in chosen}

    def see(observation: Observation) -> None:
        tallies[observation.layer.name].add(observation.moments())

    count, merged = merge(lambda: run_watched(adapter, model, chosen, given, see), chosen, tallies)
    unused = {found.name for found, (uses, *_) in zip(chosen, merged, strict=True) if not uses}
    if len(unused) == len(chosen):
        raise ValueError(
            f"{_OWNER}: no batch norm ran. The function `call` must run the model that it is "
            "given, which may be a copy."
        )
    used = [pair for pair in zip(chosen, merged, strict=True) if pair[0].name not in unused]
    changed = _write(used)
    kept |= dict.fromkeys(unused, "no batch reached it")
    order = (found.name for found in layers if found.name in kept)
    return Recalibration(count, changed, tuple(Untouched(name, kept[name]) for name in order))


def _choose(layers: list[FoundLayer], adapter: Adapter) -> tuple[list[FoundLayer], dict[str, str]]:
    """The layers to recalibrate, and the others with the reason for keeping their statistics."""
    kept = {found.name: reason for found in layers if (reason := _refuse(found, adapter))}
    chosen = [found for found in layers if found.name not in kept]
    if not chosen:
        by_reason: dict[str, list[str]] = {}
        for name, reason in kept.items():
            by_reason.setdefault(reason, []).append(name or "the layer")
        listed = [f"{list_names(names)} {reason}" for reason, names in by_reason.items()]
        raise ValueError(
            f"{_OWNER}: none of {plural(len(kept), 'batch norm')} has statistics to set: "
            f"{list_names(listed, 3, '; ')}."
        )
    return chosen, kept


def _refuse(found: FoundLayer, adapter: Adapter) -> str | None:
    if found.state.mean is None:
        return "keeps no running statistics"
    return adapter.refuse_update(found.layer)


def _find_merge(
    adapter: Adapter, synchronized: bool, process_group: Any
) -> Callable[[Callable[[], int], Sequence[FoundLayer], dict[str, Tally]], tuple[int, _Merged]]:
    """The function that runs the model and merges its moments: alone, or with other ranks."""
    if not synchronized:
        if process_group is not None:
            raise ValueError(
                f"{_OWNER}: process_group needs synchronized=True; got synchronized=False."
            )
        return _run_alone
    if not adapter.runs_on_torch():
        raise ValueError(
            f"{_OWNER}: synchronized=True takes models that run on torch, whose ranks have "
            f"batches of their own; got a model of {adapter.name}. In JAX, feed arrays that "
            "are sharded over the devices."
        )
    from batchnorm.tools.recalibration.ranks import find_ranks

    peers = find_ranks(process_group)
    return _run_alone if peers is None else _RunTogether(peers)


def _run_alone(
    run: Callable[[], int], layers: Sequence[FoundLayer], tallies: dict[str, Tally]
) -> tuple[int, _Merged]:
    return run(), [_summary(found, tallies[found.name]) for found in layers]


@dataclass(frozen=True)
class _RunTogether:
    """As `_run_alone`, with all ranks' batches; a rank that fails tells the others."""

    peers: Any

    def __call__(
        self, run: Callable[[], int], layers: Sequence[FoundLayer], tallies: dict[str, Tally]
    ) -> tuple[int, _Merged]:
        from batchnorm.tools.recalibration import ranks

        names = [found.name for found in layers]
        device = ranks.device_of(layers[0].layer)
        try:
            count = run()
        except Exception:
            sizes = [found.state.channels for found in layers]
            ranks.report_failure(_OWNER, self.peers, names, sizes, device)
            raise
        local = [_summary(found, tallies[found.name]) for found in layers]
        return count, ranks.merge_over_ranks(_OWNER, self.peers, names, local, device)


def _summary(found: FoundLayer, tally: Tally) -> tuple[int, int, Moments]:
    nothing = np.zeros(found.state.channels)
    moments = tally.moments or Moments(nothing, nothing, nothing)
    return tally.uses, tally.skipped, moments


def _write(found: Sequence[tuple[FoundLayer, tuple[int, int, Moments]]]) -> tuple[Any, ...]:
    """Put the statistics in place, in all layers or in none."""
    states = [_with_moments(layer.state, moments, uses) for layer, (uses, _, moments) in found]
    put_states([(layer, state) for (layer, _), state in zip(found, states, strict=True)])
    changed = []
    for (layer, (uses, skipped, moments)), state in zip(found, states, strict=True):
        rows, shift = int(moments.count.max(initial=0)), _shift(layer.state, state)
        changed.append(Recalibrated(layer.name, rows, uses, skipped, shift))
    return tuple(changed)


def _with_moments(state: BatchNormState, moments: Moments, uses: int) -> BatchNormState:
    """The state with new statistics in channels with a row (S6), of its kind of variance (S10)."""
    assert state.mean is not None
    assert state.var is not None
    count = moments.count
    var = moments.var
    if state.variance == "unbiased":
        var = np.where(count > 1, var * count / np.maximum(count - 1, 1), var)
    return replace(
        state,
        mean=np.where(count > 0, moments.mean, state.mean),
        var=np.where(count > 0, var, state.var),
        steps=None if state.steps is None else uses,
        renorm=None,  # the layer derives it from the above
    )


def _shift(before: BatchNormState, after: BatchNormState) -> float:
    old, new, var = (np.asarray(a, np.float64) for a in (before.mean, after.mean, after.var))
    with np.errstate(all="ignore"):
        shift: FloatArray = np.abs(new - old) / np.sqrt(var + (before.eps or 0.0))
    return float(np.nanmax(shift, initial=0.0))
