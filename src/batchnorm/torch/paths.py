"""The ways to y: a kernel, an operator of a compiled graph, or array code."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from batchnorm.core import config
from batchnorm.core.forward import Inputs, Outcome, forward_batch, forward_running, move_running
from batchnorm.core.layout import Layout
from batchnorm.core.running import Running
from batchnorm.torch import checks, operators
from batchnorm.torch import fused as kernels
from batchnorm.torch.namespace import XP
from batchnorm.torch.prepared import NAMES, choose
from batchnorm.torch.rank_merge import RankMerge
from batchnorm.torch.runtime import StepHistory, recomputation_flag, snapshot, untraced
from batchnorm.torch.synchronize import Participation
from batchnorm.torch.unmoved import write_all

_history = StepHistory()


class Parameters(NamedTuple):
    """gamma and beta, each per channel or None."""

    weight: Tensor | None
    bias: Tensor | None


class Mode(NamedTuple):
    """What a call does about statistics (S15).

    own_statistics: normalize by the batch's own; training: with ghost batches, renormalization
    and adjustment; update: move the running ones.
    """

    own_statistics: bool
    training: bool
    update: bool


class Job(NamedTuple):
    """A call whose arguments are checked.

    Attributes:
        x, mask, parameters, residual, running: its tensors.
        layout: of x, with the ghost batches that apply.
        options: as in Options.
        adjustment: the one that applies, or None (S13).
        mode: what it does about statistics.
        owner: whose name error messages carry.
        part: how it takes part in synchronization, or None (S14).
    """

    x: Tensor
    mask: Tensor | None
    parameters: Parameters
    residual: Tensor | None
    running: Running | None
    layout: Layout
    options: config.Options
    adjustment: config.Adjustment | None
    mode: Mode
    owner: str
    part: Participation | None

    @property
    def batch(self) -> bool:
        """Whether x is normalized by its own statistics."""
        return self.mode.own_statistics or self.running is None


@untraced
def by_kernel(job: Job, prepared: kernels.Prepared | None) -> Tensor | str:
    """y, or why no kernel can compute it."""
    if prepared is None:
        return "x is not a plain tensor, or a transformation of torch is at work"
    x, mask, parameters, residual, running = job[:5]
    refusal = (
        prepared.refusal
        or kernels.refuse_parameters(parameters)
        or kernels.refuse_tensors(x, (mask, *parameters, residual), running)
        or _refuse_residual(job)
    )
    if refusal is None and job.part is not None and prepared.layout.groups is not None:
        refusal = "none merges the averages of ghost batches over ranks"
    if refusal is not None:
        return refusal
    again = recomputation_flag(x) is True
    return kernels.normalize(
        x,
        mask,
        parameters,
        residual,
        running,
        prepared,
        job.options,
        batch=job.batch,
        update=job.mode.update and running is not None and not again,
        history=_history,
        again=again,
        owner=job.owner,
        part=job.part,
    )


def by_operator(job: Job, demanded: bool) -> Tensor | str:
    """y by an operator of a compiled graph, or why there is none for it."""
    refusal = _refuse_operator(job, demanded)
    if refusal is not None:
        return refusal
    y, centred = operators.step(
        *job[:5],
        job.layout,
        job.options,
        batch=job.batch,
        demanded=demanded,
        owner=job.owner,
    )
    if job.mode.update and job.running is not None:
        moved = move_running(job.running, centred, job.layout, job.options, XP)
        _store(job.running, moved, job.x)
    return y


def _refuse_operator(job: Job, demanded: bool) -> str | None:
    """Why a graph should not hold the operator for such a call, or None."""
    if torch.compiler.is_exporting():
        return "an exported program holds array code, which runs without this library"
    if forward_ad._current_level >= 0:  # read where it is traced, so that graphs depend on it
        return "forward-mode differentiation is at work"
    if job.part is not None:
        return "compiled graphs merge with other ranks in array code"
    if not job.batch and not demanded:
        return "the compiler fuses evaluation with what surrounds it"
    if job.options.renorm is not None and job.batch:
        return "compiled graphs renormalize in array code"
    axes = job.layout.channel_axes
    if axes != tuple(range(axes[0], axes[0] + len(axes))):
        return f"channel axes {axes} are no neighbours, as compiled graphs need them"
    x, mask, parameters, residual, running = job[:5]
    shape = None if mask is None else job.layout.mask_shape(tuple(mask.shape), job.owner)
    per_channel = shape is not None and any(shape[a] != 1 for a in axes)
    return (
        _refuse_residual(job)
        or kernels.refuse_parameters(parameters)
        or kernels.refuse_tensors(x, (x, mask, *parameters, residual), running, traced=True)
        or _choose(x.device.type, NAMES[x.dtype], job.adjustment is not None, per_channel, demanded)
    )


def _choose(
    device: str, dtype: str, adjusted: bool, per_channel: bool, demanded: bool
) -> str | None:
    """Why no kernel serves the call, or None; found while a graph is traced."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return "a transformation of torch is at work"
    choice = choose(device, dtype, adjusted, per_channel, demanded)
    return None if choice.kernel else choice.reason


# torch.compiler.assume_constant_result, without importing the compiler: that takes seconds.
_choose._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _refuse_residual(job: Job) -> str | None:
    """What kernels have against the residual, or None."""
    if job.residual is None or job.residual.dtype is job.x.dtype:
        return None
    return f"it takes a residual of x's type {job.x.dtype}, and got {job.residual.dtype}"


def by_array(job: Job) -> Tensor:
    """y by differentiable operations."""
    x, layout, owner = job.x, job.layout, job.owner
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    s, t = config.call_adjustment(owner, job.adjustment, layout.shape)
    inputs = Inputs(
        x.to(work),
        checks.to_boolean(job.mask),
        gamma=_cast(job.parameters.weight, work),
        beta=_cast(job.parameters.bias, work),
        residual=_cast(job.residual, work),
        s=checks.check_adjusted(owner, "scale", s, x, work),
        t=checks.check_adjusted(owner, "bias", t, x, work),
    )
    if job.mode.own_statistics or job.running is None:
        return _by_batch(job, inputs)
    if not torch.is_grad_enabled():
        inputs = inputs._replace(mask=None)  # it matters to gradients only
    running = _in(job.running, work)
    return forward_running(inputs, running, layout, job.options, owner=owner, xp=XP).to(x.dtype)


def _by_batch(job: Job, inputs: Inputs) -> Tensor:
    layout, options, owner, running = job.layout, job.options, job.owner, job.running
    merge = None if job.part is None else RankMerge(job.part, options.eps)

    def forward(statistics: Running | None) -> Outcome:
        return forward_batch(inputs, statistics, layout, options, owner=owner, xp=XP, merge=merge)

    if running is None:
        return forward(None).y.to(job.x.dtype)
    before = _in(_before_step(running, layout, options), inputs.x.dtype)
    remembers = options.renorm is not None and not torch.compiler.is_compiling()
    again = remembers and recomputation_flag(inputs.x) is True
    if again:
        # The statistics have moved since the step that is recomputed (S9).
        with torch.no_grad():
            moments = forward(before).moments
        before = _history.recall(owner, running.renorm_mean, moments)
    outcome = forward(before)
    if remembers and not again:
        _history.record(running.renorm_mean, outcome.moments, before)
    y = outcome.y.to(job.x.dtype)
    if job.mode.update:  # last, since a call that fails moves nothing (S9)
        _store(running, outcome.running, inputs.x)
    return y


def _before_step(running: Running, layout: Layout, options: config.Options) -> Running:
    """The statistics, where gradients depend on them out of reach of this step's update."""
    renormalizes = options.renorm is not None
    if not renormalizes and (layout.groups is None or options.activation is None):
        return running
    statistics = running._replace(batches=None)
    copies = iter(snapshot([a for a in statistics if a is not None], repeatable=not renormalizes))
    kept = (None if a is None else next(copies) for a in statistics)
    return Running(*kept)._replace(batches=running.batches)


def _in(running: Running, dtype: torch.dtype) -> Running:
    """Statistics in the working type; the number of batches stays an integer."""
    cast = Running(*(_cast(a, dtype) for a in running))
    return cast._replace(batches=running.batches)


def _store(running: Running, new: Running | None, x: Tensor) -> None:
    """Write `new` into `running` in place, unless this forward pass is a recomputation (S9)."""
    again: Any = recomputation_flag(x)
    if again is True:
        return
    assert new is not None
    values = (
        (old, v.to(old.dtype)) for old, v in zip(running, new, strict=True) if old is not None
    )
    if torch.compiler.is_compiling():
        for old, value in values:
            old.copy_(value if again is None else torch.where(again, old, value))
    else:
        write_all(values)


def _cast(a: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None else a.to(dtype)
