"""One batch over several processes: how a case is cut, and put together again.

Nothing here knows a framework. A front end's runner is a function of a case and its data, called
in each process with that process's part; `Split.join` puts the results together, and
`test_conformance.check` compares them with the float64 core on the whole batch.
"""

from __future__ import annotations

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
