"""Running the table against one mutant, in a child that it may hang or crash."""

from __future__ import annotations

import os
import resource
import signal
import time
import traceback
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from typing import NamedTuple

Load = Callable[[], Iterable[Callable[[object], None]]]
SECONDS = 240  # of processor time, for a mutant that does not end
WAITING = 10 * SECONDS  # for one that waits for ever


class Mutant(NamedTuple):
    """One edit.

    `name` says where and what; `path` is the file, `source` its text with the edit.
    """

    name: str
    path: str
    source: str


class Verdict(NamedTuple):
    """The finder of a mutant, "cover", "table", "tests" or "nothing", and the detail."""

    by: str
    detail: str = ""


def judge(load: Load, others: tuple[str, ...] = ()) -> Verdict:
    """The verdict on what `load` makes importable, in a child of this process.

    `load` returns checks of a case, each of which raises if the case fails. `others` are tests
    for what the table does not hold.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        with os.fdopen(write, "w") as pipe:
            pipe.write("\n".join(_run(load, others)))
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        return _await(child, pipe.fileno())


def _await(child: int, pipe: int) -> Verdict:
    os.set_blocking(pipe, False)
    end, text = time.monotonic() + WAITING, b""
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        text += _read(pipe)
        if done:
            break
        if time.monotonic() > end:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return Verdict("cover", "does not end")
        time.sleep(0.02)
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU:
        return Verdict("cover", "does not end")
    if status != 0:
        return Verdict("cover", f"ends the process with status {status}")
    by, _, detail = text.decode().partition("\n")
    return Verdict(by, detail)


def _read(pipe: int) -> bytes:
    try:
        return os.read(pipe, 1 << 16)
    except BlockingIOError:
        return b""


def _run(load: Load, others: tuple[str, ...]) -> tuple[str, str]:
    try:
        checks = list(load())
        from cases import CASES
        from cover import cover
    except Exception as error:
        return "cover", f"import: {type(error).__name__}"
    chosen = {case.name for case in cover(CASES)}
    for by, cases in (
        ("cover", [case for case in CASES if case.name in chosen]),
        ("table", [case for case in CASES if case.name not in chosen]),
    ):
        for case in cases:
            for check in checks:
                try:
                    check(case)
                except Exception as error:
                    where = traceback.extract_tb(error.__traceback__)[-1].name
                    return by, f"{case.name}: {type(error).__name__} in {where}"
    return ("tests", "") if others and _fails(others) else ("nothing", "")


def _fails(tests: tuple[str, ...]) -> bool:
    import pytest

    with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
        return pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]) != 0
