"""torch models whose batch norms normalize by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from batchnorm.tools.frameworks.records import FoundLayer
from batchnorm.tools.frameworks.torch.private import BatchNormBase


def refuse_update(layer: Any) -> str | None:
    """The reason for not touching a layer's statistics, or None."""
    if getattr(layer, "frozen", False):
        return "is frozen; unfreeze() it first"
    if not isinstance(layer, BatchNormBase):
        return f"is a {type(layer).__name__}, whose statistics are fixed"
    return None


@contextmanager
def rehearse(
    model: nn.Module, layers: Sequence[FoundLayer]
) -> Iterator[tuple[nn.Module, Sequence[FoundLayer]]]:
    """The model itself, in evaluation mode but for `layers`; what changes is put back."""
    modes = [(module, module.training) for module in model.modules()]
    saved = [
        (found.layer._buffers, name, buffer, buffer.clone())
        for found in layers
        for name, buffer in found.layer._buffers.items()
        if buffer is not None
    ]
    try:
        for module, _ in modes:
            module.training = False  # not by eval(): models may override train()
        for found in layers:
            found.layer.training = True
        with torch.no_grad():
            yield model, layers
    finally:
        for module, mode in modes:
            module.training = mode
        with torch.no_grad():
            for buffers, name, buffer, value in saved:
                buffers[name] = buffer.copy_(value)
