"""One batch over several processes: the cuts of a case, and the joined results.

Nothing here knows a framework. A front end's runner is a function of a case and its data, called
in each process with that process's part; `Split.join` puts the results together, and
`test_conformance.check` compares them with the float64 core on the whole batch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from cases import Case, Data, Result


@dataclass(frozen=True)
class Split:
    """A case, cut along its first reduced axis at `cuts`; parts may be empty."""

    case: Case
    cuts: tuple[int, ...]

    @property
    def axis(self) -> int:
        return next(a for a in range(len(self.case.shape)) if a not in self.case.axes)

    @property
    def parts(self) -> list[slice]:
        ends = (0, *self.cuts, self.case.shape[self.axis])
        return [slice(begin, end) for begin, end in pairwise(ends)]

    def cut(self, data: Data) -> list[tuple[Case, Data]]:
        """Each process's case and data."""
        return [self._part(data, part) for part in self.parts]

    def cut_evenly(self, data: Data, multiple: int) -> list[tuple[Case, Data]]:
        """`cut` for frameworks whose arrays have parts of one size, here of so many rows.

        Shorter parts end in rows of NaN that the mask marks as padding; `trim` removes these rows.
        """
        longest = max(part.stop - part.start for part in self.parts)
        rows = max(math.ceil(longest / multiple), 1) * multiple
        cut = self.cut(data)
        if all(case.shape[self.axis] == rows for case, _ in cut):
            return cut
        return [self._fill(case, part, data, rows) for case, part in cut]

    def trim(self, result: Result, rank: int) -> Result:
        """A process's result without the rows that `cut_evenly` put at its end."""
        part = self.parts[rank]
        real = (slice(None),) * self.axis + (slice(part.stop - part.start),)
        return result._replace(y=result.y[real], dx=result.dx[real])

    def join(self, found: Sequence[Result]) -> Result:
        """The result on the whole batch; parameter gradients are summed, states must agree."""
        for other in found[1:]:
            for name, mine in other.state._asdict().items():
                np.testing.assert_array_equal(mine, getattr(found[0].state, name), name)

        def all_rows(name: str) -> np.ndarray | None:
            arrays = [getattr(result, name) for result in found]
            return None if arrays[0] is None else np.concatenate(arrays, self.axis)

        def total(name: str) -> np.ndarray | None:
            arrays = [getattr(result, name) for result in found]
            return None if arrays[0] is None else np.sum(arrays, 0)

        return Result(
            all_rows("y"),
            all_rows("dx"),
            total("dgamma"),
            total("dbeta"),
            found[0].state,
            all_rows("dresidual"),
        )

    def _part(self, data: Data, part: slice) -> tuple[Case, Data]:
        def cut(a: np.ndarray | None) -> np.ndarray | None:
            if a is None or a.shape[self.axis] != self.case.shape[self.axis]:
                return a
            return a[(slice(None),) * self.axis + (part,)]

        shape = list(self.case.shape)
        shape[self.axis] = part.stop - part.start
        rows = {name: cut(getattr(data, name)) for name in ("x", "real", "residual", "s", "t")}
        return (
            replace(self.case, shape=tuple(shape)),
            data._replace(**rows, dy=cut(data.dy), mask=self._cut_mask(data.mask, part)),
        )

    def _fill(self, case: Case, data: Data, whole: Data, rows: int) -> tuple[Case, Data]:
        own = case.shape[self.axis]

        def extend(a: np.ndarray, axis: int, value: float) -> np.ndarray:
            widths = [(0, rows - own if i == axis else 0) for i in range(a.ndim)]
            return np.pad(a, widths, constant_values=value)

        def fill(name: str, value: float) -> np.ndarray | None:
            before = getattr(whole, name)
            if before is None or before.shape[self.axis] != self.case.shape[self.axis]:
                return before  # one row that serves all
            return extend(getattr(data, name), self.axis, value)

        mask = np.ones(own, bool) if data.mask is None else data.mask
        axis = self.axis if mask.ndim == len(case.shape) else 0
        if mask.shape[axis] != own:  # one row that serves all
            mask = np.repeat(mask, own, axis)
        shape = (*case.shape[: self.axis], rows, *case.shape[self.axis + 1 :])
        values = {"x": np.nan, "dy": np.nan, "s": 1.0, "t": 1.0}
        filled = {name: fill(name, value) for name, value in values.items()}
        return (
            replace(case, shape=shape),
            data._replace(**filled, mask=extend(mask, axis, 0)),
        )

    def _cut_mask(self, mask: np.ndarray | None, part: slice) -> np.ndarray | None:
        if mask is None:
            return None
        axis = self.axis if mask.ndim == len(self.case.shape) else 0
        if mask.shape[axis] != self.case.shape[self.axis]:
            return mask
        return mask[(slice(None),) * axis + (part,)]


def random_split(case: Case, size: int, rng: np.random.Generator) -> Split:
    """Cuts anywhere, so that some parts may be empty."""
    split = Split(case, ())
    rows = case.shape[split.axis]
    return Split(case, tuple(sorted(rng.integers(0, rows, size - 1, endpoint=True).tolist())))


def even_split(case: Case, size: int) -> Split:
    """Parts of one size, or of sizes that differ by one."""
    split = Split(case, ())
    rows = case.shape[split.axis]
    return Split(case, tuple(rows * rank // size for rank in range(1, size)))
