"""The inspection of the batch norms of a model or a file."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS, read_checkpoint
from batchnorm.tools.frameworks.records import FoundLayer
from batchnorm.tools.frameworks.switch import adapter_for
from batchnorm.tools.inspection.findings import Finding
from batchnorm.tools.inspection.health import judge
from batchnorm.tools.inspection.leaks import Leaks, find_leaks
from batchnorm.tools.inspection.quantities import Observed, derive
from batchnorm.tools.inspection.records import LayerReport
from batchnorm.tools.inspection.report import Report
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.inspection.watch import Mask, Watch, note_leaks
from batchnorm.tools.models import find_layers
from batchnorm.tools.observe import Batches, run_watched
from batchnorm.tools.state import BatchNormState

__all__ = ["Finding", "LayerReport", "Report", "Thresholds", "inspect"]

_OWNER = "inspect"


def inspect(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    mask: Mask | None = None,
    leaks: bool = False,
    thresholds: Thresholds | None = None,
    progress: bool = True,
    limit: int = DEFAULT_LIMIT,
    seconds: float = DEFAULT_SECONDS,
) -> Report:
    """Look at every batch norm of a model or of a checkpoint.

    From the state alone: values that are not finite, negative variances, statistics that were
    never trained or are kept in half precision, dead channels, gains that explode. With batches:
    how far evaluation moves the normalized values from those of training, and what the statistics
    would be if padding were counted.

    With batches, the batch norms run as in training, by the statistics of each batch, and all
    else (dropout) as in evaluation. So the drift of a layer is its own: the layers before it add
    nothing. The model is unchanged afterwards.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module` or Keras model; or the path of a checkpoint.
        batches: arrays, or mappings of keyword arguments (Keras: a mapping is one input); with
            `call` anything. A few batches of training data do.
        call: function of the model that it is given and a batch, like
            `lambda model, batch: model(batch[0], mask=batch[1])`.
        mask: function of a batch that returns its mask (S1). It is for layers that the model
            calls without a mask, to tell which rows they count by mistake; the model does not
            get it.
        leaks: search for layers through which padding reaches real positions, on the first batch,
            as `find_leaks` does; needs `mask`, which must be the mask that the batch holds, if it
            holds one.
        thresholds: limits beyond which a number becomes a finding; None for the defaults.
        progress: show a bar where rich is installed and standard error is a terminal.
        limit: most bytes to read of a checkpoint, as in `read_checkpoint`.
        seconds: most seconds to read one for.

    Returns:
        The findings for each layer; `print` it, or use `to_json`, `save_html`, or rich.

    Raises:
        TypeError: not a model, or batches that need `call`.
        ValueError: a checkpoint with batches; no batch; a Keras model that runs its layers in a
            graph; `leaks` without batches and a mask, or what `find_leaks` raises.
        CheckpointError: a ValueError; the file cannot be read.

    Source: S1, S2, S10, S14.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4))
    >>> report = inspect(model)  # or a checkpoint's path; with batches it measures drift
    >>> report.ok, report.layers[0].findings[0].code
    (False, 'never-trained')
    """
    limits = thresholds or Thresholds()
    if isinstance(model, (str, os.PathLike)):
        if batches is not None:
            raise ValueError(
                f"{_OWNER}: a checkpoint cannot run batches; got {os.fspath(model)!r} with "
                "batches. Load it into its model, and inspect that."
            )
        return _inspect_file(model, limits, limit, seconds)
    layers = find_layers(model)
    source = type(model).__name__
    if batches is None:
        if call is not None or mask is not None or leaks:
            raise ValueError(f"{_OWNER}: call, mask and leaks are for batches; got no batches.")
        return Report(source, tuple(_report(found.state, limits) for found in layers), limits)
    found_leaks = None
    if leaks:
        found_leaks, batches = _search(model, batches, call, mask)
    watch = Watch(mask)
    if found_leaks is not None:
        note_leaks(watch, found_leaks)
    given = Batches(_OWNER, batches, call, "inspecting" if progress else None)
    count = _run(model, layers, given, watch) if layers else 0
    reports = [
        _report(found.state, limits, watch.observed(found.name), watch.notes(found.name))
        for found in layers
    ]
    return Report(source, tuple(reports), limits, count, leaks=found_leaks)


def _search(
    model: Any,
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None,
    mask: Mask | None,
) -> tuple[Leaks, Iterable[Any]]:
    """The leaks that the first batch shows, and all batches."""
    if mask is None:
        raise ValueError(f"{_OWNER}: leaks needs mask, a function of a batch; got none.")
    rest = iter(batches)
    first = next(rest, None)
    if first is None:
        raise ValueError(f"{_OWNER}: batches must yield at least one batch; it was empty.")
    run = None if call is None else lambda model, batch, _: call(model, batch)
    return find_leaks(model, first, mask(first), run=run), itertools.chain([first], rest)


def _inspect_file(
    path: str | os.PathLike[str], limits: Thresholds, limit: int, seconds: float
) -> Report:
    found = read_checkpoint(path, limit=limit, seconds=seconds)
    layers = tuple(_report(state, limits) for state in found.layers)
    source = "standard input" if path == "-" else os.fspath(path)
    return Report(source, layers, limits, notes=tuple(found.notes))


def _report(
    state: BatchNormState,
    limits: Thresholds,
    observed: Observed | None = None,
    notes: Sequence[Finding] = (),
) -> LayerReport:
    quantities = derive(state, limits.eps, observed)
    findings = (*judge(state, quantities, observed, limits), *notes)
    return LayerReport(state, quantities, findings, observed)


def _run(model: Any, layers: Sequence[FoundLayer], batches: Batches, watch: Watch) -> int:
    """Show every batch to the model, and the inputs of its layers to `watch`."""
    adapter = adapter_for(layers[0].framework)
    chosen = []
    for found in layers:
        reason = adapter.refuse_update(found.layer)
        if reason is not None:
            watch.note(found.name, "frozen", f"it {reason.partition(';')[0]}")
        elif found.state.mean is not None:
            chosen.append(found)
    count = run_watched(adapter, model, chosen, batches, watch.see, watch.take)
    for found in chosen:
        if watch.observed(found.name) is None:
            watch.note(found.name, "unused", "no batch reached it")
    return count
