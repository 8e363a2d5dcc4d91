"""Schemas of operators that torchvision's import describes, where its binary does not load.

The wheel on PyPI is compiled for CUDA. Beside a torch for CPUs its binary does not load, and its
Python part, which timm and transformers import, stops at operators that it cannot find. No
model of the zoo calls them.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

_kept: list[torch.library.Library] = []


def declare() -> None:
    """Declare them if torchvision is installed and its binary does not load."""
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        return
    for binary in Path(found.origin).parent.glob("_C*.so"):
        try:
            torch.ops.load_library(binary)
        except OSError:
            _kept.append(torch.library.Library("torchvision", "DEF"))
            for name in ("nms", "qnms"):
                _kept[0].define(
                    f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
                )
