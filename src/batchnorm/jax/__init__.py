"""Batch normalization for JAX: pure functions for any library, and a flax nnx layer.

Importing this module imports jax; `BatchNorm`, `Momentum`, `RenormLimit`, `accumulate_statistics`,
`convert_batchnorm` and `load_state` import flax when they are first used.
"""

from __future__ import annotations

import importlib
from typing import Any

from batchnorm.core.conversion import Conversion

try:
    import jax
except ModuleNotFoundError as error:
    raise ImportError(
        "batchnorm.jax needs JAX; install it with: pip install 'batchnorm[jax]'"
    ) from error
else:
    from batchnorm.core.versions import check_version

    check_version("batchnorm.jax", "jax", jax.__version__)

from batchnorm.jax.functional import (
    RenormStatistics,
    RunningStatistics,
    batch_norm,
    batch_norm_inference,
    init_running,
    update_running,
)
from batchnorm.jax.masks import downsample_mask, sequence_mask
from batchnorm.jax.moments import Moments, merge_moments

__all__ = [
    "BatchNorm",
    "Conversion",
    "Moments",
    "Momentum",
    "RenormLimit",
    "RenormStatistics",
    "RunningStatistics",
    "accumulate_statistics",
    "batch_norm",
    "batch_norm_inference",
    "convert_batchnorm",
    "downsample_mask",
    "init_running",
    "load_state",
    "merge_moments",
    "sequence_mask",
    "update_running",
]

_MODULES = {
    "BatchNorm": "layers",
    "Momentum": "variables",
    "RenormLimit": "variables",
    "accumulate_statistics": "passes",
    "convert_batchnorm": "convert",
    "load_state": "loading",
}


def __getattr__(name: str) -> Any:
    """The layer's names, for those who have flax."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        check_version(f"batchnorm.jax.{name}", "flax", importlib.import_module("flax").__version__)
        module = importlib.import_module(f"batchnorm.jax.{_MODULES[name]}")
    except ModuleNotFoundError as error:
        if error.name is None or not error.name.startswith("flax"):
            raise
        raise ImportError(
            f"batchnorm.jax.{name} is a flax module; install it with "
            "pip install 'batchnorm[jax]'. The functions need jax only."
        ) from error
    return getattr(module, name)
