"""A device without float64, as Apple's GPUs are one, played by tensors of the CPU.

Its tensors refuse float64, and other devices' tensors beside them. `torch.device("singles")` is
PrivateUse1 under another name, for which torch keeps the parts in Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

from batchnorm.torch import devices

NAME = "singles"  # no method of tensors, which torch makes one of
_aten = torch.ops.aten
# What copies values between devices.
_COPIES = {_aten._to_copy.default, _aten.copy_.default}


class Narrow(Tensor):
    """A tensor of the device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Narrow:
        if inner.dtype in (torch.float64, torch.complex128):
            raise TypeError(f"device {NAME} has no {inner.dtype}")
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def __init__(self, inner: Tensor) -> None:
        pass

    def __repr__(self, **_: Any) -> str:
        return f"Narrow({self.inner!r})"

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})


class _Factories(TorchDispatchMode):
    """Makes new tensors on the device, for which no argument is a tensor of it."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _dispatch(function, args, kwargs or {})


def _dispatch(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    leaves = [a for a in pytree.tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
    narrow = [a for a in leaves if isinstance(a, Narrow)]
    wanted, inside = kwargs.get("device"), dict(kwargs)
    there = bool(narrow) if wanted is None else torch.device(wanted).type == NAME
    if wanted is not None:
        inside["device"] = torch.device("cpu")
    if narrow and function not in _COPIES:
        foreign = [a for a in leaves if not isinstance(a, Narrow) and a.dim() > 0]
        assert not foreign, f"{function} got tensors of two devices"
    if function is _aten.copy_.default:  # what is written decides
        there = isinstance(args[0], Narrow)
    if there and function is _aten._to_copy.default and args[0].dtype is torch.float64:
        assert inside.get("dtype") not in (None, torch.float64), f"{function} brings float64"
    plain, named = pytree.tree_map_only(Narrow, lambda a: a.inner, (args, inside))
    found = function(*plain, **named)
    written = function._schema.arguments and function._schema.arguments[0].alias_info
    if written is not None and written and written.is_write:
        return args[0]
    return pytree.tree_map_only(Tensor, Narrow, found) if there else found


class _Module(_DummyBackendModule):
    """The device's module; torch.utils.checkpoint asks it too, from here on, in all tests."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]


_registered = False


def register() -> None:
    """Make the device known to torch, which must be before any backward pass of the process."""
    global _registered
    if not _registered:
        _setup_privateuseone_for_python_backend(NAME, backend_module=_Module())
        _registered = True


@contextmanager
def narrow_device() -> Iterator[torch.device]:
    """The device, known to the library as one without float64."""
    register()
    before = devices._NARROW
    devices._NARROW = {*before, NAME}
    try:
        with _Factories():
            yield torch.device(NAME, 0)
    finally:
        devices._NARROW = before


def move_all(tree: Any) -> Any:
    """A tree with its tensors on the device; those that ask for gradients still do."""
    return pytree.tree_map_only(
        Tensor, lambda a: Narrow(a.detach()).requires_grad_(a.requires_grad), tree
    )


def to_narrow(module: Any) -> Any:
    """The module with its tensors on the device."""
    for layer in module.modules():
        for name, a in layer._parameters.items():
            if a is not None:
                layer._parameters[name] = torch.nn.Parameter(Narrow(a.detach()))
        for name, b in layer._buffers.items():
            if b is not None:
                layer._buffers[name] = Narrow(b)
    return module
