"""Explanations: the way that a call takes, and why each faster way refused it.

A front end reports where it chooses (`report`). `ask` runs a call up to there; with the environment
variable BATCHNORM_EXPLAIN=1 every choice is logged, once.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from contextvars import ContextVar
from typing import Any, NamedTuple

LAST_CALL = "last call"
KERNELS = "kernels"
KERNELS_IN_GRAPH = "kernels in a compiled graph"
ARRAY_CODE = "array code"

UNFUSED = "fused=False asks for array code"


class Refusal(NamedTuple):
    """A way that does not serve a call, and its reason."""

    way: str
    reason: str


class Explanation(NamedTuple):
    """The way that a call takes.

    Attributes:
        layer: the layer's class, or the function.
        way: "last call" (the kernels as in the call before, without its checks), "kernels",
            "kernels in a compiled graph", "array code", or "one operation of TensorFlow".
        refused: faster ways that do not serve the call, the fastest first.
        note: a reason why the way may change later, or the memory of outputs, or "".
    """

    layer: str
    way: str
    refused: tuple[Refusal, ...] = ()
    note: str = ""

    def __str__(self) -> str:
        lines = [f"{self.layer}: {self.way}", *([f"  ({self.note})"] if self.note else [])]
        return "\n".join([*lines, *(f"  not {way}: {reason}" for way, reason in self.refused)])


class _Listening:
    """Listeners to choices; `active` is a plain attribute, so that compilers guard on it."""

    def __init__(self) -> None:
        self.logs = os.environ.get("BATCHNORM_EXPLAIN") == "1"
        self.active = self.logs
        self._asking = 0
        self._lock = threading.Lock()

    def ask(self, change: int) -> None:
        with self._lock:
            self._asking += change
            self.active = self.logs or self._asking > 0


LISTENING = _Listening()


class _Question(NamedTuple):
    graph: bool


class _Answer(BaseException):  # no framework's `except Exception` may change or keep it
    def __init__(self, found: Explanation) -> None:
        self.found = found


_question: ContextVar[_Question | None] = ContextVar("batchnorm_explain", default=None)
_logged: set[Explanation] = set()
_logger = logging.getLogger("batchnorm")


def ask(call: Callable[[], Any], *, graph: bool = False) -> Explanation:
    """Run `call` up to its choice of a way, and end it there; nothing is computed or changed.

    `graph`: ask for the choice of a compiled graph.
    """
    token = _question.set(_Question(graph))
    LISTENING.ask(1)
    try:
        call()
    except _Answer as answer:
        return answer.found
    finally:
        LISTENING.ask(-1)
        _question.reset(token)
    raise RuntimeError("batchnorm.explain: the call ended without a choice between ways.")


def asks_for_graph() -> bool:
    """True if the current question is about a compiled graph."""
    question = _question.get()
    return question is not None and question.graph


def is_asked() -> bool:
    """True if the current call only answers a question, and computes nothing."""
    return _question.get() is not None


def report(layer: str, way: str, refused: tuple[tuple[str, str], ...] = (), note: str = "") -> None:
    """Report the way of a call: to `ask`, by ending the call here, or to the log."""
    if not LISTENING.active:
        return
    found = Explanation(layer, way, tuple(Refusal(*pair) for pair in refused), note)
    if _question.get() is not None:
        raise _Answer(found)
    if LISTENING.logs and (known := found._replace(note="")) not in _logged:
        _logged.add(known)
        if not _logger.handlers and not logging.root.handlers:
            _logger.addHandler(logging.StreamHandler())
        _logger.setLevel(min(_logger.level or logging.INFO, logging.INFO))
        _logger.info("%s", found)
