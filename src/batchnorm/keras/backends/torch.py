"""Normalizing on the torch backend."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import Layout, count_values, make_layout
from batchnorm.core.merge import Parts
from batchnorm.core.running import Running
from batchnorm.keras.backends.shared import ONE_PARTICIPANT, measure_parts, refuse_calls
from batchnorm.keras.call import Call
from batchnorm.keras.masks import find_axes
from batchnorm.keras.private import in_stateless_scope
from batchnorm.torch.call import Settings, Tensors
from batchnorm.torch.checks import can_read, working_type
from batchnorm.torch.functional import normalize as normalize_tensors
from batchnorm.torch.keeping import keep_statistics
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.synchronizer import find_synchronizer
from batchnorm.torch.recompute import in_backward

__all__ = ["XP"]  # beside the functions

RETRACES = True  # by the guards of compiled functions
ACCUMULATES = True
LIMITS_ARE_STATE = False


def resolve_training(training: Any) -> bool:
    """The value of `training`, which torch always has."""
    return bool(training)


def read_values(a: Tensor) -> np.ndarray | None:
    """The values of a tensor where no device but the CPU has to be asked for them, or None."""
    return a.detach().numpy() if can_read(a) else None


def refuse_kernel(call: Call, rank: int | None) -> str | None:
    """As `batchnorm.keras.functional.Backend` says."""
    return refuse_calls(call)


def find_trace() -> Any:
    """As `batchnorm.keras.functional.Backend` says; traces are not told apart."""
    return True if torch.compiler.is_compiling() else None


def follows(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return trace is not None or find_trace() is None


def repeats(trace: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return trace is not False and in_backward()


def mark_block(trace: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says: nothing to mark."""
    return nullcontext()


def mark_rule(block: Any) -> AbstractContextManager[Any]:
    """As `batchnorm.keras.functional.Backend` says; compiled code asks when it runs."""
    return keep_statistics() if block.ledgers is None else nullcontext()


def find_graph() -> None:
    """None: compiled functions are guarded."""
    return


def loses_context() -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return False


def obeys(block: Any) -> bool:
    """As `batchnorm.keras.functional.Backend` says."""
    return block.ledgers is None or follows(block.trace)


def read_limits(layer: Any) -> None:
    """None: the options have them, since Python runs at each call."""
    return


def normalize(
    x: Tensor,
    mask: Any,
    gamma: Tensor | None,
    beta: Tensor | None,
    running: Running,
    call: Call,
) -> tuple[Tensor, Running | None]:
    """As `batchnorm.keras.functional.Backend` says; but variables may be updated in place.

    Activation checkpointing repeats a forward pass, which is recognized by the tensors that it
    updates: they must be the variables' own, except in Keras's stateless scopes.
    """
    training = bool(call.training)
    pure = training and in_stateless_scope()
    if pure:
        running = running.map(lambda a: a.detach().clone())
    layout = make_layout(tuple(x.shape), call.axes)
    steps = running.batches
    if steps is not None:  # Keras counts in 32 bits
        running = running._replace(batches=steps.to(torch.int64))
    settings = Settings(
        call.owner,
        call.axes,
        call.options,
        call.adjustment,
        call.fused,
        find_synchronizer(call.synchronized, call.process_group),
    )
    mask = _fit_mask(mask, x, layout, training)
    tensors = Tensors(x, mask, gamma, beta, None, running)
    y = normalize_tensors(tensors, settings, training=training, update=training and call.update)
    if steps is not None and not pure:
        steps.copy_(running.batches)
    return y, running if pure else None


def measure(x: Tensor, mask: Any, call: Call) -> Parts:
    """As `batchnorm.keras.functional.Backend` says."""
    if find_synchronizer(call.synchronized, call.process_group) is not None:
        raise ArgumentValueError(ONE_PARTICIPANT)
    layout = make_layout(tuple(x.shape), call.axes, call.options.virtual_batch_size)
    fitted = _fit_mask(mask, x, layout, training=False)
    with torch.no_grad():
        wide = x.to(working_type(x.dtype))
        return measure_parts(wide, fitted, layout, call.options, XP)


def _fit_mask(mask: Any, x: Tensor, layout: Layout, training: bool) -> Tensor | None:
    """A mask of x's rank (S1)."""
    if mask is None:
        if training and count_values(layout) == 1:
            # torch's layer refuses a single value per channel; Keras's does not (S7).
            return torch.ones([1] * x.dim(), dtype=torch.bool, device=x.device)
        return None
    places = find_axes(tuple(mask.shape), layout)
    sizes = dict(zip(places, mask.shape, strict=True))
    return mask.reshape([sizes.get(a, 1) for a in range(x.dim())])
