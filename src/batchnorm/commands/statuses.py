"""Exit statuses: one for each way in which a command ends."""

from __future__ import annotations

import errno
import traceback
from collections.abc import Callable, Iterator
from enum import IntEnum

from batchnorm.commands import streams
from batchnorm.commands.errors import ProblemFound, UserError

__all__ = ["MEANINGS", "Status", "run"]


class Status(IntEnum):
    """The exit statuses of the command line."""

    DONE = 0
    PROBLEM = 1
    MISTAKE = 2
    OUTPUT = 3
    BUG = 70
    INTERRUPTED = 130
    CLOSED = 141


MEANINGS: dict[Status, str] = {
    Status.DONE: "success; inspect: no error found; verify: all results are right",
    Status.PROBLEM: "inspect found an error in a layer, or no batch norm; verify: a wrong result",
    Status.MISTAKE: "an option or file that cannot be used, a missing package, no memory",
    Status.OUTPUT: "standard output cannot be written",
    Status.BUG: "a bug in batchnorm, with its traceback",
    Status.INTERRUPTED: "interrupted",
    Status.CLOSED: "the reader of the output closed the pipe",
}

# Errors of writing to a stream; those of files that a command names are `UserError`s.
_WRITING = {errno.ENOSPC, errno.EIO, errno.EFBIG, errno.EDQUOT, errno.EBADF}
_MEMORY = ("can't allocate memory", "RESOURCE_EXHAUSTED", "out of memory")


def run(command: Callable[[], object]) -> Status | int:
    """Run a command, report its errors, and flush its output.

    Args:
        command: prints to standard output, and may raise anything.

    Returns:
        The exit status, `Status.PROBLEM` for a `ProblemFound` only.
    """
    if not streams.prepare():
        return Status.OUTPUT
    try:
        command()
        status: Status | int = Status.DONE
    except BaseException as error:
        status = _judge(error)
    failure = streams.flush()
    if failure is not None and status in (Status.DONE, Status.PROBLEM):
        status = _judge(failure)
    return status


def _judge(error: BaseException) -> Status | int:
    """The exit status for an exception, which is reported first."""
    if isinstance(error, ProblemFound):
        return Status.PROBLEM
    if isinstance(error, SystemExit):
        return _judge_exit(error)
    if isinstance(error, KeyboardInterrupt):
        streams.complain("interrupted")
        return Status.INTERRUPTED
    if isinstance(error, BrokenPipeError):
        return Status.CLOSED
    if isinstance(error, UserError):
        streams.complain(str(error))
        return Status.MISTAKE
    if _is_memory(error):
        streams.complain(f"there is not enough memory: {str(error) or 'nothing is left'}")
        return Status.MISTAKE
    if isinstance(error, OSError) and error.filename is None and error.errno in _WRITING:
        streams.complain(f"standard output cannot be written: {error.strerror}")
        return Status.OUTPUT
    streams.write_error("".join(traceback.format_exception(error)))
    streams.complain("this is a bug; please report it with what `batchnorm info` prints")
    return Status.BUG


def _judge_exit(end: SystemExit) -> Status | int:
    """Typer and rich exit by themselves for interrupts, closed pipes and unknown shells."""
    for cause in _causes(end):
        if isinstance(cause, (BrokenPipeError, KeyboardInterrupt)):
            return _judge(cause)
    if end.code is None or isinstance(end.code, int):
        return Status.MISTAKE if end.code == Status.PROBLEM else end.code or Status.DONE
    streams.complain(str(end.code))
    return Status.MISTAKE


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause = error.__cause__ or error.__context__
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _is_memory(error: BaseException) -> bool:
    """NumPy raises MemoryError; torch and JAX say it in a RuntimeError."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _MEMORY)
