"""The cut of a step into visits: programs that each do a whole step for some channels.

A visit reads the arrays that its sums need twice, and only the first time from memory: the second
time it finds them in the caches. It takes the kernels of small steps over tiles of its own:

- A visit reads at most 64 KiB twice. As compiled for compute capability 9.0, a multiprocessor holds
  one to four programs of 8 warps, by their registers: at most 33 MiB on 132 multiprocessors, less
  than their L2 cache of 50 has beside what is written. Half of it may even stay in the L1 caches.
- At least 128 visits, so that a large card has one for each of its multiprocessors. Where there are
  four times as many, a visit takes more channels.
- One channel a visit where positions are contiguous. Where rows of channels are, as many as a
  sector of the L2 cache has, 32 bytes: the least that comes from memory.
- A tile is 4096 numbers of float32, 16 registers of data a thread. With 32, as in the passes, a
  kernel that has both halves of a step needs all registers, and spills.

These tiles are not those of the passes, which are wider: with them, few arrays had 128 visits. So
a sum adds in another order, and the bits of the two schedules differ. As in `tiling`, none of the
numbers has been tuned, and all depend on the shape alone.

Programs that share a channel would have to wait for each other: with a grid of which not all
programs are resident that never ends, so larger channels take passes.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from batchnorm.kernels.geometry import Sizes
from batchnorm.kernels.triton.tiling import Tiling, count_positions, divide_up, power_above


class Limits(NamedTuple):
    """The numbers above."""

    twice: int = 1 << 16  # bytes that a visit reads twice
    visits: int = 128
    sector: int = 32  # bytes
    tile: int = 1 << 14  # bytes of the arithmetic's type
    warps: int = 8


LIMITS = Limits()


class Visit(NamedTuple):
    """A cut into visits, or None and the reason for passes."""

    cut: Tiling | None
    reason: str = ""


@lru_cache(maxsize=4096)
def find_visit(sizes: Sizes, bytes_each: int, arrays: int, limits: Limits) -> Visit:
    """The cut into visits that read `arrays` arrays of these sizes twice, if they suit visits."""
    channel = arrays * sizes.outer * sizes.inner * bytes_each
    width = 1
    if sizes.inner == 1:
        width = min(power_above(sizes.channels), max(1, limits.sector // bytes_each))
    visits = divide_up(sizes.channels, width)
    if width * channel > limits.twice:
        size = divide_up(width * channel, 1024)
        most = limits.twice // 1024
        return Visit(None, f"a visit would read {size} KiB twice, and {most} KiB is the most")
    if visits < limits.visits:
        return Visit(None, f"there would be {visits} visits, and {limits.visits} is the fewest")
    while 2 * width * channel <= limits.twice and visits >= 4 * limits.visits:
        width, visits = 2 * width, divide_up(sizes.channels, 2 * width)
    wide = max(4, bytes_each)  # of the arithmetic
    positions = count_positions(sizes)
    length = min(power_above(positions), max(1, limits.tile // wide // width))
    return Visit(
        Tiling(
            width,
            length,
            parts=visits,
            tiles=divide_up(positions, length),
            blocks=1,
            together=1,
            whole=True,
            warps=max(1, min(limits.warps, width * length * wide // 2048)),
        )
    )
