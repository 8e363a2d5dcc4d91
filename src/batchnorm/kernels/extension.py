"""The compiled extension: its presence, its plans, and the threads that it may use."""

from __future__ import annotations

import ctypes
import warnings
from functools import lru_cache
from pathlib import Path
from typing import Any

from batchnorm.core.config import Renorm
from batchnorm.core.layout import Layout
from batchnorm.kernels.geometry import Geometry, MaskView, sizes_of
from batchnorm.kernels.kept import ACTIVATIONS, TYPES

__all__ = [
    "State",
    "find_team",
    "instruction_sets",
    "instructions",
    "make_plan",
    "make_renorm",
    "missing_reason",
    "use_instructions",
    "warn_if_missing",
    "xla_handlers",
]

_SETS = ("baseline", "avx2", "avx512")

try:
    from batchnorm.kernels import _cpu
    from batchnorm.kernels._cpu import State
except ImportError as error:
    from batchnorm.kernels.absence import describe_absence

    _cpu = None  # type: ignore[assignment]
    _reason = describe_absence(error)


def missing_reason() -> str | None:
    """The reason for missing compiled passes; None if they are there."""
    return _reason if _cpu is None else None


def warn_if_missing() -> None:
    """Warn, when a front end is imported, that its layers will be slow."""
    if _cpu is None:
        from batchnorm.kernels.absence import describe_remedy

        warnings.warn(
            f"batchnorm: {_reason}; layers use plain array code, which is several times slower. "
            f"{describe_remedy()} batchnorm.show_config() says what is in use.",
            RuntimeWarning,
            stacklevel=2,
        )


def instructions() -> str:
    """The instruction set in use: "baseline", "avx2" or "avx512"."""
    return str(_cpu.instructions())


def instruction_sets() -> tuple[str, ...]:
    """The instruction sets that this machine runs, the slowest first."""
    chosen = instructions()
    found = tuple(name for name in _SETS if _cpu.use_instructions(name))
    _cpu.use_instructions(chosen)
    return found


def use_instructions(name: str) -> None:
    """Choose another instruction set that this machine runs; results are the same to the bit."""
    if not _cpu.use_instructions(name):
        raise ValueError(f"kernels: this machine cannot run {name!r} instructions.")


@lru_cache(maxsize=4096)
def make_plan(
    layout: Layout,
    geometry: Geometry,
    dtype: str,
    activation: str | None,
    zero_padding: bool,
    mask: MaskView | None,
    mask_width: int,
    team: int,
) -> _cpu.Plan:
    """The compiled side of a call; see native/bind/plan.hpp. `team` is from `find_team`."""
    plan = _cpu.Plan(
        type=TYPES[dtype],
        **sizes_of(layout, geometry)._asdict(),
        row=geometry.row,
        activation=ACTIVATIONS[activation],
        zero_padding=zero_padding,
    )
    if mask is not None:
        plan.set_mask(width=mask_width, **mask._asdict())
    plan.set_team(team)
    return plan


def make_renorm(renorm: Renorm | None) -> _cpu.Renorm | None:
    """Renormalization's numbers in the form that a compiled step takes."""
    if renorm is None:
        return None
    return _cpu.Renorm(decay=renorm.decay, rmin=renorm.rmin, rmax=renorm.rmax, dmax=renorm.dmax)


def xla_handlers() -> dict[str, Any]:
    """XLA custom calls by name; see native/bind/xla.cpp."""
    return dict(_cpu.xla_handlers())


def find_team(library: Path) -> int:
    """The address of OpenMP's GOMP_parallel as `library` uses it; 0 if it uses another runtime.

    Its idle threads spin for milliseconds before they sleep: threads of our own would compete with
    them for cores.
    """
    try:
        found = ctypes.CDLL(str(library)).GOMP_parallel
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(found, ctypes.c_void_p).value or 0
