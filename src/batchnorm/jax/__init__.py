"""Batch normalization for JAX: pure functions for any library, and a flax nnx layer.

Importing this module imports jax; `BatchNorm`, `Momentum` and `load_state` import flax when they
are first used.
"""

from __future__ import annotations

from typing import Any

from batchnorm.core.moments import Moments

try:
    import jax  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(
        "batchnorm.jax needs JAX; install it with: pip install 'batchnorm[jax]'"
    ) from error

from batchnorm.jax.functional import (
    RenormStatistics,
    RunningStatistics,
    batch_norm,
    batch_norm_inference,
    init_running,
    update_running,
)
from batchnorm.jax.masks import sequence_mask

__all__ = [
    "BatchNorm",
    "Moments",
    "Momentum",
    "RenormStatistics",
    "RunningStatistics",
    "batch_norm",
    "batch_norm_inference",
    "init_running",
    "load_state",
    "sequence_mask",
    "update_running",
]

_LAYERS = ("BatchNorm", "Momentum", "load_state")


def __getattr__(name: str) -> Any:
    """The layer's names, for those who have flax."""
    if name not in _LAYERS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from batchnorm.jax import layers, loading
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("flax"):
            raise
        raise ImportError(
            f"batchnorm.jax.{name} is a flax module; install it with "
            "pip install 'batchnorm[jax]'. The functions need jax only."
        ) from error
    return getattr(loading if name == "load_state" else layers, name)
