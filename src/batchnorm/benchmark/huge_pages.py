"""torch with huge pages, in turns with the variants of this process.

torch reads the variable that has its allocator ask for huge pages when it allocates first, so that
they need a process of their own. That one computes only when it is told to.
"""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass
from typing import Any

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import make_problem
from batchnorm.benchmark.runner import check_all
from batchnorm.benchmark.timing import Step, time_calls
from batchnorm.benchmark.torch_steps import make_variants, name_rival
from batchnorm.benchmark.variant import Variant

__all__ = ["HUGE", "HugePages", "time_anywhere"]

HUGE = ", huge pages"  # behind the name of a variant
_VARIABLE = "THP_MEM_ALLOC_ENABLE"


class HugePages:
    """The process in which torch allocates huge pages; a context, at whose end it ends."""

    def __enter__(self) -> HugePages:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        before = os.environ.get(_VARIABLE)
        os.environ[_VARIABLE] = "1"
        try:
            self._process = context.Process(target=_serve, args=(there,), daemon=True)
            self._process.start()
        finally:
            del os.environ[_VARIABLE]
            if before is not None:
                os.environ[_VARIABLE] = before
        there.close()
        return self

    def __exit__(self, *error: object) -> None:
        self._here.close()  # which the process takes for the end
        self._process.join()

    def offer(self, case: Case, every: int = 1) -> dict[str, Variant]:
        """The variant of torch's layer on a case; the one before is gone.

        Args:
            case: the job.
            every: check each so many channels only.
        """
        self._here.send((case, every))
        step = _Elsewhere(self._here)
        return {name_rival(case)[0] + HUGE: Variant(step, find_error=step.find_error)}


@dataclass(frozen=True)
class _Elsewhere:
    """A step of the other process."""

    connection: Any

    def __call__(self) -> None:
        self.time(1)

    def time(self, calls: int) -> float:
        """Seconds a call."""
        self.connection.send(calls)
        return float(self.connection.recv())

    def find_error(self) -> float:
        """The error that the other process has found."""
        found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        return float(found)


def time_anywhere(step: Step, calls: int) -> float:
    """Seconds a call, by the clock of the process that the step runs in."""
    return step.time(calls) if isinstance(step, _Elsewhere) else time_calls(step, calls)


def _serve(connection: Any) -> None:
    """Check and time torch's layer on one case after another, until nobody asks."""
    step: Step = list  # of no case yet
    while True:
        try:
            asked = connection.recv()
        except EOFError:
            return
        if isinstance(asked, int):
            connection.send(time_calls(step, asked))
            continue
        case, every = asked
        problem = make_problem(case)
        rival = name_rival(case)[0]
        variants = make_variants(problem, (rival,))
        step = variants[rival].step
        try:
            connection.send(check_all(problem, variants, every)[rival])
        except (RuntimeError, ValueError) as error:
            connection.send(error)
        del problem, variants
