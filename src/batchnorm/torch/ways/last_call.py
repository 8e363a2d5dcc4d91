"""A layer's latest calls, repeated without checks while nothing that the checks read has changed.

A step on a small tensor takes microseconds, most of which would go into checks.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.core.running import Running
from batchnorm.kernels.explanation import LAST_CALL, Explanation, Refusal, ask
from batchnorm.torch.call import Call
from batchnorm.torch.first_passes import FirstPasses
from batchnorm.torch.keeping import in_block
from batchnorm.torch.kernels import on_cpu
from batchnorm.torch.kernels.autograd import run_simple
from batchnorm.torch.kernels.records import KernelStep
from batchnorm.torch.kernels.tensors import NOT_PLAIN, is_plain, is_plain_uncompiled
from batchnorm.torch.masks.blocks import usage
from batchnorm.torch.options import make_reader
from batchnorm.torch.private import find_backward  # `in_backward`, less a frame
from batchnorm.torch.tracing import untraced
from batchnorm.torch.ways import eager_kernels


def _tensors(layer: nn.Module) -> tuple[Tensor | None, ...] | None:
    """The layer's tensors; None where one of them is computed anew for each call."""
    parameters, buffers = layer._parameters, layer._buffers
    try:
        return (
            parameters["weight"],
            parameters["bias"],
            buffers["running_mean"],
            buffers["running_var"],
            buffers["num_batches_tracked"],
        )
    except KeyError:
        return None


class LastCalls:
    """Kinds of input that a layer has seen lately, and the ways of those that have come again.

    Remembering a way takes time: an input must come twice for it, and more often after a way
    that could not be repeated.
    """

    _INPUTS = 8  # kinds of input that are remembered: all are forgotten when there are more
    _MOST = 64  # calls of one kind that are waited for at most

    __slots__ = ("_known", "_patience", "masked", "passes")

    def __init__(self) -> None:
        # True after a call, also in evaluation, that took the mask of `padding_mask`. `PastSteps`
        # cannot tell: it finds a step by the moments of its real rows, and a recomputed step that
        # has lost its mask has other moments.
        self.masked = False
        self.passes = FirstPasses()
        self._known: dict[Any, LastCall | int] = {}  # or the calls to wait for
        self._patience = 1

    def __reduce__(self) -> tuple[Any, ...]:
        """A copied or pickled layer begins anew."""
        return LastCalls, ()

    @untraced
    def find_key(self, layer: nn.Module, x: Tensor) -> Any:
        """The kind of input that x is, in eager code; None where calls are not repeated."""
        if usage.in_use or self.masked or find_backward() != -1:
            return None
        if not is_plain_uncompiled(x):
            return None
        if layer.training and (
            layer._pending is not None
            or in_block()
            or self.passes.untracked  # which must see it
            or (not layer.track_running_stats and not torch.is_grad_enabled())
        ):
            return None
        return x.shape, x.stride(), x.dtype, layer.training, x.is_cpu

    def refuse(self, layer: nn.Module, x: Tensor, alone: bool) -> str | None:
        """The reason not to repeat a call, or None; `alone`: without mask and residual."""
        if not alone:
            return "it repeats calls of x alone, and this one has a mask or a residual"
        if not is_plain(x):
            return NOT_PLAIN
        key = self.find_key(layer, x)
        if key is None:
            return "padding_mask or another block is open, or a backward pass runs"
        last = self._known.get(key)
        if type(last) is not LastCall:
            return (
                "it repeats what has come twice: x's shape, strides and type, by kernels on the "
                "CPU, without renormalization and other ranks"
            )
        if last.find_tensors(layer) is None:
            return "an option or a tensor of the layer has changed since"
        return None

    @untraced
    def repeat(self, layer: nn.Module, x: Tensor, key: Any) -> Tensor | None:
        """y by the way of the last input of this kind, or None."""
        last = self._known.get(key)
        if type(last) is not LastCall:
            return None
        y: Tensor | None = last.repeat(layer, x)
        if y is None:
            self._patience = min(2 * self._patience, self._MOST)
            self._known[key] = self._patience
        return y

    def learn(self, layer: nn.Module, key: Any, call: Call) -> None:
        """Remember a call of this kind that has just run with all checks."""
        known = self._known
        left = known.get(key)
        if left is None:
            if len(known) >= self._INPUTS:
                known.clear()
            known[key] = self._patience
        elif isinstance(left, LastCall):
            return
        elif left > 1:
            known[key] = left - 1
        else:
            known[key] = find_last_call(layer, call) or self._MOST


class LastCall:
    """The way one call went: through the kernels, without mask, residual or renormalization."""

    __slots__ = (
        "batch",
        "decision",
        "options",
        "read",
        "running",
        "seen",
        "settings",
        "state",
        "step",
        "tensors",
        "update",
        "written",
    )

    def __init__(self, layer: nn.Module, tensors: tuple[Tensor | None, ...], call: Call) -> None:
        assert call.decision is not None
        weight, bias, *statistics = tensors
        self.read = make_reader()  # options, which users may assign at any time
        self.settings = self.read(layer.__dict__)
        self.tensors = tensors
        # Properties that may change while the tensor stays the same object; parameters may come to
        # require gradients too.
        self.seen = [
            (a, a.data_ptr(), a.dtype, a.shape, at < 2)
            for at, a in enumerate(tensors)
            if a is not None
        ]
        self.running = None if statistics[0] is None else Running(*statistics)
        self.written = [a for a in statistics if a is not None]
        self.state = on_cpu.find_state(weight, bias, self.running)
        self.decision, self.options = call.decision, call.options
        self.batch, self.update = call.by_batch, call.update and self.running is not None
        self.step = self._make_step()  # of calls that autograd does not record

    def find_tensors(self, layer: nn.Module) -> tuple[Tensor | None, ...] | None:
        """The layer's tensors, or None if they or its options are not as they were."""
        if self.read(layer.__dict__) != self.settings:
            return None
        parameters, buffers = layer._parameters, layer._buffers
        tensors = weight, bias, mean, var, batches = self.tensors
        try:
            if (
                parameters["weight"] is not weight
                or parameters["bias"] is not bias
                or buffers["running_mean"] is not mean
                or buffers["running_var"] is not var
                or buffers["num_batches_tracked"] is not batches
            ):
                return None
        except KeyError:  # one of them is computed anew for each call
            return None
        for a, address, dtype, shape, free in self.seen:
            if (
                a.data_ptr() != address
                or a.dtype is not dtype
                or a.shape != shape
                or a.is_neg()
                or not a.is_contiguous()
                or not (free or not a.requires_grad)
            ):
                return None
        return tensors

    def repeat(self, layer: nn.Module, x: Tensor) -> Tensor | None:
        """y for an input of the same kind, or None if anything else is not as it was."""
        tensors = self.find_tensors(layer)
        if tensors is None:
            return None
        step = self._make_step() if torch.is_grad_enabled() else self.step
        return run_simple(step, x, tensors[0], tensors[1])

    def _make_step(self) -> KernelStep:
        step = KernelStep(
            self.decision,
            None,
            self.running,
            self.state,
            self.options,
            self.batch,
            self.update,
            False,
        )
        step.written = self.written
        step.simple = self.options.activation is None
        return step


def find_last_call(layer: nn.Module, call: Call) -> LastCall | None:
    """The way that a call has just gone, if it can be repeated; or None."""
    tensors, decision = _tensors(layer), call.decision
    if tensors is None or decision is None or call.settings.fused is False:
        return None
    if decision.kernel != "cpu" or decision.plan is None or eager_kernels.refuse(call) is not None:
        return None
    if call.options.renorm is not None or (call.training and call.settings.synchronizer):
        return None
    weight, bias, *statistics = tensors
    if any(a is not None and not a.is_contiguous() for a in (weight, bias)):
        return None
    if any(a is not None and (a.requires_grad or a.is_inference()) for a in statistics):
        return None
    return LastCall(layer, tensors, call)


def explain_call(
    layer: Any, forward: Callable[..., Tensor], arguments: tuple[Any, ...], *, graph: bool
) -> Explanation:
    """The way that a layer's call takes: a repetition, or what its `forward` chooses."""
    x, *others = arguments
    before: LastCalls = layer._memory
    reason = before.refuse(layer, x, all(a is None for a in others))
    if reason is None and not graph:
        return Explanation(type(layer).__name__, LAST_CALL)
    layer._memory = LastCalls()
    try:
        found = ask(lambda: forward(layer, *arguments), graph=graph)
    finally:
        layer._memory = before
    if reason is None or graph:
        return found
    return found._replace(refused=(Refusal(LAST_CALL, reason), *found.refused))
