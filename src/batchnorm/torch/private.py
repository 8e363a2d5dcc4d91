"""Everything of torch that has no public name, each with what takes over where it is gone.

Nothing else in this library uses a private name of torch, but for the same file of the tools, which
do without this front end; attributes that `torch.nn.Module` gives
its subclasses (`_buffers`, `_forward_hooks`) do not count. A fallback may be slower or more
careful; a comment says what is lost then. Tests remove each name in turn.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _find(path: str) -> Any:
    """The object of this name inside torch, or None."""
    found: Any = torch
    for name in path.split("."):
        found = getattr(found, name, None)
    return found


# Tracing and transformations


class _OldStyle(torch.autograd.Function):
    """A function that torch.func refuses, since it has no `setup_context`."""

    @staticmethod
    def forward(ctx: Any, a: Tensor) -> Tensor:
        return a.clone()


def _ask_torch_func() -> object | None:
    if torch.compiler.is_compiling():
        return None
    try:
        _OldStyle.apply(torch.zeros((), device="cpu"))
    except RuntimeError:
        return _OldStyle
    return None


def _ask_forward_mode() -> bool:
    if torch.compiler.is_compiling():
        return False
    a = torch.zeros((), device="cpu")
    try:
        forward_ad.make_dual(a, a)
    except RuntimeError:  # no level has been entered
        return False
    return True


def _read_forward_level() -> bool:
    return forward_ad._current_level >= 0


# The number of modes that listen to operators. Lost: speed; kernels, which call no operator that a
# mode could see, then serve compiled code only.
count_modes: Callable[[], int] = _find("_C._len_torch_dispatch_stack") or (lambda: 1)
# None unless torch.func transforms. Lost: some microseconds a call.
find_transformation: Callable[[], object | None] = (
    _find("_C._functorch.peek_interpreter_stack") or _ask_torch_func
)
# None unless torch.jit traces. Lost: nothing but a call of Python.
find_trace: Callable[[], object | None] = _find("_C._get_tracing_state") or (
    lambda: torch.jit.is_tracing() or None
)
# True inside of `dual_level`. Lost: some microseconds a call, and in graphs forward mode, which
# their operators then refuse by torch's own error.
in_forward_mode: Callable[[], bool] = (
    _read_forward_level if hasattr(forward_ad, "_current_level") else _ask_forward_mode
)


# Memory of tensors


def _lacks_memory(a: Tensor) -> bool:
    """True if values are somewhere else than in memory that the tensor owns."""
    try:
        return a.numel() > 0 and a.data_ptr() == 0
    except RuntimeError:
        return True


# True for a tensor of torch.func, of `is_grads_batched=True`, and for one of zeros that has no
# memory. Lost: nothing but a microsecond.
is_wrapped: Callable[[Tensor], bool] = (
    _find("_C._functorch.is_functorch_wrapped_tensor") or _lacks_memory
)
is_batched: Callable[[Tensor], bool] = (
    _find("_C._functorch.is_legacy_batchedtensor") or _lacks_memory
)
is_zero: Callable[[Tensor], bool] = _find("Tensor._is_zerotensor") or _lacks_memory

_count_uses: Callable[[int], int] | None = _find("_C._storage_Use_Count")
_has_address = _find("UntypedStorage._cdata") is not None
# Lost where it is None: recycled memory, so that large outputs are mapped anew at each call.
count_storage_uses: Callable[[torch.UntypedStorage], int] | None = None
if _count_uses is not None and _has_address:
    _count: Callable[[int], int] = _count_uses

    def _count_storage_uses(storage: torch.UntypedStorage) -> int:
        """The number of tensors and objects of C++ that hold a storage."""
        return _count(storage._cdata)

    count_storage_uses = _count_storage_uses


# Backward passes


def _ask_engine() -> int:
    """0 if the engine takes a callback for the end of a backward pass, which it must be in."""
    try:
        torch.autograd.Variable._execution_engine.queue_callback(_do_nothing)
    except RuntimeError:
        return -1
    return 0


def _do_nothing() -> None:
    pass


# The number of this thread's backward pass; -1: none. Lost: a microsecond a call, and the number,
# which nothing reads; the engine's callback is no public name either, but one that torch's own
# packages for many devices stand on.
find_backward: Callable[[], int] = _find("_C._current_graph_task_id") or _ask_engine
# None if no saved_tensors_hooks are at work. Lost: the short way of steps with an activation.
find_saving_hooks: Callable[[bool], object | None] = _find(
    "_C._autograd._top_saved_tensors_default_hooks"
) or (lambda ignored: True)


# The compiler

_frames = _find("_C._dynamo.eval_frame")


def skip_in_compilers(function: _Function) -> _Function:
    """Let `torch.compile` run a function as it is where it does not inline it.

    `torch.compiler.disable` without its cost for each call, the import of the compiler, and the
    end of the graph where a caller is traced. Lost where it is gone: after the compiler has given
    up on a caller of a layer, it traces functions of this library one by one, and gives up on
    each.
    """
    try:
        skip = _frames._FrameAction.SKIP
        strategy = _frames._FrameExecStrategy(skip, skip)
        _frames.set_code_exec_strategy(function.__code__, strategy)
    except AttributeError:
        return function
    return function


_MARK = "_dynamo_marked_constant"


def _knows_mark() -> bool:
    """False if the compiler's source, where there is one, has no such mark."""
    source = Path(torch.__file__).with_name("_dynamo") / "decorators.py"
    return not source.exists() or _MARK in source.read_text("utf-8")


_marks = _knows_mark()


def constant_in_graphs(function: _Function) -> _Function:
    """`torch.compiler.assume_constant_result` without the import of the compiler.

    The function runs while a graph is traced, and its result is a constant there. Lost where the
    mark is gone: the seconds of that import, since the public function sets another one.
    """
    if _marks:
        setattr(function, _MARK, True)
        return function
    marked: _Function = torch.compiler.assume_constant_result(function)
    return marked


@contextmanager
def not_compiling() -> Iterator[None]:
    """Let `torch.compiler.is_compiling` say no: a trace that waits has set it for all threads.

    Lost where the flag is gone: a proof of the GPU's kernels inside a trace, which then fails,
    and says so.
    """
    flag = getattr(torch.compiler, "_is_compiling_flag", False)
    if not flag:
        yield
        return
    torch.compiler._is_compiling_flag = False
    try:
        yield
    finally:
        torch.compiler._is_compiling_flag = flag


# Classes

# The class that torch's batch norms share.
BatchNormBase: Any = nn.BatchNorm1d.__base__
