"""The schedule of the GPU's kernels: passes over memory, or visits to channels where they suit.

Passes read x again after the sums of all channels. A visit is one program that does a whole step
for some channels, whose elements it finds in a cache when it reads them again. Visits are off
unless asked for, since no card has shown that they are faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["PASSES", "SCHEDULE", "VARIABLE", "VISITS", "find_setting", "visiting"]

VARIABLE = "BATCHNORM_GPU_VISITS"
PASSES, VISITS = "passes", "visits"
_SETTINGS = {"": PASSES, "0": PASSES, "1": VISITS}


def find_setting() -> str:
    """BATCHNORM_GPU_VISITS as a schedule: "visits" for 1, "passes" for 0 and where it is not set.

    Raises:
        ValueError: it is something else.
    """
    found = os.environ.get(VARIABLE, "")
    if found not in _SETTINGS:
        raise ValueError(f"{VARIABLE} must be 0 or 1; got {found!r}.")
    return _SETTINGS[found]


class _Schedule:
    """The schedule of this process; each launch reads it."""

    def __init__(self, name: str) -> None:
        self.name = name

    @property
    def visits(self) -> bool:
        """True if steps that suit visits take them."""
        return self.name == VISITS


SCHEDULE = _Schedule(find_setting())


@contextmanager
def visiting(on: bool = True) -> Iterator[None]:
    """Take the schedule of visits, or that of passes: for measurements and tests."""
    before, SCHEDULE.name = SCHEDULE.name, VISITS if on else PASSES
    try:
        yield
    finally:
        SCHEDULE.name = before
