"""The tensors of a model that belong to no batch norm."""

from __future__ import annotations

import copy
import itertools
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from batchnorm.tools.frameworks.records import OtherArray
from batchnorm.tools.frameworks.torch import leaves, states


def copy_model(model: Any) -> Any:
    """A model or layer with tensors of its own."""
    try:
        return copy.deepcopy(model)
    except (TypeError, RuntimeError) as error:  # process groups, tensors inside a graph
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{type(model).__name__} cannot be copied: {reason:.200}. Use its state_dict(), or the "
            "model inside it."
        ) from error


def find_others(model: Any) -> list[OtherArray]:
    """Parameters and buffers, each once, in the order of definition."""
    if not isinstance(model, nn.Module):  # the explicit layer
        return []
    taken = {
        id(tensor)
        for _, layer in states.find(model)
        if isinstance(layer, nn.Module)
        for tensor in itertools.chain(layer.parameters(), layer.buffers())
    }
    named = itertools.chain(model.named_parameters(), model.named_buffers())
    return [
        OtherArray(name, partial(leaves.read, tensor), partial(_write, tensor))
        for name, tensor in named
        if id(tensor) not in taken
    ]


def _write(tensor: Tensor, values: NDArray[Any]) -> None:
    with torch.no_grad():
        tensor.copy_(leaves.make(values, tensor))
