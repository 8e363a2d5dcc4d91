"""Merging over ranks in array code: differentiable, traceable by compilers (S14)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from batchnorm.core.moments import Centred, Moments
from batchnorm.core.running import BatchAverage, average_groups, unbiased_variance
from batchnorm.torch.devices import widen_on_host
from batchnorm.torch.namespace import XP
from batchnorm.torch.ranks.synchronizer import Participation, find_by_key, pack, unpack
from batchnorm.torch.tracing import uncaptured

__all__ = ["RankMerge"]


class RankMerge:
    """The core's `Merge` over ranks, differentiable any number of times.

    Ranks send 2C + 1 float64 numbers, as kernels do, and the core's `merge_moments` and
    `merge_averages` merge them. The core's `GatherMerge` cannot take its place: it sends 5C
    numbers, rounds variances elsewhere, so that bits would differ from those of the kernels, and
    averages ghost groups only where all ranks have equally many.

    Args:
        part: the call's participation.
        eps: as in rstd.
        known: the merged moments, where they have been found already.
    """

    def __init__(self, part: Participation, eps: float, known: Tensor | None = None) -> None:
        self._part, self._eps, self._known = part, eps, known

    def moments(self, centred: Centred) -> Centred:
        """All ranks' moments."""
        local = pack(_widen(centred).moments, self._part.varying)
        merged = self._known
        if merged is None:
            merged = _merge(local.detach(), self._part, False)
        attach = _attach if torch.compiler.is_compiling() else _Attach.apply
        merged = attach(local, merged, *self._part[:3])
        found = unpack(merged, self._part.channels, tuple(centred.power.shape))
        return self._narrow(found, centred.power)

    def average(self, average: BatchAverage, unbiased: bool) -> BatchAverage:
        """All ranks' average over their ghost groups."""
        assert average.axis is not None
        wide = _widen(average.centred)
        over = average_groups(wide, average.axis, XP)
        mean = over.of(wide.mean, XP)
        var = over.of(unbiased_variance(wide, XP) if unbiased else wide.var, XP)
        groups = XP.sum((wide.count > 0).to(mean.dtype), axis=(average.axis,), keepdims=True)
        # An average that is not finite in x's own type moves no rank's statistics (S9).
        usable = average.usable.to(mean.device)
        mean = torch.where(usable | (groups == 0), mean, torch.nan)
        local = pack(Moments(groups, mean, var), self._part.varying)
        merged = unpack(_merge(local, self._part, True), self._part.channels, tuple(mean.shape))
        found = self._narrow(merged, average.weight)
        usable = average_groups(found, None, XP).usable
        # Count 1, so that the unbiased factor is not applied twice.
        one = torch.ones_like(found.power)
        return BatchAverage(usable, found.count, found._replace(count=one), one, None)

    def _narrow(self, moments: Moments, like: Tensor) -> Centred:
        """Moments in the working type and on the device of `like`; the mean as two numbers (S3)."""
        (count, mean, var), dtype = moments, like.dtype
        anchor = mean.detach().to(dtype)
        scale = (torch.sqrt(var.detach()) + math.sqrt(self._eps)).to(dtype)
        scale = torch.where(scale > 0, scale, 1.0)
        power = (var / torch.square(scale.double())).to(dtype)
        shift = (mean - anchor).to(dtype)
        found = Centred(count.to(dtype), anchor, shift, scale, power, scale, anchor)
        return found if anchor.device == like.device else found.map(lambda a: a.to(like.device))


def _widen(centred: Centred) -> Centred:
    """The moments in float64, on the host where the device has none."""
    return centred._replace(deviation=centred.count).map(widen_on_host)


class _Attach(torch.autograd.Function):
    """`merged`, with the gradient that reaches this rank's own moments through it."""

    @staticmethod
    def forward(local: Tensor, merged: Tensor, key: int, text: str, channels: int) -> Tensor:
        return merged.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        local, _, ctx.key, ctx.text, ctx.channels = inputs
        ctx.save_for_backward(local, output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        wanted = gradient[-2 * ctx.channels :]
        total = _Total.apply(wanted, ctx.key, ctx.text)
        local, merged = ctx.saved_tensors
        return _of_own_moments(total, local, merged, ctx.channels), None, None, None, None


class _Total(torch.autograd.Function):
    """The sum over all ranks."""

    @staticmethod
    def forward(sums: Tensor, key: int, text: str) -> Tensor:
        return find_by_key(key).total(sums.contiguous(), text)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.key, ctx.text = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        # The loss is the sum of all ranks' losses, each of which has the same total in it.
        return _Total.apply(gradient, ctx.key, ctx.text), None, None


def _of_own_moments(total: Tensor, local: Tensor, merged: Tensor, channels: int) -> Tensor:
    """The gradient of this rank's moments, given those of all ranks' mean and variance."""
    of_mean, of_var = total[:channels], total[channels:]
    own, every = (unpack(a, channels, (channels,)) for a in (local, merged))
    weight = (own.count / torch.where(every.count > 0, every.count, 1.0)).detach()
    dmean = weight * (of_mean + 2.0 * (own.mean - every.mean) * of_var)
    nothing = torch.zeros_like(local[: local.numel() - 2 * channels])
    return torch.cat([nothing, dmean, weight * of_var])


def _merge(local: Tensor, part: Participation, pooled: bool) -> Tensor:
    if torch.compiler.is_compiling():
        return _merge_ranks(local, *part[:3], pooled)
    return find_by_key(part.key).merge(local, part.text, part.channels, pooled)


# Operators are opaque to compilers, which would move, repeat or drop calls they can look into.


@uncaptured("batchnorm::merge_ranks")
def _merge_ranks(local: Tensor, key: int, text: str, channels: int, pooled: bool) -> Tensor:
    return find_by_key(key).merge(local.clone(), text, channels, pooled).clone()


@_merge_ranks.register_fake
def _(local: Tensor, key: int, text: str, channels: int, pooled: bool) -> Tensor:
    return torch.empty_like(local)


@uncaptured("batchnorm::total_over_ranks")
def _total_over_ranks(sums: Tensor, key: int, text: str) -> Tensor:
    return find_by_key(key).total(sums.contiguous(), text)


@_total_over_ranks.register_fake
def _(sums: Tensor, key: int, text: str) -> Tensor:
    return torch.empty_like(sums)


@uncaptured("batchnorm::attach")
def _attach(local: Tensor, merged: Tensor, key: int, text: str, channels: int) -> Tensor:
    return merged.clone()


@_attach.register_fake
def _(local: Tensor, merged: Tensor, key: int, text: str, channels: int) -> Tensor:
    return torch.empty_like(merged)


def _attach_backward(ctx: Any, gradient: Tensor) -> Any:
    total = _total_over_ranks(gradient[-2 * ctx.channels :].clone(), ctx.key, ctx.text)
    local, merged = ctx.saved_tensors
    return _of_own_moments(total, local, merged, ctx.channels), None, None, None, None


_attach.register_autograd(_attach_backward, setup_context=_Attach.setup_context)
