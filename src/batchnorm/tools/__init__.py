"""Tools for models that hold batch normalizations; each imports a framework when asked for it."""

from __future__ import annotations

import importlib
from typing import Any

# A submodule of the same name would replace the function once it is imported.
_HOME = {
    "find_leaks": "batchnorm.tools.inspection.leaks",
    "fold": "batchnorm.tools.folding",
    "inspect": "batchnorm.tools.inspection",
    "merge": "batchnorm.tools.merging",
    "recalibrate": "batchnorm.tools.recalibration",
    "transfer": "batchnorm.tools.transferring",
}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
