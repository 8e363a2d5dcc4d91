"""The passes over tensors: the launches of a call, their order and their arguments.

Nothing here waits for the device, and no decision depends on values: after a first step has
compiled the kernels, a step can be captured into a CUDA graph. Launches go to the current stream.
"""

from __future__ import annotations

from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from batchnorm.core.config import Options
from batchnorm.core.layout import Layout
from batchnorm.core.running import Running
from batchnorm.kernels.geometry import Geometry, sizes_of
from batchnorm.kernels.kept import BYTES, STATISTICS
from batchnorm.kernels.schedules import SCHEDULE
from batchnorm.kernels.triton import backward, channels, forward, tiling, visits
from batchnorm.kernels.triton.arguments import (
    ACTIVATIONS,
    Array,
    Kept,
    Mask,
    Parameters,
    Task,
    Walk,
    make_task,
    make_walk,
    rates_of,
)
from batchnorm.kernels.triton.tiling import Tiling, divide_up, find_depth, find_merging, power_above
from batchnorm.kernels.triton.visits import Visit

_NO_RUNNING = Running(None, None)
_NO_MASK = Mask(None)


class Plan:
    """The launches for arrays of one layout and type."""

    def __init__(self, layout: Layout, geometry: Geometry, dtype: str) -> None:
        self.sizes = sizes = sizes_of(layout, geometry)
        self._bytes = BYTES[dtype]
        self._type = tl.float64 if dtype == "float64" else tl.float32
        self.tiling = tiling.find_tiling(sizes, self._bytes, tiling.LIMITS)
        self.statistics = sizes.groups * sizes.channels
        self._walks: dict[Any, Walk] = {}

    def find_visit(self, arrays: int) -> Visit:
        """The cut of a step in one launch, which reads `arrays` arrays twice, or None: passes."""
        if self.tiling.whole:
            return Visit(self.tiling)
        if not SCHEDULE.visits:
            return Visit(None, "visits are off")
        return visits.find_visit(self.sizes, self._bytes, arrays, visits.LIMITS)

    def moments(self, x: Array, mask: Mask) -> Kept:
        """The moments of every group."""
        kept = self._new_kept(x)
        partials, walk = self._partial_moments(x, mask)
        self._merge_moments(partials, kept, walk)
        return kept

    def forward(
        self,
        x: Array,
        residual: Array,
        mask: Mask,
        y: Array,
        parameters: Parameters,
        running: Running | None,
        options: Options,
        *,
        batch: bool,
        update: bool,
        kept: Kept | None,
    ) -> Kept:
        """Fill y and update the running statistics; `kept`: moments that are known already."""
        masked = mask.data is not None
        task = make_task(options, batch, update, running is not None, masked)
        statistics = _NO_RUNNING if running is None else running
        rates = rates_of(options)
        if not batch:
            kept = self._new_kept(x)
        elif kept is None and (cut := self.find_visit(1).cut) is not None:
            kept = self._new_kept(x, cut.parts)
            flags = self._new_flags(cut.parts, statistics, update)
            walk = self._walk(cut, 1, 1, x, residual, y)
            arguments = (x, mask, residual, y, kept.data, flags, parameters, statistics, walk)
            rest = (*rates, task, find_depth(self.sizes.groups, cut.width))
            self._launch(forward.forward_whole, walk.parts, *arguments, *rest, warps=cut.warps)
            _count_batch(flags, statistics)
            return kept._replace(renorm=bool(task.renorm.value))
        else:
            kept = self._finish(x, mask, parameters, statistics, rates, task, kept)
        walk = self._elementwise(x, residual, y)
        blank = mask if task.zero_padding.value else _NO_MASK
        inputs = (x, residual, y, blank, kept.data, parameters, statistics, walk, options.eps, task)
        self._launch(forward.normalize, self._programs(walk), *inputs)
        return kept._replace(renorm=bool(task.renorm.value))

    def backward(
        self,
        x: Array,
        dy: Array,
        y: Array,
        dx: Array,
        dresidual: Array,
        mask: Mask,
        gradients: Parameters,
        kept: Kept,
        options: Options,
        *,
        batch: bool,
    ) -> None:
        """Fill the gradients that are given."""
        task = make_task(options, batch, False, kept.renorm, mask.data is not None)
        cut = self.find_visit(2 if y.data is None else 3).cut
        if batch and cut is not None and (dx.data is not None or self.tiling.whole):
            sums = self._new(x, 2 * self.statistics)
            walk = self._walk(cut, 1, 1, x, dy, y, dx, dresidual)
            arguments = (x, dy, y, dx, dresidual, mask, sums, kept.data, gradients, walk, task)
            depth = find_depth(self.sizes.groups, cut.width)
            self._launch(backward.backward_whole, walk.parts, *arguments, depth, warps=cut.warps)
            return
        found: Tensor | None = None
        wanted = (gradients.gamma, gradients.beta, dresidual.data)
        if batch or any(a is not None for a in wanted):
            found = self._reduce(x, dy, y, dresidual, mask, gradients, kept, task)
        if dx.data is not None:
            self._apply(x, dy, y, dx, dresidual, mask, found, kept, task)

    def reduce(
        self,
        x: Array,
        dy: Array,
        y: Array,
        dresidual: Array,
        mask: Mask,
        gradients: Parameters,
        kept: Kept,
        options: Options,
    ) -> Tensor:
        """The sums of g and of g·(x - mean); fills dresidual and the gradients that are given."""
        task = make_task(options, True, False, kept.renorm, mask.data is not None)
        return self._reduce(x, dy, y, dresidual, mask, gradients, kept, task)

    def apply(
        self,
        x: Array,
        dy: Array,
        y: Array,
        dx: Array,
        dresidual: Array,
        mask: Mask,
        sums: Tensor,
        kept: Kept,
        options: Options,
    ) -> None:
        """Fill dx from sums that `reduce` has returned; `kept` holds the count of these sums."""
        task = make_task(options, True, False, False, mask.data is not None)
        self._apply(x, dy, y, dx, dresidual, mask, sums, kept, task)

    def _partial_moments(self, x: Array, mask: Mask) -> tuple[Tensor, Walk]:
        walk = self._walk(self.tiling, self.tiling.blocks, 1, x)
        counts = walk.blocks * self.sizes.groups
        partials = self._new(x, 3 * walk.blocks * self.statistics + counts)
        self._launch(forward.partial_moments, self._programs(walk), x, mask, partials, walk)
        return partials, walk

    def _merge_moments(self, partials: Tensor, kept: Kept, walk: Walk) -> None:
        width, depth = find_merging(self.sizes.channels, walk.blocks)
        programs = self.sizes.groups * divide_up(self.sizes.channels, width)
        self._launch(forward.merge_moments, programs, partials, kept.data, walk, width, depth)

    def _finish(
        self,
        x: Array,
        mask: Mask,
        parameters: Parameters,
        running: Running,
        rates: tuple[float, ...],
        task: Task,
        kept: Kept | None,
    ) -> Kept:
        """The moments, unless they are given, the running statistics and the coefficients of y."""
        partials = None
        walk = self._walk(self.tiling, self.tiling.blocks, 1, x)
        if kept is None:
            kept = self._new_kept(x)
            partials, walk = self._partial_moments(x, mask)
            if self.sizes.groups != 1:
                self._merge_moments(partials, kept, walk)
                partials = None
        terms = self.sizes.groups if partials is None else walk.blocks
        width, depth = find_merging(self.sizes.channels, terms)
        parts = divide_up(self.sizes.channels, width)
        flags = self._new_flags(parts, running, bool(task.update.value))
        arguments = (partials, kept.data, flags, parameters, running, walk, *rates, task)
        self._launch(forward.finish_channels, parts, *arguments, width, depth)
        _count_batch(flags, running)
        return kept

    def _reduce(
        self,
        x: Array,
        dy: Array,
        y: Array,
        dresidual: Array,
        mask: Mask,
        gradients: Parameters,
        kept: Kept,
        task: Task,
    ) -> Tensor:
        walk = self._walk(self.tiling, self.tiling.blocks, 1, x, dy, y, dresidual)
        partials = self._new(x, 2 * walk.blocks * self.statistics)
        sums = self._new(x, 2 * self.statistics)
        arguments = (x, dy, y, dresidual, mask, kept.data, partials, walk, task)
        self._launch(backward.partial_gradients, self._programs(walk), *arguments)
        width, depth = find_merging(self.sizes.channels, walk.blocks)
        parts = divide_up(self.sizes.channels, width)
        rest, programs = (sums, kept.data, gradients, walk, task), self.sizes.groups * parts
        self._launch(backward.merge_gradients, programs, partials, *rest, width, depth)
        if self.sizes.groups != 1:
            width, depth = find_merging(self.sizes.channels, self.sizes.groups)
            parts = divide_up(self.sizes.channels, width)
            self._launch(backward.finish_gradients, parts, *rest, width, depth)
        return sums

    def _apply(
        self,
        x: Array,
        dy: Array,
        y: Array,
        dx: Array,
        dresidual: Array,
        mask: Mask,
        sums: Tensor | None,
        kept: Kept,
        task: Task,
    ) -> None:
        # dresidual holds g already, unless a half type rounded it.
        exact = self._bytes > 2 or task.activation.value == ACTIVATIONS["relu"]
        if dresidual.data is not None and exact:
            dy, y, task = dresidual, Array(None), task._replace(activation=tl.constexpr(0))
        walk = self._elementwise(x, dy, y, dx)
        arguments = (x, dy, y, dx, mask, sums, kept.data, walk, task)
        self._launch(backward.apply_gradient, self._programs(walk), *arguments)

    def _walk(self, cut: Tiling, blocks: int, together: int, *arrays: Array) -> Walk:
        """The walk over these arrays."""
        rows = tuple(a.row for a in arrays)
        walk = self._walks.get((cut, blocks, together, rows))
        if walk is None:
            walk = make_walk(self.sizes, cut, blocks, together, rows, self._type)
            self._walks[cut, blocks, together, rows] = walk
        return walk

    def _elementwise(self, *arrays: Array) -> Walk:
        # One program even for an empty x: in evaluation it stores what the backward step reads.
        cut = self.tiling
        blocks = max(1, divide_up(cut.tiles, cut.together))
        return self._walk(cut, blocks, cut.together, *arrays)

    def _programs(self, walk: Walk) -> int:
        return walk.parts * walk.blocks * self.sizes.groups

    def _new(self, x: Array, size: int) -> Tensor:
        assert x.data is not None
        return x.data.new_empty(size, dtype=torch.float64)

    def _new_kept(self, x: Array, parts: int = 1) -> Kept:
        groups = self.sizes.groups
        # No kernel of the passes that writes counts has more programs for a group.
        parts = max(1, parts, self.tiling.parts, divide_up(self.sizes.channels, 8))
        data = self._new(x, len(STATISTICS) * self.statistics + parts * groups)
        if self.sizes.channels == 0:  # no kernel runs
            data.zero_()
        return Kept(data, self.statistics, groups)

    def _new_flags(self, parts: int, running: Running, update: bool) -> Tensor | None:
        if not update or running.batches is None:
            return None
        return running.batches.new_empty(parts, dtype=torch.int32)

    def _launch(self, kernel: Any, programs: int, *arguments: Any, warps: int = 0) -> None:
        # Contraction into fused operations would round the mean that is subtracted and the mean
        # that is kept differently (S3).
        warps = warps or self.tiling.warps
        if programs > 0 and self.sizes.channels > 0:
            kernel[(programs,)](*arguments, num_warps=warps, enable_fp_fusion=False)


def _count_batch(flags: Tensor | None, running: Running) -> None:
    if flags is not None and (parts := flags.numel()) > 0:
        width = min(1024, power_above(parts))
        channels.count_batch[(1,)](flags, running.batches, parts, width, enable_fp_fusion=False)
