"""What the batch norms of a model or a file are, and what is wrong with them."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from batchnorm.core.layout import make_layout
from batchnorm.core.moments import Moments
from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS, read_checkpoint
from batchnorm.tools.health import Finding, Thresholds, judge
from batchnorm.tools.models import FoundLayer, find_layers
from batchnorm.tools.observe import Observation, Tally, observe, run_batch
from batchnorm.tools.progress import track
from batchnorm.tools.quantities import Observed, derive
from batchnorm.tools.report import LayerReport, Report
from batchnorm.tools.state import BatchNormState

__all__ = ["inspect"]

_OWNER = "inspect"
Mask = Callable[[Any], Any]


def inspect(
    model: Any,
    batches: Iterable[Any] | None = None,
    *,
    call: Callable[[Any, Any], Any] | None = None,
    mask: Mask | None = None,
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
    else (dropout) as in evaluation; so the drift of a layer is its own and not that of the layers
    before it. The model is unchanged afterwards.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module` or Keras model; or the path of a checkpoint.
        batches: arrays, or mappings of keyword arguments (Keras: a mapping is one input); with
            `call` anything. A few batches of training data do.
        call: function of the model that it is given and a batch, like
            `lambda model, batch: model(batch[0], mask=batch[1])`.
        mask: function of a batch that returns its mask (S1), for layers that are not given one:
            what they make of padding is what one wants to know. It does not reach the model.
        thresholds: where a number becomes a finding; None for the defaults.
        progress: show a bar where rich is installed and standard error is a terminal.
        limit, seconds: bytes and time that a checkpoint may take, as in `read_checkpoint`.

    Returns:
        The findings for each layer; `print` it, or use `to_json`, `save_html`, or rich.

    Raises:
        TypeError: not a model, or batches that need `call`.
        ValueError: a checkpoint with batches; no batch; a Keras model that runs its layers in a
            graph.
        CheckpointError: a ValueError; the file cannot be read.

    Source: S1, S2, S10, S14.
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
        if call is not None or mask is not None:
            raise ValueError(
                f"{_OWNER}: call and mask say what to do with batches; got none of them."
            )
        return Report(source, tuple(_report(found.state, limits) for found in layers), limits)
    watch = _Watch(mask)
    count = _run(model, layers, batches, call, watch, progress) if layers else 0
    reports = [
        _report(found.state, limits, watch.observed(found.name), watch.notes(found.name))
        for found in layers
    ]
    return Report(source, tuple(reports), limits, count)


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


def _run(
    model: Any,
    layers: Sequence[FoundLayer],
    batches: Iterable[Any],
    call: Callable[[Any, Any], Any] | None,
    watch: _Watch,
    progress: bool,
) -> int:
    """Show every batch to the model, and what its layers are given to `watch`."""
    rehearsals = importlib.import_module(f"batchnorm.tools.rehearsals.{layers[0].framework}")
    chosen = []
    for found in layers:
        reason = rehearsals.why_frozen(found.layer)
        if reason is not None:
            watch.note(found.name, "frozen", f"it {reason.partition(';')[0]}")
        elif found.state.mean is not None:
            chosen.append(found)
    count = 0
    with rehearsals.rehearse(model, chosen) as (actor, actors), observe(actors, watch.see):
        for batch in track(batches, "inspecting", progress):
            watch.take(batch)
            run_batch(_OWNER, actor, batch, call)
            count += 1
    if not count:
        raise ValueError(f"{_OWNER}: batches must yield at least one batch; it was empty.")
    for found in chosen:
        if watch.observed(found.name) is None:
            watch.note(found.name, "unused", "no batch reached it")
    return count


class _Watch:
    """What every layer was given, and what there is to say of it."""

    def __init__(self, mask: Mask | None) -> None:
        self._make_mask = mask
        self._mask: Any = None
        self._seen: dict[str, _Seen] = {}
        self._notes: dict[str, list[Finding]] = {}

    def take(self, batch: Any) -> None:
        """Of the batch that comes next, its mask."""
        if self._make_mask is not None:
            self._mask = np.asarray(self._make_mask(batch)) != 0

    def see(self, observation: Observation) -> None:
        """One call of a layer."""
        name = observation.layer.name
        if observation.mask is None and self._mask is not None:
            observation = self._add_mask(observation)
        self._seen.setdefault(name, _Seen()).add(observation)

    def note(self, name: str, code: str, message: str) -> None:
        """Keep something to say of a layer, once."""
        notes = self._notes.setdefault(name, [])
        if all(finding.code != code for finding in notes):
            notes.append(Finding(code, "note", message))

    def notes(self, name: str) -> Sequence[Finding]:
        """What is to be said of a layer."""
        return self._notes.get(name, ())

    def observed(self, name: str) -> Observed | None:
        """What a layer was given, or None if it did not run."""
        seen = self._seen.get(name)
        return None if seen is None else seen.summarize()

    def _add_mask(self, observation: Observation) -> Observation:
        shape = tuple(observation.x.shape)
        layout = make_layout(_OWNER, shape, observation.axes)
        try:
            sizes = layout.mask_shape(self._mask.shape, _OWNER)
        except ValueError:
            shapes = f"mask {self._mask.shape}, input {shape}"
            self.note(observation.layer.name, "unfit-mask", shapes)
            return observation
        mask = self._mask.reshape(sizes)
        if observation.layer.framework == "torch":
            import torch

            mask = torch.from_numpy(mask).to(observation.x.device)
        return replace(observation, mask=mask)


class _Seen:
    """Of one layer, the moments of what it was given, with padding and without."""

    def __init__(self) -> None:
        self._real, self._everything = Tally(), Tally()
        self._masked = False
        self._rows = self._all_rows = 0.0

    def add(self, observation: Observation) -> None:
        """Take in one call."""
        moments = observation.moments()
        everything = moments
        if observation.mask is not None:
            self._masked = True
            everything = observation.moments(padded=True)
        self._real.add(moments)
        self._everything.add(everything)
        self._rows += _most(moments)
        self._all_rows += _most(everything)

    def summarize(self) -> Observed:
        """All calls together."""
        assert self._real.moments is not None
        return Observed(
            self._real.moments,
            self._everything.moments if self._masked else None,
            rows=self._rows,
            padded_rows=self._all_rows - self._rows,
            calls=self._real.uses,
            skipped=self._real.skipped,
        )


def _most(moments: Moments) -> float:
    return float(np.max(moments.count, initial=0.0))
