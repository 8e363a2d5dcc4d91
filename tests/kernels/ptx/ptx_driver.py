"""A driver for Triton whose device is `ptx_machine`: launches run on tensors in memory.

Kernels are compiled as for a card, up to PTX; the PTX is executed.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from ptx_arithmetic import dtype_of
from ptx_machine import Machine
from ptx_memory import WARP, Clock, Memory
from ptx_text import parse

_SHARED = 232448  # bytes that a CTA may have on a card of compute capability 9.0


class Launch(NamedTuple):
    """A kernel and its arguments; `shared`: bytes of each CTA, `text`: its PTX."""

    kernel: str
    ctas: int
    warps: int
    shared: int
    text: str
    arguments: tuple[Any, ...]


def leave_out_binaries(*compilation: Any) -> tuple[str, str]:
    """Triton's hook into the stages of a compilation: PTX is the last, which spares ptxas's time.

    Triton's cache keeps kernels that were compiled under a hook apart from others: a card in the
    same process gets kernels of its own.
    """
    if compilation:
        stages = compilation[1]
        stages["cubin"] = lambda source, metadata: b""
    return "no binaries", "no binaries"


class _Utilities:
    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": _SHARED}

    def load_binary(self, name: str, binary: bytes, shared: int, device: int) -> tuple[Any, ...]:
        return None, None, 0, 0, 1024  # module, function, registers, spills, threads


class _Launcher:
    """Triton's launcher of a kernel; kernels outlive drivers, so the active driver runs it."""

    def __init__(self, source: Any, metadata: Any) -> None:
        path = get_cache_manager(metadata.hash).get_file(f"{source.name[:150]}.ptx")
        self._text, self._metadata = Path(path).read_text(), metadata
        self._types = tuple(source.signature.values())
        assert metadata.global_scratch_size == metadata.profile_scratch_size == 0
        assert metadata.num_ctas == 1

    def __call__(self, x: int, y: int, z: int, *rest: Any) -> None:
        assert y == z == 1
        arguments, given = tuple(_flatten(self._types, rest[6:])), self._metadata
        launch = Launch(given.name, x, given.num_warps, given.shared, self._text, arguments)
        triton.runtime.driver.active.launches.append(launch)
        triton.runtime.driver.active.run(launch)


def _flatten(types: Any, values: Any) -> Iterator[Any]:
    """Arguments that are not compiled in, in the order of a kernel's parameters."""
    for kind, value in zip(types, values, strict=True):
        if isinstance(kind, tuple):
            yield from _flatten(kind, value)
        elif kind != "constexpr":
            yield value


class Driver:
    """Runs launches, and records them in `launches`. `order`: see Machine."""

    utils = _Utilities()
    launcher_cls = _Launcher

    def __init__(self) -> None:
        self.launches: list[Launch] = []
        self.order: random.Random | None = None
        # By their memory: tensors that were new, and which of their units have been written.
        self._unset: dict[int, tuple[Tensor, np.ndarray]] = {}

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, WARP)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def declare_unset(self, tensor: Tensor) -> Tensor:
        """No kernel may read elements of a new tensor before one has written them.

        They hold NaN until then. The tensor is kept, so that no other one gets its memory.
        """
        tensor.fill_(torch.nan if tensor.is_floating_point() else -1)
        units = tensor.untyped_storage().nbytes() // tensor.element_size()
        self._unset[tensor.data_ptr()] = tensor, np.zeros(units, bool)
        return tensor

    def run(self, launch: Launch) -> None:
        """Run a launch, for the first time or again."""
        kernel, bits = parse(launch.text), {}
        # Behind the arguments come two pointers to scratch memory, of which there is none.
        values = (*launch.arguments, 0, 0)
        for (name, kind), value in zip(kernel.parameters, values, strict=True):
            number = value.data_ptr() if isinstance(value, Tensor) else value
            letter, size = kind[0], int(kind[1:])
            bits[name] = np.array([number % 2**size if letter == "u" else number], dtype_of(kind))
        tensors = [a for a in launch.arguments if isinstance(a, Tensor)]
        memories = lambda clock: self._buffers(tensors, clock)  # noqa: E731
        threads = launch.warps * WARP
        machine = Machine(kernel, launch.ctas, threads, bits, memories, launch.shared, self.order)
        machine.run()

    def _buffers(self, tensors: list[Tensor], clock: Clock) -> Iterator[tuple[int, Memory]]:
        """The memory of arguments; only their own elements exist."""
        storages = {a.untyped_storage().data_ptr(): a for a in tensors if a.numel()}
        for start, one in storages.items():
            sharing = [a for a in tensors if a.untyped_storage().data_ptr() == start]
            unit = min(a.element_size() for a in sharing)
            size = one.untyped_storage().nbytes()
            exists = torch.zeros(size // unit, dtype=torch.bool)
            for a in sharing:
                scale = a.element_size() // unit
                strides, offset = [s * scale for s in a.stride()], a.storage_offset() * scale
                torch.as_strided(exists, (*a.shape, scale), (*strides, 1), offset).fill_(True)
            data = torch.empty(0, dtype=torch.uint8).set_(one.untyped_storage()).numpy()
            _, defined = self._unset.get(start, (None, None))
            name = f"an argument of shape {tuple(one.shape)}"
            assert start % 16 == 0
            memory = Memory(data, unit, clock, exists=exists.numpy(), defined=defined, name=name)
            yield start, memory
