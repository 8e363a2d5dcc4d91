"""Real processes for tests: started once, each runs many functions, under a time limit."""

from __future__ import annotations

import multiprocessing
import os
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

_TORCH = multiprocessing.get_context("forkserver")
_TORCH.set_forkserver_preload(["batchnorm.torch"])  # the import takes seconds
_FRESH = multiprocessing.get_context("spawn")


class Answer(NamedTuple):
    """A process's result of a function, or its failure."""

    value: Any = None
    error: str | None = None  # the exception's type
    message: str = ""
    seconds: float = 0.0
    exit_code: int | None = None  # of a process that ended instead


class World:
    """Processes that run the same functions, each with arguments of its own.

    Args:
        size: number of processes.
        start: `start(rank, size, address, timeout)` runs first in each process, for instance to
            form a process group; `address` is None on rank 0, which returns the one for others.
        stop: runs last in each.
        timeout: seconds for `start` to use as an operation's timeout, or None.
        fresh: use processes that have not imported torch, which may break other frameworks.
    """

    def __init__(
        self,
        size: int,
        start: Callable[..., Any],
        stop: Callable[[], None],
        timeout: float | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.size = size
        context = _FRESH if fresh else _TORCH
        self._pipes, self._processes = [], []
        address = None
        for rank in range(size):
            ours, theirs = context.Pipe()
            arguments = (theirs, start, stop, rank, size, address, timeout)
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)
            if rank == 0:
                address = ours.recv()

    def run(
        self,
        function: Callable[..., Any],
        arguments: Sequence[tuple[Any, ...]] | None = None,
        *,
        within: float = 60.0,
    ) -> list[Answer]:
        """Run `function(*arguments[rank])` on every rank; `within` limits the seconds."""
        given = arguments or [()] * self.size
        for pipe, some in zip(self._pipes, given, strict=True):
            pipe.send((function, some))
        end = time.monotonic() + within
        return [self._answer(rank, end) for rank in range(self.size)]

    def values(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Run a function with the same arguments on every rank; no process may fail."""
        return results(self.run(function, [arguments] * self.size))

    def close(self) -> None:
        """End all processes."""
        for pipe in self._pipes:
            with suppress(OSError):  # it has ended already
                pipe.send(None)
        for process in self._processes:
            process.join(10)
            if process.is_alive():
                process.kill()
                process.join()

    def _answer(self, rank: int, end: float) -> Answer:
        pipe, process = self._pipes[rank], self._processes[rank]
        try:
            if pipe.poll(max(end - time.monotonic(), 0.0)):
                return pipe.recv()
        except (EOFError, ConnectionResetError):
            process.join(10)
            return Answer(exit_code=process.exitcode)
        return Answer(error="Hang", message="no answer in time")


def results(answers: Sequence[Answer]) -> list[Any]:
    """The values of answers, none of which may be a failure."""
    for rank, answer in enumerate(answers):
        failure = answer.error or answer.exit_code
        assert failure is None, f"rank {rank}: {failure}\n{answer.message}"
    return [answer.value for answer in answers]


def _serve(
    pipe: Any,
    start: Callable[..., Any],
    stop: Callable[[], None],
    rank: int,
    size: int,
    address: Any,
    timeout: float | None,
) -> None:
    if rank == 0:
        pipe.send(start(rank, size, None, timeout))
    else:
        start(rank, size, address, timeout)
    while (order := pipe.recv()) is not None:
        function, arguments = order
        begin = time.monotonic()
        try:
            answer = Answer(function(*arguments))
        except BaseException as error:  # the test must see every kind of failure
            shown = "".join(traceback.format_exception(error))
            answer = Answer(None, type(error).__name__, shown)
        pipe.send(answer._replace(seconds=time.monotonic() - begin))
    stop()
    os._exit(0)  # no handlers of libraries whose peers are gone
