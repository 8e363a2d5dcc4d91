"""Batch normalization, exact on padded batches, for PyTorch, JAX and Keras.

This module holds the float64 reference functions and imports no framework. The layers are in
`batchnorm.torch`, `batchnorm.jax` and `batchnorm.keras`, the tools for models with batch norms in
`batchnorm.tools`.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from batchnorm.core.moments import Moments
    from batchnorm.environment import __version__, show_config
    from batchnorm.memory import limit_memory, release_memory
    from batchnorm.reference import batch_norm, batch_norm_gradient
    from batchnorm.verification import verify
    from batchnorm.ways import explain

# Imported at first use: without numpy the command line starts in a third of the time.
_HOME = {
    "Moments": "batchnorm.core.moments",
    "__version__": "batchnorm.environment",
    "batch_norm": "batchnorm.reference",
    "batch_norm_gradient": "batchnorm.reference",
    "explain": "batchnorm.ways",
    "limit_memory": "batchnorm.memory",
    "release_memory": "batchnorm.memory",
    "show_config": "batchnorm.environment",
    "verify": "batchnorm.verification",
}

__all__ = [
    "Moments",
    "__version__",
    "batch_norm",
    "batch_norm_gradient",
    "explain",
    "limit_memory",
    "release_memory",
    "show_config",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(_HOME[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
