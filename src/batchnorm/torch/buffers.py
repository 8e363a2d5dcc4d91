"""The buffers of a layer: running statistics that keep their precision."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from batchnorm.core.config import Renorm, change_clipping
from batchnorm.core.errors import names_errors
from batchnorm.core.running import LONG_RUNNING, Running, derive_renorm
from batchnorm.torch.namespace import XP
from batchnorm.torch.private import BatchNormBase

_Layer = TypeVar("_Layer", bound="RunningStatistics")

_RENORM_BUFFERS = ("running_stddev", "renorm_mean", "renorm_stddev")
_STATISTICS = ("running_mean", "running_var", *_RENORM_BUFFERS)
_LIMITS = "renorm_limits"  # rmin, rmax and dmax as compiled code reads them; not in the state dict
_warned: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # of narrowed statistics, once


class RunningStatistics(BatchNormBase):
    """torch's own buffers, always float32 or wider (S16), and three of renormalization (S11)."""

    renorm: Renorm | None = None
    debias: bool = False
    frozen: bool
    # Inside `accumulate_statistics`, the key of the step that passes belong to (S21): for compiled
    # code a 0-d tensor, whose value nothing guards on, so that layers share a graph.
    _pending: int | None = None
    _traced_pending: Tensor | None = None
    # fairscale's hooks, which switch tracking off in the first pass of a checkpoint, then leave a
    # layer alone: this one knows a recomputation by itself (S9).
    disable_patch_batchnorm = True

    def freeze(self: _Layer) -> _Layer:
        """Normalize by the running statistics, and leave them alone, in training too (S15).

        Survives `train()` and `eval()`; does not touch `requires_grad`. Returns the layer.
        """
        self.frozen = True
        return self

    def unfreeze(self: _Layer) -> _Layer:
        """Undo `freeze`. Returns the layer."""
        self.frozen = False
        return self

    def reset_running_stats(self) -> None:
        """Set the running statistics to mean 0, variance and deviation 1, and no batches."""
        super().reset_running_stats()
        for name in _RENORM_BUFFERS:
            if (buffer := self._buffers.get(name)) is not None:
                buffer.fill_(0.0 if name == "renorm_mean" else 1.0)
        self._fill_limits()

    @names_errors()
    def set_renorm_clipping(
        self,
        *,
        rmax: float | None = None,
        rmin: float | None = None,
        dmax: float | None = None,
    ) -> None:
        """Set limits of renormalization, as a schedule does at every step; None leaves one alone.

        r is clipped to [rmin, rmax] and d to [-dmax, dmax]; ∞ lifts a limit. Nothing else changes,
        and compiled code takes the new limits as data, without compiling again. Set the same on
        all ranks of a synchronized layer.

        Raises:
            TypeError: a limit that is no number.
            ValueError: a negative one, rmax < rmin, or a layer without renormalization.

        Source: S11.
        """
        self.renorm = change_clipping(self.renorm, {"rmax": rmax, "rmin": rmin, "dmax": dmax})
        self._fill_limits()

    def traced_renorm(self) -> Renorm | None:
        """Renormalization as traced code takes it, with limits that are data."""
        renorm = self.renorm
        if renorm is None or torch.compiler.is_exporting():
            return renorm
        limits = self._buffers[_LIMITS]
        assert limits is not None
        return Renorm(renorm.decay, *limits.unbind())

    def _fill_limits(self) -> None:
        limits, renorm = self._buffers.get(_LIMITS), self.renorm
        if limits is not None and renorm is not None:
            with torch.no_grad():
                limits.copy_(torch.tensor([renorm.rmin, renorm.rmax, renorm.dmax]))

    def _prepare_statistics(self) -> None:
        """Bring torch's buffers into this library's form; those that fit stay as they are."""
        self._widen_statistics()
        self._settle_counter()
        if self.renorm is None:
            for name in (*_RENORM_BUFFERS, _LIMITS):
                self._buffers.pop(name, None)
            return
        if any(self._buffers.get(name) is None for name in _RENORM_BUFFERS):
            derived = self._derive(self.running_mean, self.running_var)
            for name, value in zip(_RENORM_BUFFERS, derived, strict=True):
                self.register_buffer(name, value)
        if self._buffers.get(_LIMITS) is None and self.running_mean is not None:
            limits = torch.empty(3, dtype=torch.float32, device=self.running_mean.device)
            self.register_buffer(_LIMITS, limits, persistent=False)
        self._fill_limits()

    def _running(self) -> Running | None:
        mean, var = self._statistic("running_mean"), self._statistic("running_var")
        if mean is None:
            return None
        batches = self._statistic("num_batches_tracked")
        if self.renorm is None:
            return Running(mean, var, batches)
        return Running(mean, var, batches, *(self._statistic(name) for name in _RENORM_BUFFERS))

    def _statistic(self, name: str) -> Tensor | None:
        buffers = self._buffers  # the attribute behind it, without a search
        return buffers[name] if name in buffers else getattr(self, name)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RunningStatistics:
        """Move and cast as torch does, but keep statistics float32 or wider, to the bit (S16)."""
        before = {name: self._buffers.get(name) for name in _STATISTICS}
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers.get(name)
            if old is not None and new is not None and _is_narrow(new):
                self._buffers[name] = old.to(device=new.device)
        if (limits := self._buffers.get(_LIMITS)) is not None:  # perhaps made anew, on "meta"
            self._buffers[_LIMITS] = limits.float()
            self._fill_limits()
        return self

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        missing = {n for n in _RENORM_BUFFERS if prefix + n not in state_dict}
        if self.renorm is not None and len(missing) == len(_RENORM_BUFFERS):
            mean, var = (state_dict.get(prefix + n) for n in _STATISTICS[:2])
            if mean is not None and var is not None:
                for name, value in zip(_RENORM_BUFFERS, self._derive(mean, var), strict=True):
                    state_dict[prefix + name] = value
        steps = prefix + "num_batches_tracked"
        if self.debias and self.momentum is not None and steps not in state_dict:
            state_dict[steps] = torch.tensor(LONG_RUNNING)  # it has forgotten its start (S23)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self._widen_statistics()
        self._settle_counter()
        limits, mean = self._buffers.get(_LIMITS), self._buffers.get("running_mean")
        if limits is not None and mean is not None and limits.device != mean.device:
            self._buffers[_LIMITS] = torch.empty_like(limits, device=mean.device)
            self._fill_limits()

    def _settle_counter(self) -> None:
        """Let statistics that nobody has counted, but that have moved, be long-running (S23).

        Weights that come from other frameworks have a counter of 0, and frozen copies have none.
        """
        mean, var = self._buffers.get("running_mean"), self._buffers.get("running_var")
        if not self.debias or self.momentum is None or mean is None or var is None or mean.is_meta:
            return
        steps = self._buffers.get("num_batches_tracked")
        if type(mean) is not Tensor or (steps is not None and type(steps) is not Tensor):
            return  # FakeTensor, which has no values
        if steps is None:
            steps = torch.tensor(0, device=mean.device)
            self._buffers["num_batches_tracked"] = steps
        if steps == 0 and bool((mean != 0).any() | (var != 1).any()):
            with torch.no_grad():
                steps.fill_(LONG_RUNNING)

    def restore_width(self) -> None:
        """Make float32 again what somebody has narrowed past the layer, as by `.data = ` (S16).

        Tensors stay the same objects, since whoever narrowed them may hold them. Warns once.
        """
        narrow = {}
        for name in _STATISTICS:
            if (buffer := self._buffers.get(name)) is not None and _is_half(buffer):
                narrow[name] = buffer
        if not narrow:
            return
        if self not in _warned:
            _warned.add(self)
            warnings.warn(
                f"{type(self).__name__}: {', '.join(narrow)} had been cast to "
                f"{next(iter(narrow.values())).dtype}, in which a running average stalls, and are "
                "float32 again. Leave the buffers of batch norms out of casts.",
                stacklevel=8,  # the call of the layer
            )
        for buffer in narrow.values():
            buffer.data = buffer.data.float()

    def _widen_statistics(self) -> None:
        for name in _STATISTICS:
            buffer = self._buffers.get(name)
            if buffer is not None and _is_narrow(buffer):
                self._buffers[name] = buffer.float()

    def _derive(self, mean: Any, var: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Renormalization's statistics for a state that has none (S11)."""
        wide = torch.promote_types(var.dtype, torch.float32)
        mean, stddev = derive_renorm(mean, var.to(wide), eps=self.eps, xp=XP)
        return stddev, mean.clone(), stddev.clone()


def _is_half(a: Tensor) -> bool:
    return a.dtype is torch.bfloat16 or a.dtype is torch.float16


def _is_narrow(a: Tensor) -> bool:
    return a.is_floating_point() and torch.finfo(a.dtype).bits < 32
