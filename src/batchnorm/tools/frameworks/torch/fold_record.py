"""The record of one forward pass: linear maps and batch norms, and what reads their outputs."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.fold_calls import Call, Layout, layout_of
from batchnorm.tools.frameworks.torch.private import OperatorMode, find_address, list_leaves
from batchnorm.tools.frameworks.torch.values import tensors_in

_BATCH_NORM = inspect.signature(functional.batch_norm)
# These ask for shape and type alone.
_LIKE: tuple[str, ...] = (
    "ones_like",
    "zeros_like",
    "empty_like",
    "full_like",
    "rand_like",
    "randn_like",
)
_LIKE += ("new_zeros", "new_ones", "new_empty", "new_full")
_COPIES = (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default)
# What a call may tell about a tensor without reading its values.
_FACTS: tuple[type, ...] = (
    Tensor,
    bool,
    int,
    str,
    type(None),
    torch.dtype,
    torch.device,
    torch.layout,
)
_FACTS += (torch.Size, torch.memory_format)


class Recorder:
    """Listens to a model while it runs.

    Every operator is seen twice: torch's functions as Python calls them, which name linear maps
    with their parameters and tell of values that leave torch; and the operators that the
    dispatcher runs, which tell what reads and writes a tensor's memory.

    Args:
        model: the model that will run.
    """

    def __init__(self, model: nn.Module) -> None:
        self.calls: list[Call] = []
        self.parameter_readers: dict[int, list[str]] = {}  # by storage
        self._model = model
        self._holders: dict[int, Call] = {}  # by storage: the call whose output lies there
        self._makers: dict[int, str] = {}  # by storage: what wrote it
        self._alive: list[Tensor] = []  # a storage that lives keeps its address
        self._hidden = 0
        self._operators = 0
        self._running: list[Call] = []
        self._owners: dict[int, list[Any]] = {}
        for module in model.modules():
            for tensor in (module._parameters.get("weight"), module._buffers.get("running_mean")):
                if tensor is not None:
                    self._owners.setdefault(id(tensor), []).append(module)
        for parameter in model.parameters():
            if not nn.parameter.is_lazy(parameter):
                self.parameter_readers[find_address(parameter.untyped_storage())] = []

    @contextmanager
    def listen(self) -> Iterator[None]:
        """Record what runs in the block."""
        with ExitStack() as stack:
            for module in self._model.modules():
                known = maps.is_map(module) or maps.is_norm(module)
                if known and maps.refuse_module(module) is None:
                    before, after = self._enter_module, self._leave_module
                    handles = (
                        module.register_forward_pre_hook(before, with_kwargs=True),
                        module.register_forward_hook(after),
                    )
                    for handle in handles:
                        stack.callback(handle.remove)
            # Compiled code hides its operators.
            stack.enter_context(torch.compiler.set_stance("force_eager"))
            stack.enter_context(_Functions(self))
            stack.enter_context(_Operators(self))
            yield

    def finish(self, outputs: list[Tensor]) -> None:
        """Note what the model returned, and what its modules keep.

        Raises:
            RuntimeError: a layer raised an error, which the model caught; the record has a gap.
        """
        if self._hidden:
            raise RuntimeError("a linear map or batch norm raised an error inside the model")
        for tensor in outputs:
            self._read(tensor, "the model's output")
        for name, module in self._model.named_modules():
            kept = [v for k, v in vars(module).items() if k not in ("_modules", "_parameters")]
            for tensor in tensors_in(kept):
                self._read(tensor, f"an attribute of {name or 'the model'}")
        self._alive.clear()

    def count(self) -> Counter[int]:
        """Calls of each module, by its id."""
        return Counter(id(call.module) for call in self.calls)

    @contextmanager
    def _hide(self) -> Iterator[None]:
        self._hidden += 1
        try:
            yield
        finally:
            self._hidden -= 1

    def _enter_module(self, module: Any, args: Any, kwargs: Any) -> None:
        self._hidden += 1
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        kind = maps.kind_of(module) if maps.is_map(module) else None
        self._running.append(self._begin(module, kind, given, True))

    def _leave_module(self, module: Any, args: Any, y: Any) -> None:
        self._end(self._running.pop(), y)
        self._hidden -= 1

    def _begin(self, module: Any, kind: Any, given: dict[str, Any], whole: bool) -> Call:
        first = "input" if "input" in given else next(iter(given))
        x = given[first]
        layout = layout_of(x) if isinstance(x, Tensor) else None
        source: Call | str = "the model's input"
        if layout is not None:
            source = self._makers.get(layout.storage, source)
            source = self._holders.get(layout.storage, source)
        call = Call(module, kind, given, layout, source, whole)
        if isinstance(source, Call):
            source.readers.append(call)
        if whole:
            for tensor in tensors_in([a for name, a in given.items() if name != first]):
                self._read(tensor, "an argument of a batch norm")
        return call

    def _end(self, call: Call, y: Any) -> None:
        self.calls.append(call)
        call.given = {k: type(v) if isinstance(v, Tensor) else v for k, v in call.given.items()}
        call.y = layout_of(y) if isinstance(y, Tensor) else None
        if call.y is not None:
            self._read(y, "an output in the same memory")
            self._holders[call.y.storage] = call
            self._alive.append(y)

    def _read(self, tensor: Tensor, reader: str) -> None:
        layout = layout_of(tensor)
        if layout is None:
            return
        if layout.storage in self._holders:
            self._holders[layout.storage].readers.append(reader)
        if layout.storage in self.parameter_readers:
            self.parameter_readers[layout.storage].append(reader)

    def run_function(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one of torch's functions, as Python calls it."""
        if self._hidden:
            return function(*args, **kwargs)
        with self._hide():
            call = self._as_call(function, args, kwargs)
            if call is not None:
                y = function(*args, **kwargs)
                self._end(call, y)
                return y
        before = self._operators
        y = function(*args, **kwargs)
        with self._hide():
            self._note_leak(function, (args, kwargs), y, self._operators == before)
        return y

    def _as_call(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
        """The call of a module that computes a linear map or a batch norm through a function."""
        if function is functional.batch_norm:
            given = _BATCH_NORM.bind(*args, **kwargs)
            given.apply_defaults()
            norm = self._owner(given.arguments, "running_mean")
            if norm is None or given.arguments["training"] is not False:
                return None
            names = ("running_var", "weight", "bias", "eps")
            if any(getattr(norm, n, None) is not given.arguments[n] for n in names[:3]):
                return None
            if norm.eps != given.arguments["eps"]:
                return None
            return self._begin(norm, None, given.arguments, False)
        bound = maps.bind_function(function, args, kwargs)
        owner = None if bound is None else self._owner(bound[1], "weight")
        if bound is None or owner is None or "bias" not in owner._parameters:
            return None
        if owner.bias is not bound[1].get("bias"):
            return None
        return self._begin(owner, bound[0], bound[1], False)

    def _owner(self, given: dict[str, Any], name: str) -> Any:
        """The only module that holds an argument, or None."""
        owners = [m for m in self._owners.get(id(given.get(name)), ()) if hasattr(m, name)]
        return owners[0] if len(owners) == 1 and given[name] is not None else None

    def _note_leak(self, function: Any, given: Any, y: Any, silent: bool) -> None:
        """Note a call that may have handed values to something else than an operator.

        Args:
            function: of torch.
            given: its arguments.
            y: what it returned.
            silent: it ran no operator.
        """
        inputs = [a for a in list_leaves(given) if isinstance(a, Tensor)]
        name = str(getattr(function, "__name__", function))
        leaves = [y] if type(y) is list and silent else list_leaves(y)
        known = name == "__iter__" or all(isinstance(a, _FACTS) for a in leaves)
        if known and silent and name != "data_ptr":
            places = [layout_of(a) for a in (*inputs, *tensors_in(leaves))]
            storages = {place.storage for place in places[: len(inputs)] if place is not None}
            known = all(p is not None and p.storage in storages for p in places[len(inputs) :])
        if not known or name == "data_ptr":
            for tensor in inputs:
                self._read(tensor, name)

    def run_operator(self, operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run one operator of the dispatcher."""
        y = operator(*args, **kwargs)
        if not self._hidden:
            self._operators += 1
            with self._hide():
                self._note_operator(operator, tensors_in((args, kwargs)), tensors_in(y))
        return y

    def _note_operator(self, operator: Any, inputs: list[Tensor], outputs: list[Tensor]) -> None:
        name = str(operator._schema.name).rpartition("::")[2]
        read = [layout_of(a) for a in inputs]
        made = [layout_of(a) for a in outputs]
        known = {layout.storage for layout in read if layout is not None}
        new = [place for place in made if place is not None and place.storage not in known]
        for place in new:
            self._makers[place.storage] = name
        if outputs and not new and None not in made and not operator._schema.is_mutable:
            return  # a view reads nothing
        if name in _LIKE:
            return
        if operator in _COPIES and self._note_copy(read[0], made[0], outputs[0]):
            return
        for tensor in inputs:
            self._read(tensor, name)

    def _note_copy(self, source: Layout | None, copy: Layout | None, value: Tensor) -> bool:
        """Follow the output of a call into a copy; False if the copy is something else."""
        if source is None or copy is None or source.dtype is not copy.dtype:
            return False
        call = self._holders.get(source.storage)
        if call is None:
            return False
        call.copies.append((source, copy))
        self._holders[copy.storage] = call
        self._alive.append(value)
        return True


class _Functions(TorchFunctionMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._recorder.run_function(func, args, kwargs or {})


class _Operators(OperatorMode):
    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return self._recorder.run_operator(func, args, kwargs or {})
