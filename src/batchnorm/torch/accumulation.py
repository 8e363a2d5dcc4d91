"""Several forward passes of a model as one step of its running statistics (S21)."""

from __future__ import annotations

import itertools
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from batchnorm.core.accumulate import average_of_step, contribution, merge_passes
from batchnorm.core.conversion import describe_foreign
from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    names_errors,
    naming,
)
from batchnorm.core.merge import Parts
from batchnorm.core.running import BatchAverage, Running, update_running
from batchnorm.torch.buffers import RunningStatistics
from batchnorm.torch.call import Call
from batchnorm.torch.devices import has_float64
from batchnorm.torch.keeping import keeps_statistics
from batchnorm.torch.namespace import XP
from batchnorm.torch.options import find_options
from batchnorm.torch.private import BatchNormBase, constant_in_graphs, find_transformation
from batchnorm.torch.recompute import in_backward
from batchnorm.torch.rollback import write_all
from batchnorm.torch.tracing import uncaptured

__all__ = ["accumulate_statistics"]

_keys = itertools.count()


@dataclass
class Accumulation:
    """The passes of a layer inside a block.

    Attributes:
        layer: the layer.
        running: its statistics when the block began.
        parts: the moments of all passes so far, per channel, in double precision where the device
            has it.
        work: the type in which a moment must be finite (S9).
    """

    layer: Any
    running: Running
    parts: Parts | None = None
    work: torch.dtype = torch.float32
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def pooled(self) -> bool:
        """True if moments are averages of ghost groups."""
        return self.layer.virtual_batch_size is not None

    def add(self, parts: Parts, work: torch.dtype) -> None:
        """Count a pass."""
        parts = Parts(*(a.to(self.running.mean.device) for a in parts))
        with self.lock:
            every = [parts] if self.parts is None else [self.parts, parts]
            stacked = Parts(*(torch.stack(column) for column in zip(*every, strict=True)))
            self.parts, self.work = merge_passes(stacked, self.pooled, XP), work

    def moved(self) -> list[tuple[Tensor, Tensor]]:
        """Each statistic with its value after the step; none if there was no pass."""
        if self.parts is None:
            return []
        _check_own(self.layer.running_mean, self.running.mean)
        parts = _poisoned(self.parts, self.work)
        average = average_of_step(parts, self.pooled, XP)
        wide = self.running.map(lambda a: a.to(parts.power.dtype))
        axes = tuple(range(parts.power.dim()))
        options = find_options(self.layer, self.layer.padded_output)
        after = update_running(wide, average, options, axes, XP)
        pairs = zip(self.running, after, strict=True)
        return [(old, new.to(old.dtype)) for old, new in pairs if old is not None]


_open: dict[int, Accumulation] = {}


@contextmanager
def accumulate_statistics(model: nn.Module) -> Iterator[None]:
    """Count all forward passes of `model` inside the block as one step of its running statistics.

    Each pass is normalized by its own moments. At the end of the block the running statistics
    move once, by the moments of all passes together, as if their real rows had been one batch, and
    `num_batches_tracked` rises by one: for gradient accumulation, pipelines of micro-batches, and
    batches of any other kind of parts. Passes may have masks, come in any order and from any
    thread; of synchronized layers each counts with the moments of all ranks. With ghost batches the
    averages of the groups are averaged. Renormalization compares every pass with the statistics
    from before the block; with activation checkpointing, call backward at least after 16 passes.
    If the block raises, nothing moves.

    Args:
        model: or one layer; its layers of this library that keep running statistics.

    Memory: five numbers for each channel, whatever the number of passes.

    Raises:
        TypeError: `model` is no module.
        ValueError: it has no layer of this library that keeps running statistics.
        RuntimeError: a layer is in such a block already; its statistics are replaced inside, or an
            eager pass gets others (`torch.func.functional_call`); torch.export inside the block.

    Source: S21; Chan, Golub and LeVeque 1983, equation 2.1b.

    >>> from batchnorm.torch import BatchNorm
    >>> layer, x = BatchNorm(1, momentum=1.0), torch.tensor([[1.0], [3.0], [5.0], [7.0]])
    >>> with accumulate_statistics(layer):
    ...     y = layer(x[:2]), layer(x[2:])
    >>> layer.running_mean.item(), layer.num_batches_tracked.item()
    (4.0, 1)
    """
    layers = _open_all(model)
    try:
        yield
        with torch.no_grad(), naming("accumulate_statistics"):
            write_all(pair for layer in layers for pair in _open[layer._pending].moved())
    finally:
        for layer in layers:
            del _open[layer._pending]
            del layer._pending, layer._traced_pending


@names_errors("accumulate_statistics")
def _open_all(model: Any) -> list[Any]:
    if torch.compiler.is_compiling():
        raise ArgumentRuntimeError("the block must be opened outside of compiled code.")
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(f"model must be a torch.nn.Module; got {type(model).__name__}.")
    layers, foreign = _find_layers(model)
    if not layers:
        raise ArgumentValueError(
            f"{type(model).__name__} has no layer of this library that keeps running statistics. "
            "batchnorm.torch.convert_batchnorm(model) changes torch's layers over."
        )
    twice = [name for name, layer in layers.items() if layer._pending is not None]
    if twice:
        raise ArgumentRuntimeError(
            f"{', '.join(twice[:3])} {'is' if len(twice) == 1 else 'are'} inside such a block "
            "already. Open one block around all passes of a step."
        )
    if foreign:
        warnings.warn(
            f"accumulate_statistics: {describe_foreign(foreign, 'torch')}",
            stacklevel=5,  # the `with` statement
        )
    for layer in layers.values():
        layer._pending = next(_keys)
        layer.__dict__["_traced_pending"] = torch.tensor(layer._pending)
        _open[layer._pending] = Accumulation(layer, layer._running())
    return list(layers.values())


def _find_layers(model: nn.Module) -> tuple[dict[str, Any], list[str]]:
    """This library's layers with running statistics by name, and the names of torch's own."""
    layers, foreign = {}, []
    for name, module in model.named_modules():
        if not isinstance(module, BatchNormBase) or module.running_mean is None:
            continue
        if isinstance(module, RunningStatistics):
            layers[name or type(module).__name__] = module
        elif module.track_running_stats:
            foreign.append(name or type(module).__name__)
    return layers, foreign


def leaves_statistics(call: Call, average: BatchAverage) -> Tensor | Literal[True] | None:
    """A flag: True if this pass, whose moments are given, does not move the statistics itself.

    It is recomputed, or one of several passes of a step, to which its moments are added here. In
    traced code a 0-d boolean tensor, known when the graph runs; None: it moves them.
    """
    key, running = call.settings.pending, call.tensors.running
    if key is None:
        return call.again
    assert running is not None
    parts = _contribution(call, average)
    if isinstance(key, Tensor):
        stacked = torch.stack(list(parts))
        return _note_pass(call.tensors.x.detach(), stacked, key, _number(), call.working_type)
    found = _open.get(key)
    if found is None or call.again is True:
        return call.again
    _check_own(running.mean, found.running.mean)
    if find_transformation() is not None:
        raise ArgumentRuntimeError(
            "a function that torch.func transforms cannot add to a step of several passes. Open "
            "keep_statistics inside it, or transform it outside of accumulate_statistics."
        )
    found.add(parts, call.working_type)
    return True


def _contribution(call: Call, average: BatchAverage) -> Parts:
    """The moments of a pass, per channel; NaN where one is not finite in the working type (S9)."""
    if torch.compiler.is_exporting():
        raise ArgumentRuntimeError(
            "an exported program cannot be part of a step of several passes. Export outside of "
            "accumulate_statistics."
        )
    options, channels = call.options, call.layout.channels
    centred = average.centred._replace(deviation=average.centred.power)
    wide = average._replace(
        centred=centred.map(_widen), count=_widen(average.count), weight=_widen(average.weight)
    )
    unbiased = options.unbiased and options.renorm is None
    found = contribution(wide, call.layout.groups is not None, unbiased, XP)
    return _poisoned(Parts(*(a.reshape(channels) for a in found)), call.working_type)


def _widen(a: Tensor) -> Tensor:
    """In float64; where the device has none, a mean stays the sum of two float32."""
    return a.detach().double() if has_float64(a.device) else a.detach()


def _poisoned(parts: Parts, work: torch.dtype) -> Parts:
    mean, var = parts.anchor + parts.shift, parts.power * torch.square(parts.scale)
    finite = torch.isfinite(mean.to(work)) & torch.isfinite(var.to(work))
    return parts._replace(anchor=torch.where(finite, parts.anchor, torch.nan))


def _check_own(given: Tensor, own: Tensor) -> None:
    """Raise for statistics that are not the layer's; on another device, a replica has copies."""
    if given.device == own.device and given.data_ptr() != own.data_ptr():
        raise ArgumentRuntimeError(
            "inside accumulate_statistics a layer has other running statistics than when the block "
            "began (torch.func.functional_call, a cast, or buffers that were replaced). Call the "
            "model itself, and leave its buffers in place."
        )


# A new number for each call that is traced: two passes with equal moments are no common
# subexpression.
@constant_in_graphs
def _number() -> int:
    return next(_keys)


@uncaptured("batchnorm::note_pass")
def _note_pass(x: Tensor, parts: Tensor, key: Tensor, number: int, work: torch.dtype) -> Tensor:
    found = _open.get(int(key))
    again, kept = in_backward(), keeps_statistics()
    if found is not None and not again and not kept:
        found.add(Parts(*parts.unbind()), work)
    stays = found is not None or again or kept
    return torch.full((), stays, dtype=torch.bool, device=x.device)


@_note_pass.register_fake
def _(x: Tensor, parts: Tensor, key: Tensor, number: int, work: torch.dtype) -> Tensor:
    return x.new_empty((), dtype=torch.bool)
